"""Reading importance.csv, which the RedundancyMonitor callback writes."""

from __future__ import annotations

import csv
from collections.abc import Callable, Container, Mapping
from pathlib import Path

from layershed.errors import DataError
from layershed.reporting.record import PANELS, ImportancePoint

_COLUMNS = ["step", "block", "kind", "metric", "value"]


def measured_steps(path: str | Path) -> dict[str, list[int]]:
    """Read the steps at which the RedundancyMonitor callback measured; memory does not grow with the number of blocks.

    Args:
        path: A CSV file with the header ``step,block,kind,metric,value``.

    Returns:
        The steps, ascending, by metric.

    Raises:
        DataError: If the file is missing, or a line is malformed; the error names the line.
    """
    found: dict[str, set[int]] = {}

    def take(row: list[str]) -> None:
        step, _, _, metric, _ = _fields(row)
        found.setdefault(metric, set()).add(step)

    _read(path, take)
    return {metric: sorted(steps) for metric, steps in found.items()}


def read_importance(path: str | Path, steps: Mapping[str, Container[int]] | None = None) -> tuple[ImportancePoint, ...]:
    """Read the importances that the RedundancyMonitor callback wrote.

    Args:
        path: A CSV file with the header ``step,block,kind,metric,value``.
        steps: Those to read, by metric; None for all.

    Returns:
        The points, in the order of the file.

    Raises:
        DataError: If the file is missing, or a line is malformed; the error names the line.
    """
    points: list[ImportancePoint] = []

    def take(row: list[str]) -> None:
        if steps is None or len(row) != len(_COLUMNS) or int(row[0]) in steps.get(row[3], ()):
            points.append(ImportancePoint(*_fields(row)))

    _read(path, take)
    return tuple(points)


def _read(path: str | Path, take: Callable[[list[str]], None]) -> None:
    """Call ``take`` for every row but the header."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.reader(file, strict=True)
            try:
                if (header := next(reader, None)) != _COLUMNS:
                    raise ValueError(f"the header must be {','.join(_COLUMNS)}, got {header}")
                for row in reader:
                    if row:
                        take(row)
            except UnicodeDecodeError:
                raise
            except (ValueError, csv.Error) as error:
                raise DataError(f"{path}, line {max(reader.line_num, 1)}: {error}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"Importance: cannot read {str(path)!r}: {error}.") from None


def _fields(row: list[str]) -> tuple[int, int, str, str, float]:
    """The fields of an :class:`ImportancePoint`."""
    if len(row) != len(_COLUMNS):
        raise ValueError(f"expected {len(_COLUMNS)} fields, got {len(row)}")
    number, place, kind, metric, value = row
    if kind not in PANELS:
        raise ValueError(f"kind must be one of {', '.join(PANELS)}, got {kind!r}")
    step, block = int(number), int(place)
    fields = (step, block, kind, metric, float(value))
    if step < 0 or block < 0:
        raise ValueError(f"step and block must not be negative, got {step} and {block}")
    return fields
