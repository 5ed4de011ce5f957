"""Puts stand-ins on module instances: a bypassed sublayer costs no compute and keeps its weights.

A stand-in is the attribute ``forward`` of an instance. State-dict keys, the block's own forward and its
gradient-checkpointing wrapper do not change. The stand-in holds all state of a bypass, so deepcopy and pickle carry it
along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from layershed.stand_ins.stand_in import StandIn


@dataclass
class _Note:
    """Replaces ``extra_repr``, so that ``print(model)`` shows the bypass."""

    text: str

    def __call__(self) -> str:
        return self.text


WITHHELD = " (dropped)"  # ends the name of a module in the checkpoints of :func:`withheld`
_HIDDEN = ("forward", "extra_repr")
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def install(module: nn.Module, override: StandIn) -> None:
    """Bypass one module: override its forward, freeze its parameters and forget their gradients."""
    frozen = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            frozen.append(name)
            # False first: a frozen parameter must not be moved by the next optimizer step
            parameter.requires_grad_(False)
        parameter.grad = None
    override.frozen = tuple(frozen)
    _set(module, override)


def uninstall(module: nn.Module) -> None:
    """Undo :func:`install`, exactly."""
    override = override_of(module)
    if override is None:
        return
    _clear(module, override)
    for number, hook in list(module._forward_pre_hooks.items()):
        if hook is _keep_out:
            del module._forward_pre_hooks[number]
    parameters = dict(module.named_parameters())
    for name in override.frozen:
        # merged adapters are gone since, and quantized weights cannot train
        if name in parameters and parameters[name].is_floating_point():
            parameters[name].requires_grad_(True)


def keep_out(module: nn.Module) -> None:
    """Register a hook that does nothing; :func:`uninstall` removes it.

    torch's fused encoder layer reads the weights of its parts without calling them, unless one of them has a hook.
    """
    module.register_forward_pre_hook(_keep_out)


def _keep_out(_module: nn.Module, _args: object) -> None:
    """A hook that does nothing."""


def override_of(module: nn.Module) -> StandIn | None:
    """The override that a module carries, or None."""
    override = module.__dict__.get("forward")
    return override if isinstance(override, StandIn) else None


def overridden(model: nn.Module) -> Iterator[tuple[nn.Module, StandIn]]:
    """Every overridden module of a model, with its override."""
    for module in model.modules():
        override = override_of(module)
        if override is not None:
            yield module, override


@contextmanager
def lifted(model: nn.Module) -> Iterator[None]:
    """Within the context every module runs its original forward; parameters stay frozen."""
    carried = list(overridden(model))
    for module, override in carried:
        _clear(module, override)
    try:
        yield
    finally:
        for module, override in carried:
            _set(module, override)


@contextmanager
def standing_in(model: nn.Module, stand_ins: Mapping[str, StandIn]) -> Iterator[None]:
    """Within the context the stand-ins run; nothing else in the model changes."""
    modules = {model.get_submodule(path): stand_in for path, stand_in in stand_ins.items()}
    for module, stand_in in modules.items():
        _set(module, stand_in)
    try:
        yield
    finally:
        for module, stand_in in modules.items():
            _clear(module, stand_in)


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


def take_over_hooks(old: nn.Module, new: nn.Module) -> None:
    """Move the hooks of one module to another one; the handles that remove them keep working."""
    for name in _HOOKS:
        if old.__dict__.get(name) is not None and (name == "_is_full_backward_hook" or old.__dict__[name]):
            new.__dict__[name], old.__dict__[name] = old.__dict__[name], new.__dict__[name]


def _set(module: nn.Module, override: StandIn) -> None:
    # through __dict__: nn.Module's own __setattr__ is slow, and mypy rightly forbids assigning a method
    override.own = {name: module.__dict__[name] for name in _HIDDEN if name in module.__dict__}
    module.__dict__["forward"] = override
    module.__dict__["extra_repr"] = _Note("bypassed")


def _clear(module: nn.Module, override: StandIn) -> None:
    for name in _HIDDEN:
        del module.__dict__[name]
    module.__dict__.update(override.own)


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
