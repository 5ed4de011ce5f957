"""The record of what is dropped, in the parents of the dropped modules, where other libraries do not lose it.

Other libraries replace a dropped module (peft's merge) or overwrite its forward (accelerate). Its stand-in is lost
then. The parent holds the stand-ins of its children. Before each of its forward passes, and whenever layershed looks at
the model, it puts lost ones back. This is right because the parent calls the child in the way that was proven.

If the parent itself is replaced, such as a whole block, nothing is proven. The modules above know the parents, and
raise an error instead of running them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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
        if recorded(module):
            mend(module)
        override = override_of(module)
        if override is not None:
            yield module, override


def write_record(model: nn.Module) -> None:
    """Record in every parent which of its children carry a stand-in now, and in the modules above which parents."""
    for parent in model.modules():
        take_record(parent)
    parents = {}
    for path, parent in model.named_modules():
        children = {name: found for name, child in parent.named_children() if (found := override_of(child))}
        put_record(parent, Record(children))
        if children:
            parents[path] = parent
    for above, below in _chain(model, parents).items():
        put_record(above, Record(take_record(above).children, below))


def _chain(model: nn.Module, parents: Mapping[str, nn.Module]) -> dict[nn.Module, dict[str, nn.Module]]:
    """By module that runs, the next module that runs on the way to each parent, by relative path."""
    found: dict[nn.Module, dict[str, nn.Module]] = {}
    for path in parents:
        above, steps = model, []
        for name in path.split(".") if path else ():
            steps.append(name)
            module = above.get_submodule(".".join(steps))
            if not isinstance(module, nn.ModuleList | nn.ModuleDict):  # those never run
                found.setdefault(above, {})[".".join(steps)] = module
                above, steps = module, []
    return found


@dataclass
class Record:
    """What a module knows of dropped modules below it.

    Args:
        children: By name, the stand-ins that its children carry.
        below: By path, the next modules that run on the way to other records.
    """

    children: dict[str, StandIn] = field(default_factory=dict)
    below: dict[str, nn.Module] = field(default_factory=dict)


def take_record(module: nn.Module) -> Record:
    """Remove the record of a module, and return it."""
    record: Record = module.__dict__.pop(_RECORD, None) or Record()
    for number in [number for number, hook in module._forward_pre_hooks.items() if hook is _check]:
        del module._forward_pre_hooks[number]
    return record


def put_record(module: nn.Module, record: Record) -> None:
    """Give a module a record, and have it checked before each forward pass."""
    if record.children or record.below:
        module.__dict__[_RECORD] = record
        module.register_forward_pre_hook(_check)


def _check(module: nn.Module, _args: object) -> None:
    """Mends the module if necessary; cheap, because it runs in every training step."""
    record = module.__dict__.get(_RECORD)
    if record is None:
        return
    for name, stand_in in record.children.items():
        child: Any = module._modules.get(name)
        if child is not None and child.__dict__.get("forward") is not stand_in:
            mend(module)
    if record.below:
        check_below(module)


def check_below(module: nn.Module) -> None:
    """Refuse to run a module in which others replaced a parent of dropped modules.

    Raises:
        RevivedSublayerError: If a parent is gone. A module that wraps it is no harm.
    """
    record = module.__dict__.get(_RECORD) or Record()
    for path, known in record.below.items():
        found: Any = module
        for name in path.split("."):
            found = found._modules.get(name) if found is not None else None
        if found is known or getattr(module, "_is_replica", False):
            continue
        if found is not None and any(inner is known for inner in found.modules()):
            continue
        if found is not None and _sublayers(known) <= _sublayers(found):  # a copy of it
            record.below[path] = found
        else:
            labels = sorted({stand_in.label for _, stand_in in overridden(known) if stand_in.core})
            if found is None:
                raise RevivedSublayerError(
                    f"{', '.join(labels)}: dropped, but {path} of {type(module).__name__} is gone. Call "
                    "layershed.restore(model), and bypass again what is left."
                )
            raise RevivedSublayerError(
                f"{', '.join(labels)}: dropped, but {path} of {type(module).__name__} was replaced by another module, "
                "in which they would run. If it is of the same make, call layershed.dropped_sublayers(model) to "
                "bypass them again. Call layershed.restore(model) to run them."
            )


def _sublayers(module: nn.Module) -> set[object]:
    return {stand_in.sublayer for _, stand_in in overridden(module) if stand_in.core}


def check_records(model: nn.Module) -> None:
    """Refuse a model in which others replaced a parent of dropped modules (:func:`check_below`)."""
    for module in model.modules():
        check_below(module)


def mend(parent: nn.Module) -> None:
    """Put back the stand-ins that children of a module have lost.

    Raises:
        RevivedSublayerError: If the forward of a child was replaced by an unknown function.
    """
    for name, stand_in in recorded(parent).items():
        child = parent._modules.get(name)
        if child is None or override_of(child) is stand_in:
            continue
        _refuse_unknown(child, stand_in)
        for inner in [inner for inner in child.modules() if override_of(inner) is stand_in]:
            take_off(inner, stand_in)  # peft wraps the module that carries it
        before, stand_in.original = stand_in.frozen, None
        install(child, stand_in)
        stand_in.frozen = tuple(dict.fromkeys((*before, *stand_in.frozen)))  # they may train once it is restored
        take_watch(child)
        put_watch(child, [None])


def _is_unknown(child: nn.Module) -> bool:
    forward = child.__dict__.get("forward")
    return not (forward is None or getattr(forward, "__self__", None) is child or hasattr(forward, "__wrapped__"))


def _refuse_unknown(child: nn.Module, stand_in: StandIn) -> None:
    if _is_unknown(child):
        forward = child.__dict__["forward"]
        raise RevivedSublayerError(
            f"{stand_in.label} is dropped, but its forward was replaced by {forward!r} afterwards, so it would run "
            "again. Call layershed.restore(model) to run it so, or delete the attribute forward of the module to drop "
            "it again."
        )


def forget_foreign(model: nn.Module) -> None:
    """Give up stand-ins whose place an unknown function has taken; that function runs from now on."""
    for parent in model.modules():
        for name, stand_in in list(recorded(parent).items()):
            child = parent._modules.get(name)
            if child is not None and override_of(child) is not stand_in and _is_unknown(child):
                del recorded(parent)[name]
                forward = child.__dict__["forward"]
                child.__dict__["forward"] = stand_in
                uninstall(child)
                child.__dict__["forward"] = forward


def recorded(parent: nn.Module) -> dict[str, StandIn]:
    """By name of the child, the stand-ins that a module has recorded."""
    record: Record = parent.__dict__.get(_RECORD) or Record()
    return record.children


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
