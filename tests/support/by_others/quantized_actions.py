"""Quantization by others, on the CPU: bitsandbytes through transformers and by hand, torch's dynamic quantization."""

from __future__ import annotations

from collections.abc import Iterator

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import BitsAndBytesConfig

import layershed as ls
from tests.support.by_others.action import Table, action
from tests.support.by_others.world import Model, World

ACTIONS: Table = {}
_INT8 = {"load_in_8bit": True}


@action(
    ACTIONS,
    "linear layers are replaced by bitsandbytes' by hand",
    ("llama", "opt", "bert", "bart"),
    follows=True,
    tolerance=2e-3,
)
def by_hand(world: World) -> Iterator[Model]:
    for path, module in list(world.model.named_modules()):
        if type(module) is nn.Linear and "head" not in path:
            world.model.set_submodule(path, _quantized(module))
    yield world.model


def _quantized(module: nn.Linear) -> nn.Module:
    sizes = (module.in_features, module.out_features)
    new = bnb.nn.Linear4bit(*sizes, bias=module.bias is not None, compute_dtype=torch.float32, quant_type="nf4")
    new.weight = bnb.nn.Params4bit(module.weight.data.clone(), requires_grad=False, quant_type="nf4")
    if module.bias is not None:
        new.bias = nn.Parameter(module.bias.data.clone(), requires_grad=False)
    return new.to("cpu")


@action(
    ACTIONS,
    "transformers saves, loads quantized by bitsandbytes",
    ("llama", "opt"),
    moments=(0, 1),
    follows=True,
    tolerance=2e-3,
)
def loaded_int8(world: World) -> Iterator[Model]:
    world.model.save_pretrained(world.folder / "saved")
    options = {"quantization_config": BitsAndBytesConfig(**_INT8), "dtype": torch.float32, "device_map": {"": "cpu"}}
    yield type(world.model).from_pretrained(world.folder / "saved", **options)


@action(
    ACTIONS,
    "transformers saves, layershed loads quantized",
    ("llama", "opt"),
    moments=(0,),
    follows=True,
    tolerance=2e-3,
)
def layershed_int8(world: World) -> Iterator[Model]:
    world.model.save_pretrained(world.folder / "saved")
    options = {"quantization_config": BitsAndBytesConfig(**_INT8), "dtype": torch.float32, "device_map": {"": "cpu"}}
    yield ls.load_pretrained(world.folder / "saved", **options)


@action(ACTIONS, "torch quantizes dynamically", ("llama", "opt", "bert", "bart"), follows=True, tolerance=0.02)
def dynamic(world: World) -> Iterator[Model]:
    torch.backends.quantized.engine = next(e for e in torch.backends.quantized.supported_engines if e != "none")
    yield torch.ao.quantization.quantize_dynamic(world.model, {nn.Linear}, dtype=torch.qint8)


@action(ACTIONS, "torch quantizes dynamically in place", ("llama", "opt"), follows=True, tolerance=0.02)
def dynamic_in_place(world: World) -> Iterator[Model]:
    torch.backends.quantized.engine = next(e for e in torch.backends.quantized.supported_engines if e != "none")
    yield torch.ao.quantization.quantize_dynamic(world.model, {nn.Linear}, dtype=torch.qint8, inplace=True)
