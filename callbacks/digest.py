"""Whether two batches are the same, told by a few characters that a checkpoint can hold."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def digest(batch: Any) -> str:
    """A number for the tensors, arrays and plain values in a nest of them; of other objects only their types count."""
    found = hashlib.sha256()

    def add(part: Any) -> None:
        found.update(type(part).__name__.encode())
        if isinstance(part, Mapping):
            for name, value in part.items():
                add(name)
                add(value)
        elif isinstance(part, list | tuple):
            for value in part:
                add(value)
        elif isinstance(part, torch.Tensor) and part.layout == torch.strided and not part.is_quantized:
            plain = part.detach().cpu().resolve_conj().resolve_neg().reshape(-1)
            found.update(str((part.dtype, part.shape)).encode() + plain.view(torch.uint8).numpy().tobytes())
        elif isinstance(part, np.ndarray | np.generic) and not part.dtype.hasobject:
            found.update(str((part.dtype, part.shape)).encode() + part.tobytes())
        elif isinstance(part, str | bytes | int | float | complex | None):
            found.update(repr(part).encode())

    add(batch)
    return found.hexdigest()
