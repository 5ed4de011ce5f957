"""What accelerate does: mixed precision, offloading, hooks, saving and loading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import (
    Accelerator,
    cpu_offload,
    disk_offload,
    dispatch_model,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
)
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from accelerate.state import AcceleratorState
from accelerate.utils import convert_outputs_to_fp32
from torch import nn

from tests.support.by_others.action import EVERY, Table, action
from tests.support.by_others.world import Model, World

ACTIONS: Table = {}


def _accelerator(mixed_precision: str = "no", folder: Path | None = None) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, mixed_precision=mixed_precision, project_dir=folder)


@action(ACTIONS, "accelerate prepares", steps=2)
def prepare(world: World) -> Iterator[Model]:
    accelerator = _accelerator()
    prepared = accelerator.prepare(world.model)
    yield prepared
    yield accelerator.unwrap_model(prepared)


@action(ACTIONS, "accelerate prepares in bfloat16", follows=True, tolerance=0.1)
def prepare_bf16(world: World) -> Iterator[Model]:
    yield _accelerator("bf16").prepare(world.model)


@action(ACTIONS, "accelerate prepares in bfloat16 and unwraps", steps=2)
def unwrap_bf16(world: World) -> Iterator[Model]:
    accelerator = _accelerator("bf16")
    prepared = accelerator.prepare(world.model)
    yield prepared
    yield accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)


@action(ACTIONS, "accelerate converts outputs to float32")
def convert_outputs(world: World) -> Iterator[Model]:
    world.model.forward = convert_outputs_to_fp32(world.model.forward)
    yield world.model


def _device_map(model: nn.Module, offloaded: str) -> dict[str, str]:
    """Block 1 of each stack is offloaded, the rest stays."""
    stacks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 2]
    stacks = [name for name in stacks if "experts" not in name]
    places: dict[str, str] = {}
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        if parent in stacks:
            places[name] = offloaded if last == "1" else "cpu"
        elif name and not list(module.children()) and not any(f"{name}.".startswith(f"{s}.") for s in stacks):
            places[name] = "cpu"
    for name in (n for named in (model.named_parameters(), model.named_buffers()) for n, _ in named):
        if not any(f"{name}.".startswith(f"{place}.") for place in places):
            places[name] = "cpu"
    return places


@action(ACTIONS, "accelerate dispatches one block to the disk")
def dispatch_disk(world: World) -> Iterator[Model]:
    places = _device_map(world.model, "disk")
    yield dispatch_model(world.model, places, main_device="cpu", offload_dir=world.folder / "off", force_hooks=True)


@action(ACTIONS, "accelerate dispatches with hooks everywhere", steps=2)
def dispatch(world: World) -> Iterator[Model]:
    places = _device_map(world.model, "cpu")
    dispatched = dispatch_model(world.model, places, main_device="cpu", force_hooks=True)
    yield dispatched
    remove_hook_from_submodules(dispatched)
    yield dispatched


@action(ACTIONS, "accelerate offloads to the CPU", steps=2)
def offload_cpu(world: World) -> Iterator[Model]:
    offloaded = cpu_offload(world.model, torch.device("cpu"))
    yield offloaded
    remove_hook_from_submodules(offloaded)
    yield offloaded


@action(ACTIONS, "accelerate offloads to the disk", EVERY, steps=1)
def offload_disk(world: World) -> Iterator[Model]:
    yield disk_offload(world.model, world.folder / "off", torch.device("cpu"))


@action(ACTIONS, "accelerate adds a hook to every module", ("llama", "gpt2", "opt", "bert"), steps=2)
def hooks(world: World) -> Iterator[Model]:
    for module in world.model.modules():
        add_hook_to_module(module, ModelHook(), append=True)
    yield world.model
    remove_hook_from_submodules(world.model)
    yield world.model


@action(ACTIONS, "accelerate saves, load_checkpoint_in_model", moments=(0,))
def save_model(world: World) -> Iterator[Model]:
    _accelerator().save_model(world.model, world.folder / "saved")
    fresh = world.fresh()
    load_checkpoint_in_model(fresh, world.folder / "saved")
    yield fresh


@action(ACTIONS, "accelerate saves, load_checkpoint_in_model strictly", ("llama", "opt"), moments=(0,))
def save_model_strict(world: World) -> Iterator[Model]:
    _accelerator().save_model(world.model, world.folder / "saved")
    fresh = world.fresh()
    load_checkpoint_in_model(fresh, world.folder / "saved", strict=True)
    yield fresh


@action(ACTIONS, "accelerate saves, load_checkpoint_and_dispatch", ("llama", "opt"), moments=(0,))
def save_and_dispatch(world: World) -> Iterator[Model]:
    _accelerator().save_model(world.model, world.folder / "saved")
    fresh = world.fresh()
    places = _device_map(fresh, "cpu")
    yield load_checkpoint_and_dispatch(fresh, world.folder / "saved", device_map=places, force_hooks=True)


@action(ACTIONS, "accelerate saves its state and loads it into the same model", ("llama", "opt", "bart"))
def state_again(world: World) -> Iterator[Model]:
    accelerator = _accelerator(folder=world.folder)
    prepared = accelerator.prepare(world.model)
    accelerator.save_state(world.folder / "state")
    with torch.no_grad():
        next(prepared.parameters()).zero_()
    accelerator.load_state(world.folder / "state")
    yield prepared


@action(ACTIONS, "accelerate saves its state and loads it into a fresh model", ("llama", "opt", "bart"), moments=(0,))
def state_fresh(world: World) -> Iterator[Model]:
    accelerator = _accelerator(folder=world.folder)
    accelerator.prepare(world.model)
    accelerator.save_state(world.folder / "state")
    accelerator = _accelerator(folder=world.folder)
    fresh = accelerator.prepare(world.fresh())
    accelerator.load_state(world.folder / "state")
    yield fresh
