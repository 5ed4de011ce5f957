"""Where the rows come from: parses ``TextData(source=...)``, and reads files, the hub and the embedded text."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layershed.errors import DataError
from layershed.extras import needs
from layershed.training.as_data_error import as_data_error

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


class Source:
    """The rows of a source.

    Args:
        source: As in :class:`layershed.training.text_data.TextData`.
        streaming: Read the rows when they are needed, from the start, instead of all at once.

    Raises:
        DataError: If a local source is missing, empty or of an unknown type.
    """

    def __init__(self, source: str, streaming: bool) -> None:
        self.name, self.streaming = source, streaming
        self.hub = parse_hub(source)
        self.files = [] if self.hub or source == "pydoc" else local_files(source)

    def __str__(self) -> str:
        """How errors name it."""
        return f"TextData(source={self.name!r})"

    @property
    def is_local(self) -> bool:
        """Whether it is read without a network."""
        return self.hub is None

    def load(self) -> tuple[Any, Any]:
        """Rows for training, and for validation if the source has such a split, else None.

        Returns:
            Data sets of the library ``datasets``; iterable ones if they are streamed.

        Raises:
            DataError: If they cannot be read.
        """
        with needs("data", "TextData"):
            import datasets  # here because it takes half a second

        if self.hub:
            splits = self.load_hub()
            if "train" not in splits:
                raise DataError(f"{self}: there is no split 'train' among {', '.join(splits)}; give another dataset.")
            return splits["train"], splits.get("validation")
        if self.name == "pydoc":
            topics = importlib.import_module("pydoc_data.topics").topics
            rows = datasets.Dataset.from_dict({"text": list(topics.values())})
            return rows.to_iterable_dataset() if self.streaming else rows, None
        return self._read(self.files), None

    def load_hub(self) -> Any:
        """The splits of a hub data set."""
        import datasets

        name, config = self.hub or ("", None)
        options = {"streaming": True} if self.streaming else {}
        with as_data_error(f"{self}: the dataset could not be loaded from the hub"):
            return datasets.load_dataset(name, config, **options)

    def parts(self) -> list[Source]:
        """Each file as a source of its own, to find the one that does not fit the others."""
        return [Source(str(file), streaming=False) for file in self.files] if len(self.files) > 1 else []

    def place(self, index: int) -> str:
        """Number and file of a row, for an error, such as ``row 3 of chat.jsonl``; numbers begin at 1.

        Args:
            index: Index of the row among those of all files.
        """
        if len(self.files) < 2:
            return f"row {index + 1}" + "".join(f" of {file.name}" for file in self.files)
        for file in self.files:
            with no_progress_bars():
                rows = self._read([file])
                count = sum(1 for _ in rows) if self.streaming else len(rows)
            if index < count:
                return f"row {index + 1} of {file.name}"
            index -= count
        return "a row"

    def _read(self, files: list[Path]) -> Any:
        import datasets

        builder = BUILDERS[files[0].suffix.lower()]
        options: dict[str, Any] = {"sample_by": "paragraph"} if builder == "text" else {}
        options["data_files"] = {"train": [str(file) for file in files]}
        if self.streaming:
            with as_data_error(f"{self}: the text could not be read"):
                return datasets.load_dataset(builder, streaming=True, **options)["train"]
        # Each call has its own cache, so that an edited file is read again.
        with (
            no_progress_bars(),
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache,
            as_data_error(f"{self}: the text could not be read"),
        ):
            return datasets.load_dataset(builder, cache_dir=cache, **options)["train"]


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide the progress bars of datasets, unless the environment asks for them, and restore them."""
    import datasets

    hide = datasets.config.HF_DATASETS_DISABLE_PROGRESS_BARS is None and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()
