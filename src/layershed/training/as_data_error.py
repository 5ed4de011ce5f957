"""Turns errors of the Hugging Face libraries into one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from layershed.errors import DataError


class UnreadableError(DataError):
    """A library could not read what it was given."""


@contextmanager
def as_data_error(what: str, remedy: str = "") -> Iterator[None]:
    """Within the context, any error is an UnreadableError of one sentence: what, the reason, and the remedy."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # their back ends raise anything: tokenizers raises a bare Exception
        # for a broken file, the message of datasets gives no reason; its cause does
        reason = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
        raise UnreadableError(f"{what} ({reason.rstrip('.')}){remedy}.") from error
