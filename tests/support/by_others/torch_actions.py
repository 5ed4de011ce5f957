"""What torch offers: copying, pickling, state dicts, pruning, parametrization, compiling, exporting."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm

from tests.support.by_others.action import EVERY, Table, action
from tests.support.by_others.world import Model, World

ACTIONS: Table = {}


@action(ACTIONS, "copy.deepcopy", moments=(0,))
def deepcopied(world: World) -> Iterator[Model]:
    yield copy.deepcopy(world.model)


@action(ACTIONS, "pickle", ("llama", "opt", "bart"), moments=(0,))
def pickled(world: World) -> Iterator[Model]:
    yield pickle.loads(pickle.dumps(world.model))


@action(ACTIONS, "torch.save of the whole model", moments=(0,))
def saved_whole(world: World) -> Iterator[Model]:
    torch.save(world.model, world.folder / "model.pt")
    yield torch.load(world.folder / "model.pt", weights_only=False)


def _holder(net: nn.Module, name: str) -> nn.Module:
    holder = nn.Module()
    setattr(holder, name, net)
    return holder


def _cut(name: str) -> None:
    @action(ACTIONS, f"state dict, {name}. cut off", ("llama", "opt", "bart"), moments=(0,))
    def cut(world: World) -> Iterator[Model]:
        torch.save(_holder(world.model, name).state_dict(), world.folder / "weights.pt")
        weights = torch.load(world.folder / "weights.pt", weights_only=True)
        fresh = world.fresh()
        fresh.load_state_dict({key.removeprefix(f"{name}."): value for key, value in weights.items()})
        yield fresh


for _name in ("net", "model", "module", "_orig_mod"):
    _cut(_name)


@action(ACTIONS, "strict load_state_dict into a fresh model", moments=(0,))
def loaded_strictly(world: World) -> Iterator[Model]:
    fresh = world.fresh()
    fresh.load_state_dict(world.model.state_dict())
    yield fresh


@action(ACTIONS, "loose load_state_dict into a fresh model", moments=(0,))
def loaded_loosely(world: World) -> Iterator[Model]:
    fresh = world.fresh()
    world.told.append(str(fresh.load_state_dict(world.model.state_dict(), strict=False)))
    yield fresh


@action(ACTIONS, "load_state_dict with assign=True", ("llama", "opt"), moments=(0,))
def assigned(world: World) -> Iterator[Model]:
    fresh = world.fresh()
    fresh.load_state_dict(world.model.state_dict(), assign=True)
    yield fresh


@action(ACTIONS, "the base's state dict loaded into a fresh base", ("llama", "opt", "bert"), moments=(0,))
def loaded_base(world: World) -> Iterator[Model]:
    fresh = world.fresh()
    fresh.base_model.load_state_dict(world.model.base_model.state_dict())
    yield fresh


@action(ACTIONS, "block by block load_state_dict", ("llama", "opt", "gpt2"), moments=(0,))
def loaded_blocks(world: World) -> Iterator[Model]:
    fresh = world.fresh()
    for new, old in zip(fresh.children(), world.model.children(), strict=True):
        new.load_state_dict(old.state_dict())
    yield fresh


@action(ACTIONS, "load_state_dict of dense weights into the model", EVERY)
def dense_weights(world: World) -> Iterator[Model]:
    weights = copy.deepcopy(world.model.state_dict())
    dense = {key: value for key, value in weights.items() if key in world.fresh().state_dict()}
    world.model.load_state_dict(dense)
    yield world.model


@action(ACTIONS, "torch.distributed.checkpoint into the same model", ("llama", "opt", "bart"))
def dcp_same(world: World) -> Iterator[Model]:
    state_dict_saver.save({"model": world.model.state_dict()}, checkpoint_id=world.folder / "dcp")
    state = {"model": world.model.state_dict()}
    state_dict_loader.load(state, checkpoint_id=world.folder / "dcp")
    world.model.load_state_dict(state["model"])
    yield world.model


@action(ACTIONS, "torch.distributed.checkpoint into a fresh model", ("llama", "opt", "bart"), moments=(0,))
def dcp_fresh(world: World) -> Iterator[Model]:
    state_dict_saver.save({"model": world.model.state_dict()}, checkpoint_id=world.folder / "dcp")
    fresh = world.fresh()
    state = {"model": fresh.state_dict()}
    state_dict_loader.load(state, checkpoint_id=world.folder / "dcp")
    fresh.load_state_dict(state["model"])
    yield fresh


def _linears(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module) is nn.Linear and module.out_features != 97]


@action(ACTIONS, "torch prunes half of the weights", ("llama", "opt", "bert"), follows=True, steps=2)
def pruned(world: World) -> Iterator[Model]:
    for module in _linears(world.model):
        prune.l1_unstructured(module, "weight", 0.5)
    yield world.model
    for module in _linears(world.model):
        prune.remove(module, "weight")
    yield world.model


class _Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


@action(ACTIONS, "torch parametrizes linear maps", ("llama", "opt", "bert"), follows=True, steps=2)
def parametrized(world: World) -> Iterator[Model]:
    found = _linears(world.model)
    for module in found:
        parametrize.register_parametrization(module, "weight", _Doubled())
    yield world.model
    for module in found:
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    yield world.model


@action(ACTIONS, "torch adds weight norm to inner maps", ("llama", "opt"))
def weight_normed(world: World) -> Iterator[Model]:
    for path, module in list(world.model.named_modules()):
        if path.endswith(("q_proj", "up_proj", "fc1")):
            weight_norm(module)
    yield world.model


@action(ACTIONS, "torch.compile", ("llama", "gpt2", "opt", "bert"))
def compiled(world: World) -> Iterator[Model]:
    torch.compiler.reset()
    compiled = torch.compile(world.model, backend="eager")
    compiled(**world.inputs)
    yield compiled


@action(ACTIONS, "Module.compile in place", ("llama", "opt", "bert"))
def compiled_in_place(world: World) -> Iterator[Model]:
    torch.compiler.reset()
    world.model.compile(backend="eager")
    world.model(**world.inputs)
    yield world.model


@action(ACTIONS, "every block is compiled by itself", ("llama", "gpt2", "opt"))
def blocks_compiled(world: World) -> Iterator[Model]:
    torch.compiler.reset()
    for stack in [m for m in world.model.modules() if isinstance(m, nn.ModuleList) and len(m) > 2]:
        for name, block in list(stack.named_children()):
            compiled: Any = torch.compile(block, backend="eager")
            stack.register_module(name, compiled)
    world.model(**world.inputs)
    yield world.model


@action(ACTIONS, "torch.export", ("llama", "gpt2", "opt", "bert", "mixtral"), moments=(0,), named=False)
def exported(world: World) -> Iterator[Model]:
    inputs = {**world.inputs, "use_cache": False}
    module = torch.export.export(world.model, (), inputs, strict=False).module()
    yield lambda **given: module(**given, use_cache=False)


@action(ACTIONS, "functional_call with other weights", ("llama", "opt", "bart"), named=False, moments=(0, 1), steps=2)
def functional(world: World) -> Iterator[Model]:
    yield world.model
    weights = {name: value.clone() for name, value in world.model.named_parameters()}
    with torch.no_grad():
        for value in world.model.parameters():
            value.mul_(0.5)
    yield lambda **inputs: torch.func.functional_call(world.model, weights, (), inputs)


@action(ACTIONS, "torch.jit.trace", ("llama", "bert"), moments=(0,), named=False)
def traced(world: World) -> Iterator[Model]:
    class Plain(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.net(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    yield torch.jit.trace(Plain(world.model), example_kwarg_inputs=world.inputs, check_trace=False, strict=False)


@action(ACTIONS, "to the meta device and back (to_empty), weights loaded", ("llama", "opt"))
def emptied(world: World) -> Iterator[Model]:
    weights = copy.deepcopy(world.model.state_dict())
    buffers = {name: value.clone() for name, value in world.model.named_buffers()}
    world.model.to_empty(device="cpu")
    world.model.load_state_dict(weights)
    for name, value in world.model.named_buffers():
        value.copy_(buffers[name])
    yield world.model


@action(ACTIONS, "share_memory, requires_grad_, train and eval", ("llama", "opt", "bert"))
def modes(world: World) -> Iterator[Model]:
    world.model.share_memory()
    world.model.requires_grad_(True)
    world.model.train()
    world.model.zero_grad()
    yield world.model.eval()


@action(
    ACTIONS, "everything is unfrozen and trained by plain torch", ("llama", "gpt2", "opt"), trains=True, tolerance=1e-3
)
def unfrozen(world: World) -> Iterator[Model]:
    if not world.silent:
        world.model.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in world.model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        world.model.train()(**world.batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    yield world.model.eval()
