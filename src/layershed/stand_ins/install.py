"""Puts stand-ins on module instances: a bypassed sublayer costs no compute and keeps its weights.

A stand-in is the attribute ``forward`` of an instance. Parameter names, the block's own forward and its
gradient-checkpointing wrapper do not change. The stand-in holds all state of a bypass, so deepcopy and pickle carry it
along.

The state dict gets one more key below each dropped module, whose name says what happened (:data:`MARK`). A strict load
into a dense model fails on it, whatever prefix is cut off the names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from layershed.stand_ins.stand_in import LINEAR_MAP, StandIn
from layershed.stand_ins.wrappers import is_wrapped, override_of


@dataclass
class _Note:
    """Replaces ``extra_repr``, so that ``print(model)`` shows the bypass."""

    text: str

    def __call__(self) -> str:
        return self.text


MARK = "dropped, load with layershed"
"""The last part of the key.

It has no dot, because torch splits keys at dots. It has no bracket, because transformers takes keys for regular
expressions where it renames weights.
"""

WITHHELD = " (dropped)"  # ends the name of a module in the checkpoints of :func:`withheld`
_HIDDEN = ("forward", "extra_repr")
_COMPUTING = (BasePruningMethod, WeightNorm, SpectralNorm)
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
    for name, parameter in hidden_parameters(module):
        if parameter.requires_grad:
            frozen.append(name)
            # False first: a frozen parameter must not be moved by the next optimizer step
            parameter.requires_grad_(False)
        parameter.grad = None
    override.frozen = tuple(frozen)
    _remove_hooks(module)
    if override.core:
        module.register_state_dict_post_hook(_add_mark)
        module.register_load_state_dict_pre_hook(_take_mark)
    put_on(module, override)


def hidden_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a module, by name, without those of a linear map that runs in its place."""
    return ((n, parameter) for n, parameter in module.named_parameters() if not n.startswith(f"{LINEAR_MAP}."))


def uninstall(module: nn.Module) -> None:
    """Undo :func:`install`, exactly."""
    override = override_of(module)
    if override is None:
        return
    take_off(module, override)
    _remove_hooks(module)
    parameters = dict(module.named_parameters())
    for name in override.frozen:
        # merged adapters are gone since, and quantized weights cannot train
        if name in parameters and parameters[name].is_floating_point():
            parameters[name].requires_grad_(True)


def _remove_hooks(module: nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._state_dict_hooks, module._load_state_dict_pre_hooks):
        ours = [n for n, hook in hooks.items() if getattr(hook, "hook", hook) in (_keep_out, _add_mark, _take_mark)]
        for number in ours:
            del hooks[number]


def keep_out(module: nn.Module) -> None:
    """Register a hook that does nothing; :func:`uninstall` removes it.

    torch's fused encoder layer reads the weights of its parts without calling them, unless one of them has a hook.
    """
    module.register_forward_pre_hook(_keep_out)


def _keep_out(_module: nn.Module, _args: object) -> None:
    """A hook that does nothing."""


def put_on(module: nn.Module, override: StandIn) -> None:
    """Make a stand-in run instead of the module's forward."""
    if is_wrapped(module, override):
        override.original = None
    else:
        before = module.__dict__
        override.own = {n: before[n] for n in _HIDDEN if n in before and not isinstance(before[n], _Note)}
        # through __dict__: nn.Module's own __setattr__ is slow, and mypy rightly forbids assigning a method
        module.__dict__["forward"] = override
    module.__dict__["extra_repr"] = _Note("bypassed" if override.map is None else "bypassed, linear")
    if override.map is not None:
        module._modules[LINEAR_MAP] = override.map.train(module.training)
    if override.core:
        # one number, because transformers takes empty tensors for shared ones; floating, because averages are
        dtypes = [p.dtype for _, p in hidden_parameters(module) if p.is_floating_point()]
        module.__dict__[MARK] = torch.ones(1, dtype=next(iter(dtypes), torch.float32), device="cpu")


def take_off(module: nn.Module, override: StandIn) -> None:
    """Undo :func:`put_on`. Inside the wrapper of another library, the stand-in stays and calls the original forward."""
    module.__dict__.pop(MARK, None)
    if override.map is not None:
        module._modules.pop(LINEAR_MAP, None)
    del module.__dict__["extra_repr"]
    if is_wrapped(module, override):
        original = override.own.get("forward") or MethodType(type(module).forward, module)
        override.original = original
    else:
        del module.__dict__["forward"]
    module.__dict__.update({k: v for k, v in override.own.items() if k != "forward" or override.original is None})


def _add_mark(module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: object) -> None:
    # as an attribute, because torch.distributed.checkpoint looks every key up; not in checkpoints of withheld()
    if MARK in module.__dict__ and WITHHELD not in prefix:
        state_dict[prefix + MARK] = module.__dict__[MARK]


def _take_mark(_module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    state_dict.pop(prefix + MARK, None)


def take_over_hooks(old: nn.Module, new: nn.Module) -> None:
    """Move the hooks of one module to another one; the handles that remove them keep working.

    Those that compute a module's own weights stay.
    """
    staying = [(module, _take_computing(module)) for module in (old, new)]
    for name in _HOOKS:
        if old.__dict__.get(name) is not None and (name == "_is_full_backward_hook" or old.__dict__[name]):
            new.__dict__[name], old.__dict__[name] = old.__dict__[name], new.__dict__[name]
    for module, hooks in staying:
        for number in reversed(hooks):  # they run before all others
            module._forward_pre_hooks[number] = hooks[number]
            module.__dict__["_forward_pre_hooks"].move_to_end(number, last=False)


def _take_computing(module: nn.Module) -> dict[int, Any]:
    """Remove the hooks of torch's pruning, weight_norm and spectral_norm, and return them."""
    hooks = module._forward_pre_hooks
    return {n: hooks.pop(n) for n in [n for n, hook in hooks.items() if isinstance(hook, _COMPUTING)]}
