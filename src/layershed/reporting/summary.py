"""The summary of a run: a few rows for the HTML report, and the same rows as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rich import box
from rich.table import Table
from rich.text import Text

from layershed.formatting import change_of, counts_of, printable, short_bytes, short_count
from layershed.performance.speed_report import PhaseSpeed, speedup_degradation_ratio
from layershed.quality import OwnQuality, Quality
from layershed.reporting.figures import RunRecord

_MOMENTS = {"before": "before the drop", "after": "right after the drop", "end": "at the end"}


def summary_rows(record: RunRecord) -> list[tuple[str, str]]:
    """Summarize a run as rows of (label, value), for the known values only.

    Args:
        record: The run.

    Returns:
        Rows for the terminal and for the HTML report, in ASCII so that any terminal can show them.

    Example:
        >>> summary_rows(RunRecord("gpt2"))
        [('Sublayers dropped', 'nothing was dropped')]
    """
    rows = [row for key, words in _moments(record, *_MOMENTS) for row in _quality_rows(record.quality[key], words)]
    if record.plan:
        rows.append(("Sublayers dropped", counts_of(record.plan)))
    elif record.speed is None or record.speed.parameters_dense == record.speed.parameters_dropped:
        rows.append(("Sublayers dropped", "nothing was dropped"))
    if speed := record.speed:
        before, after = speed.parameters_dense, speed.parameters_dropped
        rows += [("Parameters", f"{short_count(before)} -> {short_count(after)}{_in_brackets(before, after)}")]
        rows += [(f"{name.capitalize()} speed", str(phase)) for name, phase in speed.phases.items()]
        rows += [
            ("File size", _sizes(speed.file_bytes_dense, speed.file_bytes_dropped)),
            ("Peak memory", _sizes(speed.peak_memory_dense, speed.peak_memory_dropped)),
        ]
        if speed.kv_bytes is not None:
            cache, left = speed.kv_bytes
            rows += [("KV cache per token", f"{cache:,.0f} -> {left:,.0f} bytes{_in_brackets(cache, left)}")]
        if "before" in record.quality:
            what = speed.chosen("decode")
            moments = _moments(record, "after", "end")
            texts = [(words, _sdr(record, key, *what)) for key, words in moments]
            rows += [(f"SDR {words}", text) for words, text in texts if text]
    return rows


def summary_table(record: RunRecord) -> Table:
    """Put the rows of :func:`summary_rows` into a table for the terminal.

    Args:
        record: The run.

    Returns:
        A table for ``rich.print``. Names are shown literally: markup and control codes in them have no effect.
    """
    table = Table(title=Text(printable(record.model)), box=box.SIMPLE_HEAD, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in summary_rows(record):
        table.add_row(Text(label), Text(value))
    return table


def _moments(record: RunRecord, *keys: str) -> Iterator[tuple[str, str]]:
    return ((key, _MOMENTS[key]) for key in keys if key in record.quality)


def _quality_rows(quality: Quality | OwnQuality, moment: str) -> list[tuple[str, str]]:
    if isinstance(quality, Quality):
        text = f"{quality.loss:.4f} (next-token accuracy {quality.accuracy:.1%})".replace("%", " %")
        return [(f"Validation loss {moment}", text)]
    names = {name: "Validation loss" if name == "loss" else printable(name) for name in quality.values}
    return [(f"{names[name]} {moment}", f"{value:.4f}") for name, value in quality.values.items()]


def _sizes(before: float, after: float) -> str:
    return f"{short_bytes(before)} -> {short_bytes(after)}{_in_brackets(before, after)}"


def _in_brackets(before: float, after: float) -> str:
    return f" ({change_of(before, after)})" if before else ""


def _sdr(record: RunRecord, moment: str, name: str, phase: PhaseSpeed) -> str:
    """SDR by next-token accuracy, else by the loss; empty if neither is known."""
    before, after = (record.quality[key].values for key in ("before", moment))
    if "accuracy" in before and "accuracy" in after:
        points_lost, what = 100 * (before["accuracy"] - after["accuracy"]), "points of next-token accuracy"
    elif "loss" in before and "loss" in after:
        points_lost, what = 100 * (after["loss"] - before["loss"]), "hundredths of the loss"
    else:
        return ""
    ratio = speedup_degradation_ratio(points_lost, phase.speedup.median)
    if math.isnan(ratio):
        return "undefined (no speed gained)"
    doubt = "" if phase.measurable else " (speedup not measurable)"
    return f"{round(ratio, 2) + 0.0:.2f} {what} per % of {name} speed{doubt}"
