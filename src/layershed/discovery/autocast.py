"""Probes without the autocast that a wrapped forward enters.

accelerate and transformers' Trainer put an autocast around a model's forward. The trial of a block runs outside of it,
in another precision than the recorded pass, and would not reproduce it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from threading import Lock

import torch
from torch import nn

_OFF: ContextVar[bool] = ContextVar("layershed_without_autocast", default=False)
_LOCK = Lock()
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
