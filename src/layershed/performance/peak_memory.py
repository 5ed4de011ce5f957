"""Peak memory of a stretch of work: the allocator's own figure on a GPU, every tensor counted on a CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@contextmanager
def watching_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Within the context, the call that it hands out tells the peak of what was allocated since it began, in bytes.

    Exact and repeatable, unlike a process's resident memory, which includes what the allocator keeps for later. On a
    CPU the work runs more slowly meanwhile, and what a kernel allocates for itself alone is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
    else:
        with _Allocations() as allocations:
            yield lambda: allocations.peak


class _Allocations(TorchDispatchMode):
    """Counts the bytes of every storage from the operation that makes it until nothing holds it any more."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for storage in {storage._cdata: storage for storage in _storages(result)}.values():
            if storage._cdata not in given:  # else a view of an argument, or the argument written over
                self._now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self._now)
        return result

    def _freed(self, size: int) -> None:
        self._now -= size


def _storages(values: Any) -> Iterator[UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
