"""Rows that hold text: checked, and packed into sequences of one length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layershed.errors import DataError
from layershed.training.left_out import LeftOutRows
from layershed.training.packing import Made, Packer, held_out_count, split_documents
from layershed.training.sources import Source


class TextRows:
    """Documents, one per row.

    Args:
        source: Where they come from, for errors.
        column: The column with the text.
        block_size: Tokens per sequence.
        val_fraction: Share to hold out where the source has no validation split.
        seed: Seed of that split.
    """

    is_chat = False

    def __init__(self, source: Source, column: str, block_size: int, val_fraction: float, seed: int) -> None:
        self.source, self.column, self.block_size = source, column, block_size
        self.val_fraction, self.seed = val_fraction, seed
        self._left_out = LeftOutRows()

    def check(self, rows: Any) -> Any:
        """The rows of a data set that hold text, reduced to the text column.

        Raises:
            DataError: If the column holds something else, or no row has text.
        """
        kind = getattr(rows.features[self.column], "dtype", "nested")
        if kind not in ("string", "large_string"):
            raise DataError(
                f"{self.source}: the column {self.column!r} must hold text, but its type is {kind}; name another."
            )
        texts = rows.select_columns(self.column).filter(
            _have_text, batched=True, input_columns=self.column, keep_in_memory=True, load_from_cache_file=False
        )
        if len(texts) == 0:
            raise DataError(f"{self.source}: there is no text in it; give a source with text.")
        return texts

    def check_row(self, row: Mapping[str, Any], index: int) -> None:
        """Refuse a streamed row whose text is something else; a row without text is only left out.

        Raises:
            DataError: With the number of the row.
        """
        value = row.get(self.column)
        if value is not None and not isinstance(value, str):
            raise DataError(
                f"{self.source}: {self.source.place(index)}: the column {self.column!r} must hold text, but it is a "
                f"{type(value).__name__}; name another."
            )

    def sequences(self, tokenizer: Any, documents: Any, held_out: Any, max_tokens: int | None) -> tuple[Made, Made]:
        """The sequences for training and for validation."""
        limit = None if max_tokens is None else max_tokens // self.block_size
        if held_out is None and len(documents) == 1:
            whole, tokens = self._pack(tokenizer, documents, None)
            last = held_out_count(len(whole), self.val_fraction) if len(whole) > 1 else 0
            first = len(whole) - last
            val, val_tokens = whole.select(range(first, len(whole))), last * self.block_size
            train = whole.select(range(first if limit is None else min(limit, first)))
            train_tokens = tokens - val_tokens
        else:
            if held_out is None:
                kept, held = split_documents(len(documents), self.val_fraction, self.seed)
                documents, held_out = documents.select(kept), documents.select(held)
            train, train_tokens = self._pack(tokenizer, documents, limit)
            val, val_tokens = self._pack(tokenizer, held_out, None)
        return Made(train, min(train_tokens, max_tokens or train_tokens)), Made(val, val_tokens)

    def check_size(self, train: Made, val: Made, batch_size: int, devices: int) -> None:
        """Refuse text that is too short for one training batch on every device and one validation sequence.

        Raises:
            DataError: If it is too short.
        """
        sequences = batch_size * devices
        if len(train.sequences) < sequences:
            raise DataError(
                f"{self.source}: there are {train.tokens} training tokens, but one batch needs "
                f"{sequences * self.block_size} (batch_size={batch_size} times block_size={self.block_size} times "
                f"{devices} device(s)); give more text, or lower one of them."
            )
        if len(val.sequences) == 0:
            raise DataError(
                f"{self.source}: there are {val.tokens} validation tokens, but one sequence needs "
                f"block_size={self.block_size}; give more text, raise val_fraction or lower block_size."
            )

    def window(
        self, tokenizer: Any, rows: Sequence[tuple[int, Mapping[str, Any]]], rest: Sequence[int]
    ) -> tuple[list[dict[str, list[int]]], list[int]]:
        """The sequences that some streamed rows complete, and the tokens that are left.

        A row whose text is something else is left out, with one warning: a long run does not end because of it.

        Args:
            tokenizer: The tokenizer.
            rows: Rows and their indices in the stream.
            rest: The tokens that the rows before them left.
        """
        texts = []
        for index, row in rows:
            try:
                self.check_row(row, index)
            except DataError as error:
                self._left_out.tell(error)
                continue
            if (row.get(self.column) or "").strip():
                texts.append(row[self.column])
        packer = Packer(tokenizer, self.block_size, rest=rest)
        packed = packer(texts)["input_ids"] if texts else []
        return [{"input_ids": ids} for ids in packed], packer.rest

    def _pack(self, tokenizer: Any, documents: Any, limit: int | None) -> tuple[Any, int]:
        """At most ``limit`` sequences, and the number of tokens they were packed from."""
        from datasets import Features, List, Value

        packer = Packer(tokenizer, self.block_size, limit)
        packed = documents.map(
            packer,
            batched=True,
            batch_size=100,
            input_columns=self.column,
            remove_columns=documents.column_names,
            features=Features({"input_ids": List(Value("int32"), length=self.block_size)}),
            keep_in_memory=True,
            load_from_cache_file=False,
        )
        return packed.with_format("torch"), packer.tokens


def _have_text(texts: Sequence[str | None]) -> list[bool]:
    return [bool(text and text.strip()) for text in texts]
