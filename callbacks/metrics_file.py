"""``metrics.csv`` of a run that may be killed: CSVLogger empties it whenever a metric of a new name comes."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from layershed.callbacks.run import write_text
from layershed.checkpoint_io import local_path

ROWS_KEY = "layershed_rows"


def keep_rows(logger: Logger) -> None:
    """Have a CSVLogger put a new column in without ever having fewer rows on the disk; any other logger is left alone.

    It reads all rows, empties the file, and writes them anew under the longer header. Our callbacks bring new names
    all through a run, and a kill in between took every row with it.
    """
    writer = logger.experiment if isinstance(logger, CSVLogger) else None
    if not isinstance(writer, ExperimentWriter):  # on the other ranks it is a dummy
        return
    file = local_path(writer.metrics_file_path)
    if file is not None:
        vars(writer)["_rewrite_with_new_header"] = partial(_with_header, file)


def note_rows(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Note which files hold the rows of a run so far."""
    if trainer.state.fn == TrainerFn.FITTING and (files := [str(file) for file in _files(trainer) if file.is_file()]):
        checkpoint[ROWS_KEY] = files


def tell_lost_rows(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Warn if the logger of a resumed run took its file away; Lightning has done so before any callback is asked."""
    noted = checkpoint.get(ROWS_KEY, ())
    if trainer.state.fn != TrainerFn.FITTING:
        return
    for file in _files(trainer):
        if str(file) in noted and not file.is_file():
            rank_zero_warn(
                f"CSVLogger deleted {str(file)!r} as it opened, and with it the rows before step "
                f"{checkpoint['global_step']}; resume with a version of its own, such as CSVLogger(version=None)."
            )


def _files(trainer: Trainer) -> Iterator[Path]:
    for logger in trainer.loggers:
        writer = logger.experiment if isinstance(logger, CSVLogger) else None
        file = local_path(writer.metrics_file_path) if isinstance(writer, ExperimentWriter) else None
        if file is not None:
            yield file.absolute()


def _with_header(file: Path, names: Sequence[str]) -> None:
    with file.open(encoding="utf-8", newline="") as old:
        rows = list(csv.DictReader(old))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=names)
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, text.getvalue())
