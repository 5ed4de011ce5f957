"""What a Lightning checkpoint says about a model's structure: what is dropped, quantized and adapted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from layershed.discovery import find_transformer
from layershed.errors import CheckpointError, LayershedError, PlanError
from layershed.plan import Drop, DropPlan
from layershed.quantization import Quantized, dequantize, quantization_of, quantize_as
from layershed.recovery import checked_settings, inject_at, lora_settings, remove_lora
from layershed.surgery import bypass, bypassed_sublayers, restore

CHECKPOINT_KEY = "layershed"
_PARTS = {"dropped", "quantized", "adapters"}


def write_structure(checkpoint: dict[str, Any], model: nn.Module, *, name: str | None = None) -> None:
    """Note in a Lightning checkpoint what is bypassed, quantized and adapted, as plain primitives.

    Args:
        checkpoint: The checkpoint that is being written.
        model: The module that holds the transformer.
        name: Path of the transformer inside it, needed where it holds more than one.
    """
    drops = tuple(Drop(sublayer) for sublayer in bypassed_sublayers(model))
    transformer = _transformer(model, name)
    quantized = None if transformer is None else quantization_of(transformer)
    noted = {
        "dropped": DropPlan(drops).to_dict() if drops else None,
        "quantized": None if quantized is None else quantized.to_dict(),
        "adapters": None if transformer is None else lora_settings(transformer),
    }
    if any(noted.values()):
        checkpoint[CHECKPOINT_KEY] = noted


def apply_structure(checkpoint: Mapping[str, Any], model: nn.Module, *, name: str | None = None) -> None:
    """Bring the model into the state that a checkpoint notes, so that its weights fit strictly.

    Args:
        checkpoint: A checkpoint that :func:`write_structure` has seen, or any other.
        model: The module that holds the transformer.
        name: Path of the transformer inside it, needed where it holds more than one.

    Raises:
        CheckpointError: If the checkpoint says what this model cannot become.
    """
    noted = checkpoint.get(CHECKPOINT_KEY) or dict.fromkeys(_PARTS)
    if not isinstance(noted, Mapping) or noted.keys() != _PARTS:
        raise CheckpointError("What the checkpoint says under 'layershed' is of another version; train anew.")
    if not any(noted.values()) and not has_structure(model, name=name):
        return
    transformer: Any = find_transformer(model, name=name)
    adapters = noted["adapters"]
    try:
        wanted = set(DropPlan.from_dict(noted["dropped"])) if noted["dropped"] else set()
        quantized = None if noted["quantized"] is None else Quantized.from_dict(noted["quantized"])
        wanted_adapters = None if adapters is None else checked_settings(adapters)
        present = lora_settings(transformer)
        if present is not None and (present != adapters or quantized != quantization_of(transformer)):
            remove_lora(transformer)
        _quantize_as(transformer, quantized)
        _drop(transformer, wanted)
        if wanted_adapters is not None:
            inject_at(transformer, *wanted_adapters)
    except PlanError as error:
        raise CheckpointError(f"The checkpoint's dropped sublayers do not fit this model: {error}") from None
    except (LayershedError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"The checkpoint's structure does not fit this model: {error}") from error


def has_structure(model: nn.Module, *, name: str | None = None) -> bool:
    """Whether anything of a model is bypassed, quantized or adapted."""
    noted: dict[str, Any] = {}
    write_structure(noted, model, name=name)
    return bool(noted)


def _transformer(model: nn.Module, name: str | None) -> Any:
    """The transformer, or None where there is none, or several and no name: nothing can have been done to it then."""
    try:
        return find_transformer(model, name=name)
    except LayershedError:
        return None


def _quantize_as(transformer: Any, wanted: Quantized | None) -> None:
    current = quantization_of(transformer)
    if current == wanted:
        return
    if current is not None:
        dequantize(transformer)
    if wanted is not None:
        quantize_as(transformer, wanted)


def _drop(transformer: nn.Module, wanted: set[Any]) -> None:
    present = set(bypassed_sublayers(transformer))
    if wanted - present:
        bypass(transformer, wanted)
    if present - wanted:
        restore(transformer, present - wanted)
