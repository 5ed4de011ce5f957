"""``metrics.csv`` of a run that may be killed: CSVLogger empties it whenever a metric of a new name comes."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from layershed.callbacks.run import write_text
from layershed.checkpoint_io import local_path


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


def _with_header(file: Path, names: Sequence[str]) -> None:
    with file.open(encoding="utf-8", newline="") as old:
        rows = list(csv.DictReader(old))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=names)
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, text.getvalue())
