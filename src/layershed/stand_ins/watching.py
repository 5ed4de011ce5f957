"""Hooks on a model with stand-ins, so that callers and hooks of others see what they would see of a dense model.

The text of this file is copied, after that of stand_in.py, into folders that load without layershed.
"""

from __future__ import annotations

from collections.abc import Mapping
from threading import local
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from layershed.stand_ins.stand_in import StandIn, zeros_after


def watch(model: nn.Module, stand_ins: Mapping[str, StandIn]) -> None:
    """Make a model keep its extra outputs in place, and its stand-ins fit for hooks of others.

    Args:
        model: A transformer.
        stand_ins: All its stand-ins by path; without any, the hooks of an earlier call are removed.
    """
    captures = {key: (ndim, size) for stand_in in stand_ins.values() for key, ndim, size in stand_in.captures}
    aliases = {path for own, stand_in in stand_ins.items() for path in (own, *stand_in.aliases)}
    gives = bool(captures) or any(stand_in.asked for stand_in in stand_ins.values())
    outputs = Outputs(captures)
    for path, module in model.named_modules():
        take_watch(module)
        hooks = ([outputs] if gives and isinstance(module, PreTrainedModel) else []) + [None] * (path in aliases)
        put_watch(module, hooks)


def remove_forward_hook(module: nn.Module, number: int) -> None:
    """Remove a forward hook of which only the number is known, as the handle of its registration would."""
    for hooks in (module._forward_hooks, module._forward_hooks_always_called, module._forward_hooks_with_kwargs):
        hooks.pop(number, None)


def take_watch(module: nn.Module) -> list[Outputs | None]:
    """Remove the hooks of :func:`watch` from one module; returns what :func:`put_watch` needs."""
    found: list[Outputs | None] = []
    for number, hook in list(module._forward_hooks.items()):
        owner = _owner(hook)
        if hook is _unshare or isinstance(owner, Outputs):
            found.append(owner)
            remove_forward_hook(module, number)
    for number in [n for n, hook in module._forward_pre_hooks.items() if isinstance(_owner(hook), Outputs)]:
        del module._forward_pre_hooks[number]
    return found


def _owner(hook: Any) -> Any:
    return getattr(hook, "__self__", None)


def put_watch(module: nn.Module, hooks: list[Outputs | None]) -> None:
    """Undo :func:`take_watch`."""
    for outputs in hooks:
        if outputs is None:
            module.register_forward_hook(_unshare, with_kwargs=True, prepend=True)
        else:
            module.register_forward_pre_hook(outputs.begin)
            module.register_forward_hook(outputs.end, always_call=True)


def _unshare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Gives an output memory of its own if hooks of others run next on the module, because they may write to it."""
    if len(module._forward_hooks) == 1 and not module._backward_hooks and not module._backward_pre_hooks:
        return None
    if not (
        module._backward_hooks or module._backward_pre_hooks or any(map(_may_write, module._forward_hooks.values()))
    ):
        return None
    inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if type(output) in (tuple, list):
        return type(output)(_own_memory(value, inputs) for value in output)
    return _own_memory(output, inputs)


def _may_write(hook: Any) -> bool:
    """Whether a hook is neither ours nor one of a library that only reads."""
    function = getattr(hook, "func", hook)  # of a partial
    home = getattr(function, "__module__", None) or ""
    return hook is not _unshare and not home.startswith(("layershed.", "transformers.utils.", "torch.distributed."))


def _own_memory(value: Any, inputs: list[Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return value
    if any(value is given for given in inputs):
        return value.clone()
    if value.numel() > 1 and not any(value.stride()):
        return zeros_after(next((given for given in inputs if given.shape == value.shape), value))
    return value


class RunningPass(local):
    """What the hooks of :class:`Outputs` note during a forward pass; each thread has its own.

    A copy begins empty. It is no ContextVar, because torch.compile does not trace one.

    Attributes:
        outermost: The id of the model that was called, within which others run; None between two passes.
        full: Entries without gaps that the inner models gave, each with those that the outermost one gives.
    """

    def __init__(self) -> None:
        self.outermost: int | None = None
        self.full: list[tuple[tuple[Any, ...], tuple[Any, ...]]] = []

    def __reduce__(self) -> tuple[type[RunningPass], tuple[()]]:
        return RunningPass, ()


class Outputs:
    """Hooks of the models within a transformer. Their caller finds None in an extra output where nothing ran.

    A model that calls another one (a causal language model its body) gets the entries of what ran, as of a model with
    fewer sublayers, because it may compute with them: a load-balancing loss is that of the kept routers. If none is
    left, it gets one entry of zeros, as a router without weights gives.

    Args:
        shapes: By name of the output, number of dimensions and last size of an entry.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        self._shapes = shapes
        self._pass = RunningPass()

    def begin(self, model: nn.Module, _args: object) -> None:
        """Before a model. One that was interrupted, so that no hook ran after it, begins anew."""
        if self._pass.outermost is None or self._pass.outermost == id(model):
            self._pass.outermost, self._pass.full = id(model), []

    def end(self, model: PreTrainedModel, _args: object, output: Any) -> Any:
        """After a model, also if it failed."""
        inner = self._pass.outermost != id(model)
        if isinstance(output, dict):
            for key in [key for key in self._shapes if key in output]:
                output[key] = self._entries(model, key, output, inner)
        if inner:
            return None
        full, self._pass.full, self._pass.outermost = self._pass.full, [], None
        if isinstance(output, dict):
            for key, value in list(output.items()):
                if type(value) is tuple:
                    output[key] = _in_place(value, full)
        return tuple(_in_place(value, full) for value in output) if type(output) is tuple else None

    def _entries(self, model: PreTrainedModel, key: str, output: Mapping[str, Any], inner: bool) -> Any:
        entries = output[key]
        if not isinstance(entries, tuple) or all(entry is not None for entry in entries):
            return entries
        kept = tuple(entry for entry in entries if entry is not None)
        if not kept and key.endswith("attentions") and model.config._attn_implementation != "eager":
            return ()  # no other kind of attention returns weights
        if not inner:
            return entries
        ndim, size = self._shapes[key]
        if not kept and size:
            hidden = next(value for value in output.values() if isinstance(value, Tensor))
            kept = (hidden.new_zeros((*hidden.shape[:-1], size)),)
            kept = (kept[0].flatten(0, 1),) if ndim == 2 else kept
        self._pass.full.append((kept, entries))
        return kept


def _in_place(value: Any, full: list[tuple[tuple[Any, ...], tuple[Any, ...]]]) -> Any:
    if type(value) is not tuple:
        return value
    entries = next((entries for kept, entries in full if entries and _same(kept, value)), value)
    # empty tensors of modules that were asked
    gaps = [isinstance(entry, Tensor) and entry.ndim > 0 and not any(entry.shape) for entry in entries]
    return tuple(None if gap else entry for gap, entry in zip(gaps, entries, strict=True)) if any(gaps) else entries


def _same(kept: tuple[Any, ...], value: tuple[Any, ...]) -> bool:
    """Whether both hold the same tensors. torch.compile may rebuild a tuple, so the tuples themselves may differ."""
    return len(kept) == len(value) and all(one is other for one, other in zip(kept, value, strict=True))
