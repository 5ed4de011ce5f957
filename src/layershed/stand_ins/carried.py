"""The stand-ins that a model carries: by path, the weights that they hide, and their linear maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from layershed.stand_ins.install import hidden_parameters
from layershed.stand_ins.linear_map import LinearMap
from layershed.stand_ins.record import overridden
from layershed.stand_ins.stand_in import LINEAR_MAP, RemovedModule, StandIn
from layershed.stand_ins.wrappers import override_of


def stand_ins_of(transformer: nn.Module) -> dict[str, StandIn]:
    """The stand-ins of bypassed and removed modules, by path."""
    found: dict[str, StandIn] = {}
    for path, module in transformer.named_modules():
        stand_in = module.stand_in if isinstance(module, RemovedModule) else override_of(module)
        if stand_in is not None:
            found[path] = stand_in
    return found


def maps_of(transformer: nn.Module) -> dict[Any, LinearMap]:
    """The linear maps that run in a model, by sublayer."""
    stand_ins = stand_ins_of(transformer).values()
    return {stand_in.sublayer: stand_in.map for stand_in in stand_ins if stand_in.map is not None}


def dropped_parameters(transformer: nn.Module) -> list[nn.Parameter]:
    """The parameters that stand-ins hide: those of bypassed sublayers, and of norms that only they use."""
    return [parameter for module, _ in overridden(transformer) for _, parameter in hidden_parameters(module)]


def dropped_parameter_names(transformer: nn.Module) -> set[str]:
    """Names of the parameters and buffers that bypassed sublayers, and the norms only they use, hold."""
    carriers = {id(module) for module, _ in overridden(transformer)}
    return {
        f"{path}.{name}"
        for path, module in transformer.named_modules()
        if id(module) in carriers
        for name in module.state_dict()
        if not name.startswith(f"{LINEAR_MAP}.")
    }


def weights_like(module: nn.Module, fallback: nn.Module) -> dict[str, Any]:
    """Device and dtype for a map in place of a module: those of its first floating weight, else of another module's."""
    for holder in (module, fallback):
        for _, parameter in hidden_parameters(holder):
            if parameter.is_floating_point():
                return {"device": parameter.device, "dtype": parameter.dtype}
    return {"device": torch.device("cpu"), "dtype": torch.float32}
