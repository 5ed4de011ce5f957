"""Folders that appear whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layershed.errors import ExportError


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """A fresh folder to fill, which takes the given one's place at the end; after an error the old one is still there.

    Args:
        folder: Where it shall stand; its parents are made.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
        fresh = Path(beside) / folder.name
        fresh.mkdir()
        yield fresh
        _swap(fresh, folder, Path(beside) / "previous")


def check_free(folder: str | Path, *, mark: str, what: str) -> None:
    """Refuse, before anything is computed, a place where something else would be destroyed.

    Args:
        folder: Where something is to be written.
        mark: Name of a file that only what may be replaced has, beside safetensors weights.
        what: What it would be, for the message.

    Raises:
        ExportError: If it exists and is neither an empty folder nor one with that mark.
    """
    folder = Path(folder)
    empty = folder.is_dir() and not any(folder.iterdir())
    saved = (folder / mark).is_file() and any(folder.glob("*.safetensors"))
    if folder.exists() and not empty and not saved:
        raise ExportError(f"{str(folder)!r} exists and holds no {what}; choose another folder.")


def _swap(fresh: Path, folder: Path, previous: Path) -> None:
    """Put a folder in place of another, or leave the other where it was."""
    replaced = folder.exists()
    if replaced:
        folder.rename(previous)
    try:
        fresh.rename(folder)
    except OSError:
        if replaced:
            previous.rename(folder)
        raise
