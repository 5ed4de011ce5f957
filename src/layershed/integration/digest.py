"""Whether two batches are the same, told by a few characters that a checkpoint can hold."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch


def digest(batch: Any) -> str:
    """A number for the tensors, arrays and plain values in a nest of them, and in the attributes of objects.

    What cannot be read counts by its type: nobody's batch ends a run here.
    """
    found = hashlib.sha256()
    with suppress(Exception):  # sparse and quantized tensors, lists that hold themselves, and whatever else there is
        for part in _parts(batch):
            found.update(part)
    return found.hexdigest()


def _parts(batch: Any) -> Iterator[Any]:
    """Bytes, or what has them."""
    yield type(batch).__name__.encode()
    if isinstance(batch, Mapping):
        yield from _parts(list(batch.items()))
    elif isinstance(batch, list | tuple):
        for each in batch:
            yield from _parts(each)
    elif isinstance(batch, torch.Tensor):
        yield str((batch.dtype, batch.shape)).encode()
        plain = batch.detach().cpu().resolve_conj().resolve_neg()
        # not contiguous(), which leaves the strides of a column of one row as they are
        plain = plain.clone(memory_format=torch.contiguous_format).reshape(-1)
        yield plain.view(torch.uint8).numpy()
    elif isinstance(batch, np.ndarray | np.generic):
        yield str((batch.dtype, batch.shape)).encode()
        yield b"" if batch.dtype.hasobject else batch.tobytes()
    elif isinstance(batch, str | bytes | int | float | complex | None):
        yield repr(batch).encode()
    elif hasattr(batch, "__dict__") and not isinstance(batch, type):
        yield from _parts(vars(batch))
