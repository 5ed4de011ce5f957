"""The summary of a run: a few rows for the HTML report, and the same rows as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich import box
from rich.table import Table
from rich.text import Text

from layershed.formatting import change_of, counts_of, printable, short_bytes, short_count
from layershed.planning.plan import DropPlan
from layershed.quality import OwnQuality, Quality
from layershed.reporting.drop_cost import cost_rows
from layershed.reporting.record import DropRound, MetricPoint, RunRecord

_MOMENTS = {"before": "before the drop", "after": "right after the drop", "end": "at the end"}
_SDR = {"after": "right after the drop", "validation": "at the last validation", "end": "at the end"}


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
    rows = [*_quality_around(record), *cost_rows(record)]
    around = {name for quality in record.quality.values() for name in quality.values}
    around |= {"val_loss", "val/loss"} if "loss" in around else set()
    metrics = {name: values for name, values in record.metrics.items() if name not in around}
    theirs = {} if record.control is None else record.control.metrics
    rows += [
        (
            f"{printable(name)} in validation",
            _validated(before, last, theirs.get(name, {}).get(last.step), record.steps),
        )
        for name, (before, last) in metrics.items()
    ]
    if record.plan:
        rows.append(("Sublayers dropped", _dropped(record.plan)))
    elif record.speed is None or record.speed.parameters_dense == record.speed.parameters_dropped:
        rows.append(("Sublayers dropped", "nothing was dropped"))
    rows += [(label, printable(value)) for label, value in record.changes]
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
    return rows + [(f"SDR {words}", str(record.sdr[moment])) for moment, words in _SDR.items() if moment in record.sdr]


def summary_table(record: RunRecord) -> Table:
    """Put the rows of :func:`summary_rows` into a table for the terminal.

    Args:
        record: The run.

    Returns:
        A table for ``rich.print``. Names are shown literally: markup and control codes in them have no effect.
    """
    return rows_table(record.model, summary_rows(record))


def rows_table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Put rows of (label, value) into a table for the terminal."""
    table = Table(title=Text(printable(title)), box=box.SIMPLE_HEAD, show_header=False, title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(Text(label), Text(value))
    return table


def _dropped(plan: DropPlan) -> str:
    """How many of each kind, and in place of how many a linear map runs."""
    maps = sum(drop.action == "linear" for drop in plan.drops)
    return counts_of(plan) + (f"; a linear map runs in place of {maps}" if maps else "")


def _quality_around(record: RunRecord) -> Iterator[tuple[str, str]]:
    """The quality around the drop, or around each round of drops, and at the end."""
    moments = _MOMENTS
    if len(record.rounds) > 1:
        moments = {"before": "before the first round", "end": "at the end"}
    for moment, words in moments.items():
        if moment == "end":
            yield from _round_rows(record)
        if moment in record.quality:
            yield from _quality_rows(record.quality[moment], words)


def _round_rows(record: RunRecord) -> Iterator[tuple[str, str]]:
    for number, each in enumerate(record.rounds if len(record.rounds) > 1 else (), start=1):
        parts = [counts_of(each.dropped), *(f"{name} {values}" for name, values in round_values(each).items())]
        parts += [] if each.sdr is None else [f"SDR {each.sdr}"]
        yield f"Round {number}, step {each.quality.step:,}", "; ".join(parts)


def round_values(each: DropRound) -> dict[str, str]:
    """Each quality before and after a round, such as ``2.8735 -> 2.8772``, by its name."""
    before, after = ({} if q is None else q.values for q in (each.quality.before, each.quality.after))
    return {printable(name): f"{before[name]:.4f} -> {after[name]:.4f}" for name in before if name in after}


def _validated(before: MetricPoint | None, last: MetricPoint, control: float | None, end: int | None) -> str:
    """With the step: the last validation may be long before the drop, or before the end."""
    when = "at the end" if last.step == end else f"at step {last.step:,}"
    parts = [] if before is None else [f"{before.value:.4f} before the drop (step {before.step:,})"]
    parts += [f"{last.value:.4f} {when}", *([] if control is None else [f"{control:.4f} of the control"])]
    return ", ".join(parts)


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
