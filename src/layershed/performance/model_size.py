"""Counts the weights that a model computes with, and their bytes. Quantized weights count unpacked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from layershed.recovery.lora import adapted_modules
from layershed.stand_ins.carried import dropped_parameter_names, stand_ins_of
from layershed.stand_ins.install import MARK
from layershed.stand_ins.stand_in import LINEAR_MAP, RemovedModule


@dataclass(frozen=True)
class WeightSizes:
    """Sizes of a model without what is dropped and without adapters.

    Args:
        parameters: Number of weights. A packed 4-bit tensor counts with its unpacked weights.
        bytes: Bytes of the weights and of the buffers saved beside them: a safetensors file without its header.
    """

    parameters: int
    bytes: int


def weight_sizes(transformer: nn.Module, *, lifted: bool = False) -> WeightSizes:
    """Measure the sizes of the weights that a model computes with. Shared weights count once.

    Args:
        transformer: The transformer itself.
        lifted: Count bypassed sublayers, and not the linear maps in their place.
    """
    gone = _names_of_maps(transformer) if lifted else dropped_parameter_names(transformer)
    adapters = {id(parameter) for parameter in adapter_parameters(transformer)}
    every = dict(transformer.named_parameters(remove_duplicate=False))
    kept = {
        name: parameter
        for name, parameter in transformer.named_parameters()
        if name not in gone and id(parameter) not in adapters
    }
    # buffers, and the scales of quantized weights
    saved = transformer.state_dict().items()
    beside = (tensor for name, tensor in saved if name not in every and name not in gone and not name.endswith(MARK))
    return WeightSizes(
        sum(math.prod(weight_shape(parameter)) for parameter in kept.values()),
        sum(tensor.numel() * tensor.element_size() for tensor in (*kept.values(), *beside)),
    )


def _names_of_maps(transformer: nn.Module) -> set[str]:
    """Names of the weights of linear maps in place of bypassed sublayers."""
    places = {path for path, stand_in in stand_ins_of(transformer).items() if stand_in.map is not None}
    bypassed = {path for path in places if not isinstance(transformer.get_submodule(path), RemovedModule)}
    prefixes = tuple(f"{path}.{LINEAR_MAP}." for path in bypassed)
    return {name for name in transformer.state_dict() if prefixes and name.startswith(prefixes)}


def weight_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of a weight; for a packed 4-bit weight its unpacked shape."""
    return tuple(getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape))


def adapter_parameters(transformer: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the weights of LoRA adapters, which cost nothing after merging."""
    for layer in adapted_modules(transformer).values():
        for name, parameter in layer.named_parameters():
            if not name.startswith("base_layer."):
                yield parameter
