"""Arguments of the wrong kind, refused in a sentence before anything is done; one check for each kind."""

from __future__ import annotations

import os
from collections.abc import Iterable
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any

from layershed.errors import LayershedError


def as_path(value: Any, what: str, error: type[LayershedError]) -> Path:
    """A path, with the home folder for a ``~`` at its beginning.

    Args:
        value: What the caller gave.
        what: Its name, for the message.
        error: The class of the error.
    """
    if isinstance(value, str | PathLike) and not isinstance(value, bytes):
        if not str(value):
            raise error(f"{what} must be a path, got an empty one. Give '.' for the current folder.")
        return Path(os.path.expanduser(value))
    raise error(f"{what} must be a path (str or Path), got {shown(value)}.")


def check_number(value: Any, what: str, error: type[LayershedError], *, whole: bool = False) -> None:
    """Refuse what is no number, or no whole one; arguments as of :func:`as_path`."""
    if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
        raise error(f"{what} must be {'a whole number' if whole else 'a number'}, got {shown(value)}.")


def check_most(value: Any, what: str, error: type[LayershedError]) -> None:
    """Refuse a maximum number of batches that is neither None nor at least 1; arguments as of :func:`as_path`."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
        raise error(f"{what}={value!r}: it must be at least 1, or None for all batches.")


def plain_number(value: Any) -> Any:
    """A number of numpy as one of Python, for files that hold primitives alone; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def check_kind(value: Any, kind: type | tuple[type, ...], what: str, error: type[LayershedError]) -> None:
    """Refuse what is of no given type; arguments as of :func:`as_path`."""
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise error(f"{what} must be a {' or '.join(each.__name__ for each in kinds)}, got {shown(value)}.")


def as_names(value: Any, what: str, error: type[LayershedError]) -> tuple[str, ...]:
    """Several names; arguments as of :func:`as_path`."""
    names = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes) else None
    if names is None or not all(isinstance(name, str) for name in names):
        raise error(f"{what} must be a list of names, got {shown(value)}.")
    return names


def shown(value: Any) -> str:
    """A value in an error, shortened."""
    return f"{value!r:.60} ({type(value).__name__})"
