"""Reading metrics.csv, which CSVLogger writes. No torch."""

from __future__ import annotations

import csv
from pathlib import Path

METRICS_FILE = "metrics.csv"
Curve = tuple[tuple[int, float], ...]
# Rows that layershed's callbacks write themselves; a row of Lightning's has the epoch, too.
_OWN = ("drop/", "speed/", "importance", "recovery/", "quantization/")


def read_metrics(path: str | Path) -> dict[str, Curve]:
    """Read what a run logged: (optimizer step, value), by name.

    The steps are counted from 1, as those of the drops are. Lightning counts its rows from 0; the rows that layershed's
    callbacks write are counted from 1 already.

    Args:
        path: The file.

    Raises:
        OSError: If it cannot be read.
        ValueError: If a value is no number, or there is no column ``step``.
        csv.Error: If it is no CSV file.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if "step" not in (reader.fieldnames or ["step"]):
            raise ValueError("it has no column 'step'")
        for row in reader:
            step, epoch = row.pop("step"), row.pop("epoch", None)
            for name, text in row.items() if step else ():
                if name and isinstance(text, str) and text:
                    own = name.startswith(_OWN) and not epoch
                    curves.setdefault(name, []).append((int(float(step)) + (not own), float(text)))
    return {name: tuple(points) for name, points in curves.items()}
