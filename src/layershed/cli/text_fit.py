"""Whether the text fits the model: known from the model's config, so before its weights are loaded."""

from __future__ import annotations

from typing import Any

import torch

from layershed.errors import DataError, LayershedError
from layershed.saving.load_model import build_model
from layershed.training.text_data import TextData


def check_before_loading(data: TextData, model: Any, *, packed: bool = True) -> None:
    """Refuse text that the model cannot read, by the model's config alone.

    Args:
        data: The text.
        model: The parsed options of the model: pretrained and config.
        packed: Whether the command reads packed sequences.

    Raises:
        DataError: If the model has too few embeddings or positions, or the tokenizer cannot be loaded.
    """
    try:
        with torch.device("meta"):
            skeleton = build_model(model.get("pretrained"), model.get("config"))
    except LayershedError:
        return  # it has no skeleton, as some quantized models; or it cannot be built, and loading it says why
    check_fit(data, skeleton.config, packed=packed)


def check_fit(data: TextData, config: Any, *, packed: bool = True) -> None:
    """Refuse text for which a model has too few embeddings or positions.

    Args:
        data: The text.
        config: The model's config.
        packed: Whether the command reads packed sequences.

    Raises:
        DataError: If it has, or the tokenizer cannot be loaded.
    """
    config = config.get_text_config()
    if data.vocab_size > config.vocab_size:
        raise DataError(
            f"The tokenizer has {data.vocab_size} ids and the model only {config.vocab_size}; "
            "set data.tokenizer to the model's own, or model.config.vocab_size to at least that many."
        )
    places = getattr(config, "max_position_embeddings", None)
    if packed and places is not None and data.block_size > places:
        raise DataError(f"data.block_size={data.block_size} exceeds the model's {places} positions; lower it.")
