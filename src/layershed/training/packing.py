"""Packs documents into sequences of tokens and splits off held-out documents. Uses no files and no loaders."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any


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


class Packer:
    """Packs documents into sequences and keeps the remaining tokens for the next call.

    Args:
        tokenizer: A transformers tokenizer. Its end-of-text token, if it has one, ends every document.
        block_size: Tokens per sequence.
        limit: Largest number of sequences; None for no limit.
    """

    def __init__(self, tokenizer: Any, block_size: int, limit: int | None) -> None:
        self.tokenizer, self.block_size, self.limit = tokenizer, block_size, limit
        self.end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.rest: list[int] = []
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
