"""importance.csv: rows are appended and not kept in memory.

A checkpoint notes the file's length, and a resumed run continues from there. Later rows are deleted, because the
resumed run takes their steps again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from layershed.files.atomic import as_export_error
from layershed.integration.run import IMPORTANCE_FILE

HEADER = b"step,block,kind,metric,value\n"
_CHUNK = 1 << 20
_LONGEST_ROW = 1 << 16


def begin(path: Path) -> None:
    """Write the header; an existing file is overwritten."""
    with as_export_error(path):
        path.write_bytes(HEADER)


def append(path: Path, rows: Iterable[str]) -> None:
    """Append rows, all of them or none."""
    before = path.stat().st_size if path.exists() else None
    with as_export_error(path):
        try:
            with path.open("ab") as file:
                file.writelines([*([HEADER] if before is None else []), *(f"{row}\n".encode() for row in rows)])
        except OSError:
            if before is None:
                path.unlink(missing_ok=True)
            else:
                os.truncate(path, before)
            raise


def note(path: Path) -> dict[str, Any]:
    """The file's path, length and last row, as primitives for a checkpoint; the file is synced to the disk first."""
    if not path.exists():
        begin(path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _LONGEST_ROW))
        last = file.read().splitlines(keepends=True)[-1]
    return {"file": os.path.abspath(path), "bytes": size, "last": last.decode()}


def take_up(noted: dict[str, Any], path: Path, checkpoint: str | os.PathLike[str] | None) -> bool:
    """Restore the file to its content at the checkpoint, from itself or from the noted file.

    Args:
        noted: The result of :func:`note`.
        path: The file of this run.
        checkpoint: Path of the checkpoint; if it was moved with its run directory, the file is searched there.

    Returns:
        Whether a file with the noted content was found.
    """
    for source in _places(noted, checkpoint):
        try:
            with source.open("rb") as file:
                if not _holds(file, noted):
                    continue
                if path.exists() and os.path.samefile(source, path):
                    os.truncate(path, noted["bytes"])
                    os.utime(path)  # marks it as this run's file, even if no row was deleted
                else:
                    _copy(file, path, noted["bytes"])
                return True
        except OSError:
            continue
    return False


def _places(noted: dict[str, Any], checkpoint: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Where the file may be; an untrusted checkpoint cannot name a file of another name."""
    if Path(noted["file"]).name == IMPORTANCE_FILE:
        yield Path(noted["file"])
    if checkpoint is not None:
        yield from (folder / IMPORTANCE_FILE for folder in list(Path(os.path.abspath(checkpoint)).parents)[:2])


def _holds(file: BinaryIO, noted: dict[str, Any]) -> bool:
    """Whether a file begins with the noted content, judged by its header, its length and the last noted row."""
    size, last = noted["bytes"], noted["last"].encode()
    if file.read(len(HEADER)) != HEADER or file.seek(0, os.SEEK_END) < size or len(last) > size:
        return False
    file.seek(size - len(last))
    return file.read(len(last)) == last and last.endswith(b"\n")


def _copy(file: BinaryIO, path: Path, size: int) -> None:
    beside = path.with_name(f".{path.name}.partial")
    file.seek(0)
    with beside.open("wb") as copy:
        while size > 0:
            size -= copy.write(file.read(min(size, _CHUNK)))
    os.replace(beside, path)
