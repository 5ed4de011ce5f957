"""Measures the peak memory of a piece of work: by the allocator on a GPU, by counting tensors on a CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode

from layershed.devices import module_of


@contextmanager
def watching_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the peak of the bytes allocated since the context began.

    The peak is exact and repeatable. A process's resident memory is not, as the allocator keeps freed memory. On a CPU
    the work runs more slowly within the context, and a kernel's own temporary memory is not counted.
    """
    module = module_of(device, "synchronize", "memory_allocated", "reset_peak_memory_stats", "max_memory_allocated")
    if module is not None:
        module.synchronize(device)
        before = module.memory_allocated(device)
        module.reset_peak_memory_stats(device)
        yield lambda: module.max_memory_allocated(device) - before
    else:
        with _Allocations() as allocations:
            yield lambda: allocations.peak


class _Allocations(TorchDispatchMode):
    """Counts the bytes of every storage from its creation until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for storage in {storage._cdata: storage for storage in _storages(result)}.values():
            if storage._cdata not in given:  # else a view of an argument, or the argument itself, changed in place
                self._now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self._now)
        return result

    def _freed(self, size: int) -> None:
        self._now -= size


def _storages(values: Any) -> Iterator[UntypedStorage]:
    """Of what an operation takes or returns: tensors, and lists of them. torch's own tree takes twice as long."""
    if isinstance(values, Tensor):
        yield values.untyped_storage()
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _storages(value)
    elif isinstance(values, dict):
        yield from _storages(list(values.values()))
