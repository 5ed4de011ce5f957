"""Makes a batch of sequences: packed ones as they are, single conversations padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from layershed.training.chat import IGNORED


def collate(items: Sequence[Mapping[str, Any]], padding: int) -> dict[str, Tensor]:
    """A batch of int64 tensors of shape (B, T).

    Args:
        items: Sequences of one kind: text with ``input_ids`` alone, whose labels are the inputs; packed conversations
            with ``labels`` and ``position_ids``; or single conversations with ``labels``, which are padded on the right
            to the longest of the batch and get an ``attention_mask``.
        padding: Token id of the padding.
    """
    columns = {name: [torch.as_tensor(item[name], dtype=torch.int64) for item in items] for name in items[0]}
    if "labels" not in columns:
        input_ids = torch.stack(columns["input_ids"])
        return {"input_ids": input_ids, "labels": input_ids.clone()}
    if "position_ids" in columns:
        return {name: torch.stack(rows) for name, rows in columns.items()}
    ids, labels = columns["input_ids"], columns["labels"]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=padding),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
    }


def without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a model reads of a batch to predict: the token ids, with the positions or the mask that keep rows apart."""
    return {name: value for name, value in batch.items() if name != "labels"}
