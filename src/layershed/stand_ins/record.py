"""The record of what is dropped, in the parents of the dropped modules, where other libraries do not lose it.

Other libraries replace a dropped module (peft's merge) or overwrite its forward (accelerate). Its stand-in is lost
then. The parent holds the stand-ins of its children. Before each of its forward passes, and whenever layershed looks at
the model, it puts lost ones back. This is right because the parent calls the child in the way that was proven.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from layershed.errors import RevivedSublayerError
from layershed.stand_ins.install import install, take_off, take_over_hooks, uninstall
from layershed.stand_ins.stand_in import StandIn
from layershed.stand_ins.watching import put_watch, take_watch
from layershed.stand_ins.wrappers import override_of

_RECORD = "_dropped_children"


def overridden(model: nn.Module) -> Iterator[tuple[nn.Module, StandIn]]:
    """Every module of a model that carries a stand-in, with the stand-in; lost ones are put back first.

    Raises:
        RevivedSublayerError: If a lost one cannot be put back.
    """
    for module in model.modules():  # parents before their children
        if _RECORD in module.__dict__:
            mend(module)
        override = override_of(module)
        if override is not None:
            yield module, override


def write_record(model: nn.Module) -> None:
    """Record in every parent which of its children carry a stand-in now."""
    for parent in model.modules():
        take_record(parent)
        put_record(parent, {name: found for name, child in parent.named_children() if (found := override_of(child))})


def take_record(parent: nn.Module) -> dict[str, StandIn]:
    """Remove the record of a module, and return it."""
    children: dict[str, StandIn] = parent.__dict__.pop(_RECORD, {})
    if children:
        for number in [number for number, hook in parent._forward_pre_hooks.items() if hook is _check]:
            del parent._forward_pre_hooks[number]
    return children


def put_record(parent: nn.Module, children: dict[str, StandIn]) -> None:
    """Give a module a record, by name of the child, and have it checked before each forward pass."""
    if children:
        parent.__dict__[_RECORD] = children
        parent.register_forward_pre_hook(_check)


def _check(parent: nn.Module, _args: object) -> None:
    """Mends the parent if necessary; cheap, because it runs in every training step."""
    for name, stand_in in parent.__dict__.get(_RECORD, {}).items():
        child: Any = parent._modules.get(name)
        if child is not None and child.__dict__.get("forward") is not stand_in:
            mend(parent)


def mend(parent: nn.Module) -> None:
    """Put back the stand-ins that children of a module have lost.

    Raises:
        RevivedSublayerError: If the forward of a child was replaced by an unknown function.
    """
    for name, stand_in in parent.__dict__[_RECORD].items():
        child = parent._modules.get(name)
        if child is None or override_of(child) is stand_in:
            continue
        _refuse_unknown(child, stand_in)
        for inner in [inner for inner in child.modules() if override_of(inner) is stand_in]:
            take_off(inner, stand_in)  # peft wraps the module that carries it
        stand_in.original = None
        install(child, stand_in)
        take_watch(child)
        put_watch(child, [None])


def _refuse_unknown(child: nn.Module, stand_in: StandIn) -> None:
    forward = child.__dict__.get("forward")
    known = forward is None or getattr(forward, "__self__", None) is child or hasattr(forward, "__wrapped__")
    if not known:
        raise RevivedSublayerError(
            f"{stand_in.label} is dropped, but its forward was replaced by {forward!r} afterwards, so it would run "
            "again. Call layershed.restore before replacing it, and layershed.bypass afterwards."
        )


def exchange(model: nn.Module, path: str, new: nn.Module) -> None:
    """Replace a module by another one, which takes over its stand-in, its mode and its hooks.

    A bypass and the hooks of watchers keep working.
    """
    old = model.get_submodule(path)
    new.train(old.training)
    override = override_of(old)
    if override is not None:
        uninstall(old)
    model.set_submodule(path, new)
    take_over_hooks(old, new)
    if override is not None:
        install(new, override)
