"""Probes without the autocast that a wrapped forward enters, also of models that only run under one.

accelerate and transformers' Trainer put an autocast around a model's forward. The trial of a block runs outside of it,
in another precision than the recorded pass, and would not reproduce it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import reduce
from threading import Lock

import torch
from torch import nn

_OFF: ContextVar[bool] = ContextVar("layershed_without_autocast", default=False)
_LOCK = Lock()
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ENTER = torch.autocast.__enter__
_users = 0


@contextmanager
def without_autocast(_transformer: nn.Module) -> Iterator[None]:
    """Within the context, an autocast that this thread enters has no effect; torch offers no switch for that."""
    _count(1)
    token = _OFF.set(True)
    try:
        yield
    finally:
        _OFF.reset(token)
        _count(-1)


@contextmanager
def no_ambient_autocast(transformer: nn.Module) -> Iterator[None]:
    """Within the context, an autocast that the caller entered has no effect."""
    devices = {parameter.device.type for parameter in transformer.parameters()} | {"cpu"}
    with ExitStack() as contexts:
        for device in filter(torch.amp.is_autocast_available, sorted(devices)):
            contexts.enter_context(torch.autocast(device, enabled=False))
        yield


def has_mixed_dtypes(transformer: nn.Module) -> bool:
    """Whether the floating-point weights of a model have several dtypes, as those of a model for autocast may have."""
    return len({tensor.dtype for tensor in _floating(transformer)}) > 1


@contextmanager
def in_one_dtype(transformer: nn.Module) -> Iterator[None]:
    """Within the context all floating-point weights have the widest dtype among them, in copies.

    A model whose layers differ in dtype runs under an autocast alone. Its structure is the same in one dtype.
    """
    tensors = list(_floating(transformer))
    widest = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    before = [(tensor, tensor.data) for tensor in tensors if tensor.dtype != widest]
    try:
        for tensor, data in before:
            tensor.data = data.to(widest)
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


def _floating(transformer: nn.Module) -> Iterator[torch.Tensor]:
    """Plain floating-point weights and buffers; packed and sharded ones stay as they are."""
    for tensor in (*transformer.parameters(), *transformer.buffers()):
        if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.dtype in _DTYPES:
            yield tensor


def _count(change: int) -> None:
    global _users
    with _LOCK:
        _users += change
        torch.autocast.__enter__ = _enter if _users else _ENTER  # type: ignore[method-assign]


def _enter(context: torch.autocast) -> object:
    if not _OFF.get():  # another thread
        return _ENTER(context)
    enabled, context._enabled = context._enabled, False
    try:
        return _ENTER(context)
    finally:
        context._enabled = enabled  # a decorator enters the same object again
