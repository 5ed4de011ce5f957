"""Parses ``TextData(source=...)`` and lists the files of a local source."""

from __future__ import annotations

from pathlib import Path

from layershed.errors import DataError

BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_ENDINGS = ".txt, .jsonl, .json or .parquet"
_FORMS = f'"pydoc", a {_ENDINGS} file, a folder of such files of one type, or "hub:<name>" or "hub:<name>:<config>"'


def parse_hub(source: str) -> tuple[str, str | None] | None:
    """Name and configuration of a ``"hub:..."`` source; None for another source."""
    prefix, *parts = source.split(":")
    if prefix != "hub":
        return None
    if not 1 <= len(parts) <= 2 or not all(parts):
        raise DataError(f'TextData(source={source!r}): write "hub:<name>" or "hub:<name>:<config>".')
    return parts[0], parts[1] if len(parts) == 2 else None


def local_files(source: str) -> list[Path]:
    """Files of a local source, sorted by name, of one type and not empty."""
    path, where = Path(source).expanduser(), f"TextData(source={source!r})"
    if not path.exists():
        raise DataError(f"{where}: there is no such file or folder; source must be {_FORMS}.")
    inside = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in inside if file.is_file() and file.suffix.lower() in BUILDERS]
    if not files:
        what = "no file in it ends" if path.is_dir() else "its name does not end"
        raise DataError(f"{where}: {what} in {_ENDINGS}; source must be {_FORMS}.")
    if len({BUILDERS[file.suffix.lower()] for file in files}) > 1:
        endings = ", ".join(sorted({file.suffix.lower() for file in files}))
        raise DataError(f"{where}: its files end in {endings}; keep files of one type in a folder.")
    if empty := [file.name for file in files if file.stat().st_size == 0]:
        raise DataError(f"{where}: the file {empty[0]!r} is empty (0 bytes); remove it or fill it.")
    return files
