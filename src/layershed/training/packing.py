"""Packs documents and conversations into sequences of tokens, and splits off held-out rows. Pure."""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from layershed.training.chat import IGNORED


def split_documents(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the training documents and of the held-out documents, each ascending and never empty.

    Args:
        count: Number of documents, at least 2.
        fraction: Share to hold out, in (0, 1).
        seed: Seed of the choice.

    Example:
        >>> split_documents(4, 0.25, seed=0)
        ([0, 1, 2], [3])
    """
    held = set(random.Random(seed).sample(range(count), held_out_count(count, fraction)))
    return [index for index in range(count) if index not in held], sorted(held)


def held_out_count(count: int, fraction: float) -> int:
    """Number of items to hold out of ``count``: at least one and never all."""
    return min(count - 1, max(1, round(count * fraction)))


class Made(NamedTuple):
    """Sequences of a split.

    Args:
        sequences: The sequences, anything with a length and items.
        tokens: Number of the tokens that they were made of.
    """

    sequences: Any
    tokens: int


class Packer:
    """Packs documents into sequences and keeps the remaining tokens for the next call.

    Args:
        tokenizer: A transformers tokenizer. Its end-of-text token, if it has one, ends every document.
        block_size: Tokens per sequence.
        limit: Largest number of sequences; None for no limit.
        rest: Tokens that an earlier packer left.
    """

    def __init__(self, tokenizer: Any, block_size: int, limit: int | None = None, rest: Sequence[int] = ()) -> None:
        self.tokenizer, self.block_size, self.limit = tokenizer, block_size, limit
        self.end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.rest = list(rest)
        self.made = self.tokens = 0

    def __call__(self, texts: Sequence[str]) -> dict[str, list[list[int]]]:
        """The full sequences that these texts complete, as a column for ``datasets``."""
        if self.made == self.limit:
            return {"input_ids": []}
        # verbose=False: no warning about documents longer than the context, because they are cut into blocks below.
        encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        stream = self.rest + [token for ids in encoded for token in (*ids, *self.end)]
        self.tokens += len(stream) - len(self.rest)
        size = self.block_size
        count = len(stream) // size
        if self.limit is not None:
            count = min(count, self.limit - self.made)
        self.made += count
        self.rest = stream[count * size :]
        return {"input_ids": [stream[start : start + size] for start in range(0, count * size, size)]}


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Group items so that the lengths of a group add up to at most ``size``: best fit, the longest first.

    Args:
        lengths: Lengths of the items, each at most ``size``.
        size: Largest sum of a group.

    Returns:
        Indices of the items, by group; every item is in one group. Groups, and indices in a group, are in the order of
        their first items.

    Example:
        >>> best_fit([3, 5, 2, 4], size=8)
        [[0, 1], [2, 3]]
    """
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # free tokens and number of each group, ascending
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = bisect_left(room, (lengths[index], 0))
        free, group = room.pop(place) if place < len(room) else (size, len(groups))
        if group == len(groups):
            groups.append([])
        groups[group].append(index)
        insort(room, (free - lengths[index], group))
    return sorted(sorted(group) for group in groups)


def pack_conversations(
    conversations: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]], size: int, padding: int
) -> list[dict[str, NDArray[np.int32]]]:
    """Put whole conversations into sequences of ``size`` tokens.

    The positions begin again at 0 with each conversation. transformers then lets a token attend only to its own
    conversation, if it is given no attention mask. What is left of a sequence is padding: no loss, position 0.

    Args:
        conversations: Token ids and labels of each, at most ``size`` tokens.
        size: Tokens per sequence.
        padding: Token id of the padding.

    Returns:
        Sequences with ``input_ids``, ``labels`` and ``position_ids``, of shape (size) each.
    """
    sequences = []
    for group in best_fit([len(ids) for ids, _ in conversations], size):
        packed = {
            "input_ids": np.full(size, padding, np.int32),
            "labels": np.full(size, IGNORED, np.int32),
            "position_ids": np.zeros(size, np.int32),
        }
        start = 0
        for index in group:
            ids, labels = conversations[index]
            end = start + len(ids)
            packed["input_ids"][start:end] = ids
            # the first token has no label: what stands before it is another conversation
            packed["labels"][start + 1 : end] = labels[1:]
            packed["position_ids"][start:end] = np.arange(len(ids))
            start = end
        sequences.append(packed)
    return sequences
