"""The report of a run: a table for the terminal, and one self-contained HTML file. No model, no torch."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from rich.text import Text

from layershed.errors import DataError
from layershed.files.atomic import as_export_error, write_text
from layershed.formatting import change_of, counts_of, printable, short_bytes, short_count, short_number
from layershed.performance.speed import PhaseSpeed, SpeedReport, speedup_degradation_ratio
from layershed.planning.plan import DropPlan
from layershed.quality import Quality
from layershed.reporting.figures import PANELS, ImportancePoint, LossPoint, RunRecord, importance_heatmap, loss_figure

__all__ = [
    "ImportancePoint",
    "LossPoint",
    "RunRecord",
    "importance_heatmap",
    "loss_figure",
    "measured_steps",
    "read_importance",
    "summary_rows",
    "summary_table",
    "write_report",
]

_COLUMNS = ["step", "block", "kind", "metric", "value"]
_MOMENTS = {"before": "before the drop", "after": "right after the drop", "end": "at the end"}


def measured_steps(path: str | Path) -> dict[str, list[int]]:
    """When the RedundancyMonitor callback measured, from its file, whatever the length of that.

    Args:
        path: A CSV file with the header ``step,block,kind,metric,value``.

    Returns:
        The steps, ascending, by metric.

    Raises:
        DataError: If there is no such file, or a line is malformed; names the line.
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
        DataError: If there is no such file, or a line is malformed; names the line.
    """
    points: list[ImportancePoint] = []

    def take(row: list[str]) -> None:
        if steps is None or len(row) != len(_COLUMNS) or int(row[0]) in steps.get(row[3], ()):
            points.append(ImportancePoint(*_fields(row)))

    _read(path, take)
    return tuple(points)


def _read(path: str | Path, take: Callable[[list[str]], None]) -> None:
    """Hand on every row but the header."""
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


def summary_rows(record: RunRecord) -> list[tuple[str, str]]:
    """What a run comes down to, as (label, value); a row is there only if its value is known.

    Args:
        record: The run.

    Returns:
        Rows for the terminal and for the HTML report, in ASCII so that any terminal can show them.

    Example:
        >>> summary_rows(RunRecord("gpt2"))
        [('Sublayers dropped', 'nothing was dropped')]
    """
    rows = [(f"Validation loss {words}", _quality(record.quality[key])) for key, words in _moments(record, *_MOMENTS)]
    if record.plan:
        rows.append(("Sublayers dropped", counts_of(record.plan)))
    elif record.speed is None or record.speed.parameters_dense == record.speed.parameters_dropped:
        rows.append(("Sublayers dropped", "nothing was dropped"))
    if speed := record.speed:
        before, after = speed.parameters_dense, speed.parameters_dropped
        cache, left = speed.kv_bytes_dense, speed.kv_bytes_dropped
        rows += [
            ("Parameters", f"{short_count(before)} -> {short_count(after)}{_in_brackets(before, after)}"),
            ("Prefill speed", str(speed.prefill)),
            ("Decode speed", str(speed.decode)),
            ("File size", _sizes(speed.file_bytes_dense, speed.file_bytes_dropped)),
            ("Peak memory", _sizes(speed.peak_memory_dense, speed.peak_memory_dropped)),
            ("KV cache per token", f"{cache:,.0f} -> {left:,.0f} bytes{_in_brackets(cache, left)}"),
        ]
        if "before" in record.quality:
            moments = _moments(record, "after", "end")
            rows += [(f"SDR {words}", _sdr(record, key, speed.decode)) for key, words in moments]
    return rows


def summary_table(record: RunRecord) -> Table:
    """The same rows as a table for the terminal.

    Args:
        record: The run.

    Returns:
        A table for ``rich.print``. Names are shown as they are: neither markup nor control codes in them act.
    """
    table = Table(title=Text(printable(record.model)), box=box.SIMPLE_HEAD, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in summary_rows(record):
        table.add_row(Text(label), Text(value))
    return table


def write_report(record: RunRecord, path: str | Path) -> Path:
    """Write the report as one HTML file that needs nothing beside it and runs no script.

    Args:
        record: The run.
        path: Where to write; folders are made as needed, and a file that is there is replaced in one step.

    Returns:
        The path.
    """
    path = Path(path)
    environment = Environment(
        loader=PackageLoader("layershed.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(typeset=_typeset, number=short_number)
    html = environment.get_template("report.html").render(
        model=printable(record.model),
        lede=_lede(record.plan),
        rows=summary_rows(record),
        heatmaps=list(_heatmaps(record)),
        loss=_loss_picture(record) if record.losses else None,
        speed=_speed(record.speed) if record.speed else None,
        plan=record.plan,
        plan_metric=printable(record.plan.metric or "") if record.plan else "",
        panels=PANELS,
    )
    with as_export_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, html)
    return path


@dataclass(frozen=True)
class _Image:
    """A base64 PNG with its size in CSS pixels."""

    data: str
    width: int
    height: int


@dataclass(frozen=True)
class _Picture:
    """The same picture arranged for a wide screen and for a phone."""

    wide: _Image
    narrow: _Image
    alt: str
    metric: str = ""
    heading: str = ""


def _image(figure: Figure) -> _Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    width, height = (round(100 * inches) for inches in figure.get_size_inches())
    return _Image(base64.b64encode(buffer.getvalue()).decode("ascii"), width, height)


def _heatmaps(record: RunRecord) -> Iterator[_Picture]:
    for metric in dict.fromkeys(point.metric for point in record.importance):
        points = [point for point in record.importance if point.metric == metric]
        steps, blocks = {point.step for point in points}, {point.block for point in points}
        name = printable(metric)
        heading, when = "Importance", "measured once"
        if len(steps) > 1:
            heading += " over training"
            times = record.measured.get(metric, len(steps))
            when = f"measured {times} times from step {min(steps)} to step {max(steps)}"
        what = f"Heat map of the importance ({name}) of {len(blocks)} blocks, by kind of sublayer"
        alt = f"{what}, {when}. {_lede(record.plan)}"
        wide, narrow = (importance_heatmap(points, record.plan, stacked=stacked) for stacked in (False, True))
        yield _Picture(_image(wide), _image(narrow), alt, name, heading)


def _loss_picture(record: RunRecord) -> _Picture:
    parts = []
    for split, words in (("train", "Training"), ("val", "Validation")):
        points = sorted((point for point in record.losses if point.split == split), key=lambda point: point.step)
        if points:
            first, last = points[0], points[-1]
            parts.append(f"{words} loss: {first.loss:.4f} at step {first.step}, {last.loss:.4f} at step {last.step}.")
    wide, narrow = loss_figure(record), loss_figure(record, narrow=True)
    return _Picture(_image(wide), _image(narrow), " ".join([*parts, _lede(record.plan)]))


def _speed(speed: SpeedReport) -> dict[str, object]:
    setting = {
        "Device": printable(speed.device),
        "Batch": f"{speed.batch_size:,}",
        "Prompt": f"{speed.prompt_tokens:,} tokens",
        "New tokens": f"{speed.new_tokens:,}",
        "Paired runs": f"{speed.runs:,}",
    }
    return {"phases": {"Prefill": speed.prefill, "Decode": speed.decode}, "setting": setting}


def _moments(record: RunRecord, *keys: str) -> Iterator[tuple[str, str]]:
    return ((key, _MOMENTS[key]) for key in keys if key in record.quality)


def _lede(plan: DropPlan | None) -> str:
    if not plan:
        return "No sublayer was dropped."
    steps = sorted({drop.step for drop in plan.drops if drop.step is not None})
    when = f" at step {steps[0]:,}" if steps else ""
    if len(steps) > 1:
        when = f" in {len(steps)} rounds from step {steps[0]:,} to step {steps[-1]:,}"
    return f"{len(plan)} sublayer{'s' if len(plan) > 1 else ''} dropped{when}: {counts_of(plan)}."


def _fields(row: list[str]) -> tuple[int, int, str, str, float]:
    """Those of an :class:`ImportancePoint`."""
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


def _quality(quality: Quality) -> str:
    return f"{quality.loss:.4f} (next-token accuracy {quality.accuracy:.1%})".replace("%", " %")


def _sizes(before: float, after: float) -> str:
    return f"{short_bytes(before)} -> {short_bytes(after)}{_in_brackets(before, after)}"


def _in_brackets(before: float, after: float) -> str:
    return f" ({change_of(before, after)})" if before else ""


def _sdr(record: RunRecord, moment: str, decode: PhaseSpeed) -> str:
    points_lost = 100 * (record.quality["before"].accuracy - record.quality[moment].accuracy)
    ratio = speedup_degradation_ratio(points_lost, decode.speedup.median)
    if math.isnan(ratio):
        return "undefined (no speed gained)"
    doubt = "" if decode.measurable else " (speedup not measurable)"
    return f"{round(ratio, 2) + 0.0:.2f} points of next-token accuracy per % of decode speed{doubt}"


def _typeset(text: str) -> str:
    """The ASCII of a summary value with the signs that a browser can show."""
    return (
        text.replace("->", "\N{RIGHTWARDS ARROW}")
        .replace(", x", ", \N{MULTIPLICATION SIGN}")
        .replace("(-", "(\N{MINUS SIGN}")
    )
