"""The place that a warning names: outside layershed, where it shows no line of ours.

Callbacks are called by Lightning, whose warnings show no line of source either.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

_INSIDE = ("layershed", "contextlib")


def levels_outside() -> int:
    """The ``stacklevel`` by which a function's own ``warnings.warn`` names the nearest caller outside layershed."""
    frame, levels = sys._getframe(1), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _INSIDE:
        frame, levels = frame.f_back, levels + 1
    return levels


def naming_the_outside(rank_zero_warn: Callable[..., None]) -> Callable[[str], None]:
    """Lightning's ``rank_zero_warn`` with that place; its own level 3 is its caller."""

    def warn(message: str) -> None:
        rank_zero_warn(message, stacklevel=levels_outside() + 3)

    return warn
