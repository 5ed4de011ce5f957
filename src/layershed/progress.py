"""How far long work is. The functions of layershed print nothing: a program that shows progress listens. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")
Listener = Callable[[str, int | None, int | None], None]
"""Gets the name of the work, how much is done (None at its end), and how much there is (None if unknown)."""

_LISTENERS: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Within the context, report progress to the listener. Of several, the innermost gets the reports."""
    _LISTENERS.append(listener)
    try:
        yield
    finally:
        _LISTENERS.remove(listener)


def track(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items, and tell the listener after each.

    Args:
        items: What to work on.
        what: Name of the work, such as ``Scoring``.
        total: Number of items; None if unknown.
    """
    if not _LISTENERS:
        yield from items
        return
    tell = _LISTENERS[-1]
    tell(what, 0, total)
    try:
        for done, item in enumerate(items, start=1):
            yield item
            tell(what, done, total)
    finally:
        tell(what, None, total)


def least(batches: object, most: int | None) -> int | None:
    """The number of batches if at most so many are taken; None if it is unknown, as of a generator."""
    try:
        number = len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # a loader over an iterable dataset
        number = None
    return most if number is None else number if most is None else min(most, number)
