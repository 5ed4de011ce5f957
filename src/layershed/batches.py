"""What a batch of text is: a mapping with ``input_ids``, or the token ids themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layershed.errors import CalibrationError


def as_inputs(batch: Any, main: str = "input_ids") -> dict[str, Any] | None:
    """The batch as keyword arguments of a transformer, or None if it is no batch.

    Args:
        batch: A mapping with the model's main input, or that input alone, such as token ids of shape (batch, tokens).
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
    """The inputs that have one of the names; tensors are moved to the device."""
    wanted = set(names)
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
        if name in wanted
    }


def describe(batch: Any) -> str:
    """A description of a wrong batch, for an error."""
    if isinstance(batch, Mapping):
        return f"a mapping with the keys {', '.join(sorted(map(str, batch))) or 'none'}"
    if isinstance(batch, Tensor):
        return f"a tensor of shape {tuple(batch.shape)} and type {batch.dtype}"
    return f"a {type(batch).__name__}"


def model_inputs(batch: Any, transformer: nn.Module) -> dict[str, Any]:
    """The inputs that a transformer takes from a batch, on its device, with its cache switched off.

    Raises:
        CalibrationError: If the batch does not hold what the transformer reads.
    """
    names = list(inspect.signature(transformer.forward).parameters)
    main = getattr(transformer, "main_input_name", names[0])
    inputs = as_inputs(batch, main)
    if inputs is None:
        what = "token ids of shape (batch, tokens)" if main == "input_ids" else "that tensor itself"
        raise CalibrationError(f"A batch must be a mapping with {main}, or {what}; got {describe(batch)}.")
    if "decoder_input_ids" in names and "decoder_input_ids" not in inputs:
        inputs = {**inputs, **_decoder_inputs(inputs, transformer)}
    without_cache = {"use_cache": False} if "use_cache" in names else {}
    known = set(names) - {"labels", "logits_to_keep", "use_cache"}
    return {**select(inputs, known, next(transformer.parameters()).device), **without_cache}


def _decoder_inputs(inputs: Mapping[str, Any], transformer: nn.Module) -> dict[str, Any]:
    """The inputs of a decoder in training: its labels, shifted by one."""
    labels = inputs.get("labels")
    shift = getattr(transformer, "prepare_decoder_input_ids_from_labels", None)
    if labels is None or shift is None:
        raise CalibrationError(
            f"{type(transformer).__name__} has a decoder: a batch must also hold decoder_input_ids, or labels."
        )
    return {"decoder_input_ids": shift(labels=labels), "decoder_attention_mask": labels != -100}
