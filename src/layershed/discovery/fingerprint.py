"""Everything that can change the result of a probe, as one value that compares quickly.

Two fingerprints are equal only if the probe would see the same objects in the same state:

- modules with their classes, plain attributes, hooks and forwards,
- parameters and buffers by identity, shape, dtype and device; buffers that are single numbers by value,
- the config, the registered SublayerAdapter and torch's modes.

The fingerprint leaves out gradients and the numbers in the weights. It does not notice two
changes: the state of a hook's own object, and a method other than ``forward`` that is replaced on a class.
"""

from __future__ import annotations

import types
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from layershed.discovery.registry import registered_adapter

_DEPTH = 3  # objects inside objects further down count by identity alone
_PLAIN = {bool, int, float, complex, str, bytes, type(None), type(...), range, torch.dtype, torch.device, torch.Size}
_CONTAINERS = (dict, OrderedDict, set, list, tuple)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, partial, type)
_EMPTY = types.CellType()
# hooks that no forward pass without gradients runs
_UNSEEN = {
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
}
_HOOKS = {"_forward_hooks", "_forward_pre_hooks"}
# what a transformer that is a LightningModule itself belongs to, and the record of what is dropped from it
_OWNERS = {"_trainer", "_fabric", "_model_record"}


@dataclass(frozen=True)
class Fingerprint:
    """The state of a model. It is void once one of its objects is freed, as another object may get the same id.

    Args:
        key: The value to compare.
        objects: Weak references to all objects whose ids are in the key.
    """

    key: tuple[Any, ...]
    objects: tuple[weakref.ref[Any], ...]

    def is_alive(self) -> bool:
        """Whether every object still exists, so that no other one can have its id."""
        return all(reference() is not None for reference in self.objects)


def fingerprint(transformer: nn.Module) -> Fingerprint | None:
    """The fingerprint of a model in its present state. Call it where a probe would run.

    Returns:
        None if the result of a probe may depend on something that has no fingerprint.
    """
    if _len_torch_function_stack() or _len_torch_dispatch_stack():
        return None
    walk = _Walk()
    try:
        walk.add(_modes())
        walk.add(dict(ALL_ATTENTION_FUNCTIONS))
        walk.hooks(torch_module._global_forward_hooks.values())
        walk.hooks(torch_module._global_forward_pre_hooks.values())
        walk.add(registered_adapter(transformer))
        walk.add(transformer)
    except _NoFingerprintError:
        return None
    return Fingerprint(tuple(walk.key), tuple(walk.objects))


def _modes() -> tuple[Any, ...]:
    """The settings of torch that choose between operations; a probe runs without autocast."""
    attention = torch.backends.cuda
    return (
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        attention.flash_sdp_enabled(),
        attention.mem_efficient_sdp_enabled(),
        attention.math_sdp_enabled(),
        attention.cudnn_sdp_enabled(),
    )


class _NoFingerprintError(Exception):
    """The model holds an object that is indistinguishable from a later one at the same address."""


class _Walk:
    """Visits everything once; the key is flat, with lengths in it, because nested tuples cost more."""

    def __init__(self) -> None:
        self.key: list[Any] = []
        self.objects: list[weakref.ref[Any]] = []
        self._seen: set[int] = set()
        self._classes: set[type] = set()
        self._depth = 0

    def add(self, value: Any) -> None:
        kind = type(value)
        if kind in _PLAIN:
            self.key += (kind, value)
        elif kind in (dict, OrderedDict):
            self._mapping(value)
        elif kind in (list, tuple):
            self.key += (kind, len(value))
            for inner in value:
                self.add(inner)
        elif kind in (set, frozenset):
            self._set(value)
        elif isinstance(value, nn.Module):
            self._module(value)
        elif isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, _FUNCTIONS):
            self.hooks((value,))
        else:
            self._object(value)

    def hooks(self, functions: Iterable[Any]) -> None:
        """Functions by identity, and the plain values in their closures by value."""
        for function in functions:
            self._identify(function)
            for cell in getattr(function, "__closure__", None) or ():
                content = cell.cell_contents if cell != _EMPTY else None
                self.key += (type(content), content if type(content) in _PLAIN else id(content))

    def _identify(self, value: Any) -> bool:
        """Add an object's identity; returns whether it is met for the first time."""
        self.key.append(id(value))
        if id(value) in self._seen:
            return False
        try:
            self.objects.append(weakref.ref(value))
        except TypeError:
            raise _NoFingerprintError from None
        self._seen.add(id(value))
        return True

    def _mapping(self, mapping: dict[Any, Any]) -> None:
        self.key += (dict, len(mapping))
        for name, value in mapping.items():
            self.add(name)
            self.add(value)

    def _set(self, values: Iterable[Any]) -> None:
        walks = []
        for value in values:
            if type(value) not in _PLAIN:
                raise _NoFingerprintError
            walks.append((type(value), value))
        self.key.append(frozenset(walks))

    def _module(self, module: nn.Module) -> None:
        if not self._identify(module):
            return
        self._class(type(module))
        key = self.key
        for name, value in module.__dict__.items():
            kind = type(value)
            if kind in _PLAIN:
                key += (name, kind, value)
            elif name not in _UNSEEN and name not in _OWNERS and (kind not in _CONTAINERS or value):
                key.append(name)
                if name in _HOOKS:
                    self.hooks(value.values())
                else:
                    self.add(value)

    def _class(self, kind: type) -> None:
        """A class, and its forward, which may be replaced for all its modules at once."""
        self.key.append(id(kind))
        if kind not in self._classes:
            self._classes.add(kind)
            self._identify(kind)
            forward = getattr(kind, "forward", None)
            self.hooks(() if forward is None else (forward,))

    def _tensor(self, tensor: Tensor) -> None:
        if self._identify(tensor):
            self.key += (type(tensor), tensor.shape, tensor.dtype, tensor.device)
            if tensor.ndim == 0 and not (tensor.is_meta or isinstance(tensor, nn.Parameter | FakeTensor)):
                self.key.append(tensor.item())  # it may be what a branch is scaled by

    def _object(self, value: Any) -> None:
        """Some other object, such as a config, with its attributes."""
        first = self._identify(value)
        if first and self._depth < _DEPTH:
            self._class(type(value))
            self._depth += 1
            self._mapping(getattr(value, "__dict__", {}))
            if isinstance(value, dict):
                self._mapping(value)
            elif isinstance(value, list | tuple):
                self.add(list(value))
            self._depth -= 1
