"""Folders and files that appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import re
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

    Raises:
        ExportError: If the disk is full, or nothing can be written there.
    """
    folder = Path(folder)
    with as_export_error(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
            fresh = Path(beside) / folder.name
            fresh.mkdir()
            yield fresh
            _swap(fresh, folder, Path(beside) / "previous")


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all: a reader, and a killed run, never see half of it.

    Raises:
        ExportError: If the disk is full, or nothing can be written there.
    """
    path = Path(path)
    # not tempfile: its files are private to the user
    beside = path.with_name(f".{path.name}.partial")
    with as_export_error(path):
        try:
            beside.write_text(text, encoding="utf-8", newline="")
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


@contextmanager
def as_export_error(path: Path) -> Iterator[None]:
    """Turn what goes wrong on the disk into an error of one sentence.

    Raises:
        ExportError: If the disk is full, or nothing can be written there.
    """
    try:
        yield
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        state = "it is as it was" if path.exists() else "nothing is left of it"
        raise ExportError(
            f"{str(path)!r} could not be written ({reason}), and {state}; make room, or choose another place."
        ) from error


def check_free(folder: str | Path, *, mark: str, what: str, apart: Path | None = None) -> None:
    """Refuse, before anything is computed, a place where something else would be destroyed.

    Args:
        folder: Where something is to be written.
        mark: Name of a file that only what may be replaced has, beside safetensors weights.
        what: What it would be, for the message.
        apart: A folder that must not lie inside: that of the run, whose other files would go.

    Raises:
        ExportError: If it exists and is neither an empty folder nor one with that mark.
    """
    # resolved, as a path can lead through folders that are not there yet, and out of them again
    there = Path(folder).resolve()
    if apart is not None and apart.resolve().is_relative_to(there):
        raise ExportError(f"{str(folder)!r} is the run directory, or holds it; give the {what} a folder of its own.")
    above = next(path for path in (there, *there.parents) if path.exists())
    if above != there and not above.is_dir():
        raise ExportError(f"{str(folder)!r} cannot be made: {str(above)!r} is a file; choose another folder.")
    empty = there.is_dir() and not any(there.iterdir())
    saved = (there / mark).is_file() and any(there.glob("*.safetensors"))
    if there.exists() and not empty and not saved:
        raise ExportError(f"{str(folder)!r} exists and holds no {what}; choose another folder.")


def refuse_source(folder: Path, source: str | None) -> None:
    """Refuse to write a dropped model over the one that it came from.

    Raises:
        ExportError: If the folder is where the model was loaded from.
    """
    if source and Path(source).is_dir() and Path(source).resolve() == folder.resolve():
        raise ExportError(f"{str(folder)!r} holds the model that is being dropped from; choose another folder.")


def _reason(error: Exception) -> str | None:
    """What is wrong with the disk; None for any other error."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # safetensors and tokenizers, written in Rust, have errors of their own, with the system's number in them
    code = re.search(r"\bos error (\d+)\b|\bcode: (\d+)\b", str(error))
    number = int(code[1] or code[2]) if code else 0
    return os.strerror(number) if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS) else None


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
