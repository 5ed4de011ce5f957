"""What a batch of text is: a mapping with ``input_ids``, or the token ids themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def as_inputs(batch: Any, main: str = "input_ids") -> dict[str, Any] | None:
    """The batch as keyword arguments of a transformer, or None if it is none.

    Args:
        batch: A mapping with the model's main input, or that itself: token ids of shape (batch, tokens), say.
        main: Name of the main input; ``input_ids`` of text, ``pixel_values`` of pictures.
    """
    if isinstance(batch, Mapping):
        return dict(batch) if main in batch else None
    if isinstance(batch, Tensor) and main != "input_ids":
        return {main: batch}
    if isinstance(batch, Tensor) and batch.ndim == 2 and batch.dtype in (torch.int64, torch.int32):
        return {"input_ids": batch}
    return None


def select(inputs: Mapping[str, Any], names: Iterable[str], device: torch.device) -> dict[str, Any]:
    """Those of the inputs that have one of the names, tensors among them on the device."""
    wanted = set(names)
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
        if name in wanted
    }


def describe(batch: Any) -> str:
    """What a batch is instead, for an error's sentence."""
    if isinstance(batch, Mapping):
        return f"a mapping with the keys {', '.join(sorted(map(str, batch))) or 'none'}"
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)} and type {batch.dtype}"
    return f"a {type(batch).__name__}"
