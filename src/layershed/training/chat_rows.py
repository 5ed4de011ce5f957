"""Rows that hold conversations: checked, and turned into packed or single sequences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layershed.errors import ChatTemplateError, DataError
from layershed.integration.namespaces import rank_zero_warn
from layershed.training.chat import encode_conversation, shorten
from layershed.training.conversations import Columns, Conversation, RowError, conversation_of
from layershed.training.left_out import LeftOutRows
from layershed.training.packing import Made, pack_conversations, split_documents
from layershed.training.sources import Source
from layershed.training.tokenizer import padding_id

Pair = tuple[NDArray[np.int32], NDArray[np.int32]]
"""Token ids and labels of a conversation."""


class ChatRows:
    """Conversations, one per row.

    Args:
        source: Where they come from, for errors.
        columns: The columns that hold them.
        block_size: Most tokens of a conversation, and tokens of a packed sequence.
        val_fraction: Share to hold out where the source has no validation split.
        seed: Seed of that split.
        mask_prompts: Whether only the answers have labels.

    Attributes:
        packed: Whether several conversations share a sequence. False until somebody knows that the model keeps them
            apart.
    """

    is_chat = True

    def __init__(
        self,
        source: Source,
        columns: Columns,
        block_size: int,
        val_fraction: float,
        seed: int,
        mask_prompts: bool,
    ) -> None:
        self.source, self.columns, self.block_size = source, columns, block_size
        self.val_fraction, self.seed, self.mask_prompts = val_fraction, seed, mask_prompts
        self.packed, self._left_out = False, LeftOutRows()

    def check(self, rows: Any) -> Any:
        """The rows of a data set, after every one was read.

        Raises:
            DataError: If a row is no conversation, with its number and file.
        """
        for index, row in enumerate(rows):
            self.check_row(row, index)
        if len(rows) == 0:
            raise DataError(f"{self.source}: there is no conversation in it; give a source with conversations.")
        return rows

    def check_row(self, row: Mapping[str, Any], index: int) -> None:
        """Refuse a row that is no conversation.

        Raises:
            DataError: With its number and file.
        """
        self._conversation(row, index)

    def sequences(self, tokenizer: Any, rows: Any, held_out: Any, max_tokens: int | None) -> tuple[Made, Made]:
        """The sequences for training and for validation."""
        kept: Sequence[int] = range(len(rows))
        held, of_held = kept, held_out
        if held_out is None:
            if len(rows) < 2:
                raise DataError(f"{self.source}: there is only 1 conversation, and one is held out; give more.")
            kept, held = split_documents(len(rows), self.val_fraction, self.seed)
            of_held = rows
        pairs, cut = self._encoded(tokenizer, ((index, rows[index]) for index in kept))
        held_pairs, held_cut = self._encoded(tokenizer, ((index, of_held[index]) for index in held))
        if cut + held_cut:
            rank_zero_warn(
                f"{self.source}: {cut + held_cut} of {len(kept) + len(held)} conversations are longer than "
                f"block_size={self.block_size} tokens. Their beginnings are cut, their last answers stay. Raise "
                "block_size to keep them whole."
            )
        if max_tokens is not None:
            ends = accumulate(len(ids) for ids, _ in pairs)
            pairs = pairs[: sum(end <= max_tokens for end in ends)]
        train, val = (
            Made(self._laid_out(tokenizer, some), sum(len(ids) for ids, _ in some)) for some in (pairs, held_pairs)
        )
        return train, val

    def check_size(self, train: Made, val: Made, batch_size: int, devices: int) -> None:
        """Refuse too few conversations for one training batch on every device.

        Raises:
            DataError: If there are too few.
        """
        if len(train.sequences) < batch_size * devices:
            what = f"sequences of {self.block_size} tokens" if self.packed else "conversations"
            raise DataError(
                f"{self.source}: there are {len(train.sequences)} training {what}, but one batch needs "
                f"{batch_size * devices} (batch_size={batch_size} times {devices} device(s)); give more conversations, "
                "or lower batch_size."
            )

    def window(
        self, tokenizer: Any, rows: Sequence[tuple[int, Mapping[str, Any]]], rest: Sequence[int]
    ) -> tuple[list[dict[str, Any]], list[int]]:
        """The sequences of some streamed rows. No conversation continues in the next ones.

        A row that is no conversation is left out, with one warning: a long run does not end because of it.

        Args:
            tokenizer: The tokenizer.
            rows: Rows and their indices in the stream.
            rest: Not used.
        """
        pairs = []
        for index, row in rows:
            try:
                pair, _ = self._encode(tokenizer, row, index)
            except DataError as error:
                self._left_out.tell(error)
                continue
            pairs.append(pair)
        return self._laid_out(tokenizer, pairs), []

    def _laid_out(self, tokenizer: Any, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
        if self.packed:
            return pack_conversations(pairs, self.block_size, padding_id(tokenizer))
        return [{"input_ids": ids, "labels": labels} for ids, labels in pairs]

    def _encoded(self, tokenizer: Any, rows: Iterable[tuple[int, Mapping[str, Any]]]) -> tuple[list[Pair], int]:
        """All conversations, and how many of them were too long."""
        pairs, too_long = [], 0
        for index, row in rows:
            pair, cut = self._encode(tokenizer, row, index)
            pairs.append(pair)
            too_long += cut
        return pairs, too_long

    def _encode(self, tokenizer: Any, row: Mapping[str, Any], index: int) -> tuple[Pair, bool]:
        """Token ids and labels of a row, and whether it was cut."""
        conversation = self._conversation(row, index)
        try:
            whole = encode_conversation(tokenizer, conversation, mask_prompts=self.mask_prompts)
        except ChatTemplateError as error:
            raise ChatTemplateError(f"{self.source}: {self.source.place(index)}: {error}.") from error
        kept = shorten(whole, self.block_size)
        pair = (np.array(kept.input_ids, dtype=np.int32), np.array(kept.labels(self.mask_prompts), dtype=np.int32))
        return pair, kept is not whole

    def _conversation(self, row: Mapping[str, Any], index: int) -> Conversation:
        try:
            return conversation_of(row, self.columns)
        except RowError as error:
            raise DataError(f"{self.source}: {self.source.place(index)}: {error}.") from None
