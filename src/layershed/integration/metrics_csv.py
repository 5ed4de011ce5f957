"""Keeps the rows of ``metrics.csv`` in a run that may be killed, for ExactResume.

CSVLogger empties the file whenever a metric has a new name, and deletes it when a resumed run opens it.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from layershed.files.atomic import write_text
from layershed.files.checkpoint_file import local_path
from layershed.integration.lightning_private import replace_header_rewrite
from layershed.integration.namespaces import CSVLogger, ExperimentWriter, Logger, Trainer, TrainerFn, rank_zero_warn

ROWS_KEY = "layershed_rows"


def keep_rows(logger: Logger) -> ExperimentWriter | None:
    """Make a CSVLogger rewrite its header atomically; any other logger stays as it is.

    CSVLogger itself reads all rows, empties the file, and writes them under the longer header. Our callbacks log new
    names throughout a run, and a kill in between would lose every row.

    Returns:
        The writer that was changed, for :func:`give_back_header_rewrite`.
    """
    writer = logger.experiment if isinstance(logger, CSVLogger) else None
    if not isinstance(writer, ExperimentWriter):  # a dummy on the other ranks
        return None
    file = local_path(writer.metrics_file_path)
    if file is None:
        return None
    replace_header_rewrite(writer, partial(_with_header, file))
    return writer


def note_rows(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Note the number of rows, and give the file a second name: CSVLogger deletes the first when it opens."""
    noted = []
    for _, file in _files(trainer):
        try:
            lines = _lines(file) if file.is_file() else []
            if len(lines) > 1:
                noted.append({"file": str(file), "rows": len(lines) - 1, "last": _values(lines[0], lines[-1])})
                _keep(file)
        except OSError as error:  # e.g. another run in the same folder: no reason to end this run
            rank_zero_warn(
                f"The rows of {str(file)!r} could not be kept for a resumed run ({error.strerror or error}). Give "
                "every run its own folder."
            )
    if noted:
        checkpoint[ROWS_KEY] = noted


def take_up_rows(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Restore the rows up to the checkpoint, and no others: later rows are logged again.

    - The logger of a resumed run deletes its file before any callback is called. The rows are then read from the second
      name. A warning says if they are lost.
    - The run's folder may have been copied or moved, and a resumed run may have a new folder. The rows are then read
      from the folder of the checkpoint, or from the noted file.
    """
    noted = checkpoint.get(ROWS_KEY, [])
    for writer, file in _files(trainer):
        kept = _kept(file)
        present = _lines(file) if file.is_file() else []
        if _fitting(present, noted):  # the same logger continues
            before, since = present, []
        else:  # the module may have logged rows of this run during setup
            places = [kept, *_elsewhere(noted, file, trainer.ckpt_path)]
            found = (_lines(place) for place in places if place.is_file())
            before, since = next((lines for lines in found if _fitting(lines, noted)), []), present
        count = _fitting(before, noted)
        if count:
            rows = [*csv.DictReader(before[: count + 1]), *csv.DictReader(since)]
            writer.metrics_keys = list(dict.fromkeys(name for row in rows for name in row))
            _write(file, writer.metrics_keys, rows)
        elif noted and (kept.is_file() or any(each["file"] == str(file) for each in noted)):
            rank_zero_warn(
                f"CSVLogger deleted {str(file)!r} when it opened it, with the rows before step "
                f"{checkpoint['global_step']}. To keep them, resume with a new version: CSVLogger(version=None)."
            )
        elif noted:
            rank_zero_warn(
                f"{str(file)!r} begins at step {checkpoint['global_step']}: the rows of before are neither beside the "
                f"checkpoint nor in {noted[0]['file']!r}."
            )


def _elsewhere(noted: Sequence[dict[str, Any]], file: Path, checkpoint: Any) -> Iterator[Path]:
    """Where the rows may be if this run has a new folder; an untrusted checkpoint names no file of another name."""
    folders = [] if checkpoint is None else list(Path(os.path.abspath(checkpoint)).parents)[:2]
    folders += [Path(each["file"]).parent for each in noted if Path(each["file"]).name == file.name]
    for folder in folders:
        yield _kept(folder / file.name)
        yield folder / file.name


def _fitting(lines: Sequence[str], noted: Sequence[dict[str, Any]]) -> int:
    """The number of the file's rows before the checkpoint; 0 if the file is another run's."""
    return max((each["rows"] for each in noted if _is_row(lines, each["rows"], each["last"])), default=0)


def _files(trainer: Trainer) -> Iterator[tuple[ExperimentWriter, Path]]:
    for logger in trainer.loggers if trainer.state.fn == TrainerFn.FITTING else ():
        writer = logger.experiment if isinstance(logger, CSVLogger) else None
        if isinstance(writer, ExperimentWriter):
            file = local_path(writer.metrics_file_path)
            if file is not None:
                yield writer, file.parent.resolve() / file.name


def _kept(file: Path) -> Path:
    return file.with_name(f".{file.name}.kept")


def _keep(file: Path) -> None:
    """Give the file a second name by a hard link, which takes no space; later rows follow the noted ones."""
    kept = _kept(file)
    # a unique name: writing to a link that a killed run left would empty the file
    beside = kept.with_name(f"{kept.name}.{uuid4().hex}")
    try:
        try:
            os.link(file, beside)
        except FileExistsError:  # a network file system that repeated the request
            pass
        except OSError:  # a file system without links
            shutil.copyfile(file, beside)
        os.replace(beside, kept)
    finally:
        beside.unlink(missing_ok=True)  # replace leaves both if they are two names of one file


def _is_row(lines: Sequence[str], number: int, values: dict[str, str]) -> bool:
    return len(lines) > number and _values(lines[0], lines[number]) == values


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


def _values(header: str, line: str) -> dict[str, str]:
    """The values of a row, without the empty columns of later names."""
    return {name: value for name, value in next(csv.DictReader([header, line])).items() if value}


def _with_header(file: Path, names: Sequence[str]) -> None:
    with file.open(encoding="utf-8", newline="") as old:
        rows = list(csv.DictReader(old))
    _write(file, names, rows)


def _write(file: Path, names: Sequence[str], rows: Iterable[dict[str, str]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=names)
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, text.getvalue())
