"""Rows of a stream that are wrong: they are left out, so that a long run does not end because of one."""

from __future__ import annotations

import warnings

from layershed.errors import DataError


class LeftOutRows:
    """Tells of the first row that is left out; later ones are left out without a word."""

    def __init__(self) -> None:
        self._told = False

    def tell(self, error: DataError) -> None:
        """Warn once.

        Args:
            error: What is wrong with the row.
        """
        if not self._told:
            warnings.warn(f"{error} The row is left out, and so are later rows like it.", stacklevel=3)
        self._told = True
