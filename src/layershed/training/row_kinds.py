"""Whether the rows of a source are text or conversations, by their columns."""

from __future__ import annotations

from typing import Any

from layershed.errors import DataError
from layershed.training.chat_rows import ChatRows
from layershed.training.conversations import find_columns
from layershed.training.sources import Source
from layershed.training.text_rows import TextRows


def rows_of(
    source: Source,
    rows: Any,
    names: tuple[str, str, str | None],
    split: tuple[float, int],
    *,
    block_size: int,
    mask_prompts: bool,
) -> TextRows | ChatRows:
    """Text if there is the text column; else conversations.

    Args:
        source: Where the rows come from.
        rows: The rows, of which the columns are read.
        names: Names of the columns of text, of prompts and of responses (None for ``response`` or ``completion``). A
            pair by other names than these, or ``messages`` for the text, means conversations.
        split: Share of the rows to hold out, and the seed of the choice.
        block_size: Tokens per sequence.
        mask_prompts: Whether only the answers have labels.

    Raises:
        DataError: If the columns are missing; names those that there are.
    """
    text, prompt, response = names
    found = list(rows.column_names or next(iter(rows), {}))
    own_pair = prompt != "prompt" or response is not None
    columns = find_columns(found, prompt, response) if own_pair or text in ("text", "messages") else None
    if text in found and text != "messages" and not own_pair:
        return TextRows(source, text, block_size, *split)
    if columns is not None:
        return ChatRows(source, columns, block_size, *split, mask_prompts)
    there = ", ".join(found) or "(no columns)"
    if own_pair:
        pair = " and ".join(map(repr, (prompt, response or "response")))
        raise DataError(
            f"{source}: there are no columns {pair}; set prompt_column and response_column to two of {there}."
        )
    chat = "" if text != "text" else "; conversations are in columns messages, or prompt and response"
    raise DataError(f"{source}: there is no column {text!r}; set text_column to one of {there}{chat}.")
