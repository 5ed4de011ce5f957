"""Writing folders and files whole or not at all, whatever interrupts the writing."""

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
    """Give a fresh folder to fill. It replaces the given folder at the end; after an error the old one is still there.

    Args:
        folder: The folder to replace; its parents are created.

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
    """Write a file whole or not at all: no reader sees half of it, and no killed run leaves half.

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
    """Turn an error of the disk into an error of one sentence.

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
    """Refuse a place where something else would be destroyed; call it before anything is computed.

    Args:
        folder: The folder to be written.
        mark: A file name. A folder with this file and safetensors weights may be replaced.
        what: What the folder is to hold, for the message.
        apart: A folder that must not lie inside: that of the run, whose other files would be lost.

    Raises:
        ExportError: If the folder exists, is not empty and has no such mark.
    """
    # resolved: a path can lead into folders that do not exist yet, and out of them again
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
    """Refuse to write a dropped model over the model that it came from.

    Raises:
        ExportError: If the folder is where the model was loaded from.
    """
    if source and Path(source).is_dir() and Path(source).resolve() == folder.resolve():
        raise ExportError(f"{str(folder)!r} holds the model that is being dropped from; choose another folder.")


def _reason(error: Exception) -> str | None:
    """The disk's reason, or None for an error of another kind."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # safetensors and tokenizers are written in Rust: their own errors quote the system's number
    code = re.search(r"\bos error (\d+)\b|\bcode: (\d+)\b", str(error))
    number = int(code[1] or code[2]) if code else 0
    return os.strerror(number) if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS) else None


def _swap(fresh: Path, folder: Path, previous: Path) -> None:
    """Replace a folder by another, or leave it where it was."""
    replaced = folder.exists()
    if replaced:
        folder.rename(previous)
    try:
        fresh.rename(folder)
    except OSError:
        if replaced:
            previous.rename(folder)
        raise
