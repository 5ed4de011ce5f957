"""Contexts within which stand-ins are off, on, or withheld from checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from layershed.stand_ins.install import WITHHELD, put_on, take_off
from layershed.stand_ins.record import overridden, put_record, take_record
from layershed.stand_ins.stand_in import StandIn
from layershed.stand_ins.watching import put_watch, take_watch
from layershed.stand_ins.wrappers import override_of

DROPPED_MODULES = "dropped_modules"
"""The field of a config that describes the stand-ins of a model, by path."""


@contextmanager
def lifted(model: nn.Module) -> Iterator[None]:
    """Within the context every module runs its original forward; parameters stay frozen, records are put away."""
    carried = list(overridden(model))
    records = {module: take_record(module) for module in model.modules()}
    watches = {module: take_watch(module) for module in model.modules()}
    configs = {id(config): config for module in model.modules() if (config := _noted_config(module)) is not None}
    fields = {key: config.__dict__.pop(DROPPED_MODULES) for key, config in configs.items()}
    for module, override in carried:
        take_off(module, override)
    try:
        yield
    finally:
        for module, override in carried:
            put_on(module, override)
        for module, children in records.items():
            put_record(module, children)
        for module, hooks in watches.items():
            put_watch(module, hooks)
        for key, config in configs.items():
            config.__dict__[DROPPED_MODULES] = fields[key]


def _noted_config(module: nn.Module) -> Any:
    config = module.__dict__.get("config")
    return config if DROPPED_MODULES in getattr(config, "__dict__", {}) else None


@contextmanager
def standing_in(model: nn.Module, stand_ins: Mapping[str, StandIn]) -> Iterator[None]:
    """Within the context the stand-ins run; nothing else in the model changes."""
    modules = {model.get_submodule(path): stand_in for path, stand_in in stand_ins.items()}
    for module, stand_in in modules.items():
        put_on(module, stand_in)
        put_watch(module, [None])  # hooks of others may write to its output
    try:
        yield
    finally:
        for module, stand_in in modules.items():
            take_watch(module)
            take_off(module, stand_in)


@contextmanager
def withheld(model: nn.Module) -> Iterator[None]:
    """Within the context overridden modules, and so their parameters, have names that no dense model has.

    A checkpoint written within it lacks keys that a dense model requires. A model that loads it must have the same
    bypass and be within this context, too.
    """
    parents = [parent for parent in model.modules() if any(map(_overridden, parent._modules.values()))]
    for parent in parents:
        _rename(parent, lambda name, child: name + WITHHELD if _overridden(child) else name)
    try:
        yield
    finally:
        for parent in parents:
            _rename(parent, lambda name, _child: name.replace(WITHHELD, ""))


def _overridden(module: nn.Module | None) -> bool:
    return module is not None and override_of(module) is not None


def _rename(parent: nn.Module, name_of: Callable[[str, nn.Module | None], str]) -> None:
    # rebuild all: their order is that of the parameters, which identifies optimizer states
    children = {name_of(name, child): child for name, child in parent._modules.items()}
    parent._modules.clear()
    parent._modules.update(children)
