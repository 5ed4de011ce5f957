"""The report of a run as one self-contained HTML file. No model, no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from markupsafe import Markup
from matplotlib.figure import Figure

from layershed.formatting import counts_of, printable, short_number
from layershed.performance.speed_report import MeasuredSpeed
from layershed.planning.notation import short_importance
from layershed.planning.plan import DropPlan
from layershed.reporting.bars import importance_bars, speed_figure
from layershed.reporting.curves import course_figure
from layershed.reporting.figures import importance_heatmap
from layershed.reporting.page import page_environment, write_page
from layershed.reporting.record import PANELS, ImportancePoint, RunRecord
from layershed.reporting.summary import round_values, summary_rows
from layershed.reporting.svg import inline_svg


def write_report(record: RunRecord, path: str | Path) -> Path:
    """Write the report as one HTML file that needs nothing beside it and runs no script.

    Args:
        record: The run.
        path: Where to write. Folders are created as needed, and an existing file is replaced in one step.

    Returns:
        The path.
    """
    path = Path(path)
    environment = page_environment()
    environment.filters.update(typeset=_typeset, number=short_number, importance=short_importance, printable=_lines)
    paint = _Painter()
    html = environment.get_template("report.html").render(
        model=printable(record.model),
        lede=_lede(record.plan),
        rows=summary_rows(record),
        sdr=bool(record.sdr),
        heatmaps=list(_heatmaps(record, paint)),
        course=_course(record, paint) if record.losses else None,
        speed=_speed(record.speed) if record.speed else None,
        speedups=_speedups(record.speed, paint) if record.speed else None,
        rounds=_rounds(record) if len(record.rounds) > 1 else None,
        plan=record.plan,
        plan_metric=printable(record.plan.metric or "") if record.plan else "",
        why=_why(record, record.plan, paint) if record.plan else None,
        samples=record.samples,
        facts=record.facts,
        config=record.config,
        usage=record.usage,
        panels=PANELS,
    )
    return write_page(path, html)


@dataclass(frozen=True)
class _Picture:
    """The same picture arranged for a wide screen and for a phone."""

    wide: Markup
    narrow: Markup
    alt: str
    metric: str = ""
    heading: str = ""


class _Painter:
    """Makes pictures whose ids differ."""

    def __init__(self) -> None:
        self._numbers = count(1)

    def __call__(self, wide: Figure, narrow: Figure, alt: str, **more: str) -> _Picture:
        number = next(self._numbers)
        # the texts within are escaped by the SVG writer
        images = [Markup(inline_svg(figure, f"{kind}{number}")) for figure, kind in ((wide, "w"), (narrow, "n"))]
        return _Picture(images[0], images[1], alt, **more)


def _heatmaps(record: RunRecord, paint: _Painter) -> Iterator[_Picture]:
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
        yield paint(wide, narrow, alt, metric=name, heading=heading)


def _course(record: RunRecord, paint: _Painter) -> _Picture:
    parts = []
    for split, words in (("train", "Training"), ("val", "Validation")):
        points = sorted((point for point in record.losses if point.split == split), key=lambda point: point.step)
        if points:
            first, last = points[0], points[-1]
            parts.append(f"{words} loss: {first.loss:.4f} at step {first.step}, {last.loss:.4f} at step {last.step}.")
    if record.control and (own := [point for point in record.control.losses if point.split == "val"]):
        parts.append(f"Validation loss of the control: {own[-1].loss:.4f} at step {own[-1].step}.")
    wide, narrow = course_figure(record), course_figure(record, narrow=True)
    return paint(wide, narrow, " ".join([*parts, _lede(record.plan)]))


def _speedups(speed: MeasuredSpeed, paint: _Painter) -> _Picture:
    wide, narrow = speed_figure(speed), speed_figure(speed, narrow=True)
    return paint(wide, narrow, " ".join(f"{name.capitalize()} speed: {phase}." for name, phase in speed.phases.items()))


def _why(record: RunRecord, plan: DropPlan, paint: _Painter) -> _Picture | None:
    """The scores of the dropped sublayers beside those that stayed: each as it was when it was dropped, or last."""
    whole = plan.scope == "block"
    points = [point for point in record.scores if (point.kind == "block") == whole]
    dropped = {("block" if whole else drop.sublayer.kind, drop.sublayer.block): drop.score for drop in plan.drops}
    points += [
        ImportancePoint(0, block, kind, point.metric, score)
        for (kind, block), score in dropped.items()
        if score is not None
        for point in points[:1]
    ]
    kinds = {"attention", "mlp", "cross_attention", "block"} if plan.scope in ("joint", "block") else {plan.scope}
    points = [point for point in points if point.kind in kinds]
    if not points:
        return None
    alt = f"Bars of the importance of every sublayer when the plan was made. {_lede(plan)}"
    wide, narrow = (importance_bars(points, dropped, stacked=stacked) for stacked in (False, True))
    return paint(wide, narrow, alt, metric=printable(points[0].metric))


def _speed(speed: MeasuredSpeed) -> dict[str, object]:
    setting = {"Device": printable(speed.device), "Batch": f"{speed.batch_size:,}"}
    setting |= {name.replace("_", " ").capitalize(): f"{length:,}" for name, length in speed.lengths.items()}
    setting["Paired runs"] = f"{speed.runs:,}"
    phases = {name.capitalize(): phase for name, phase in speed.phases.items()}
    return {"phases": phases, "setting": setting, "unit": next(iter(phases.values())).unit}


def _rounds(record: RunRecord) -> dict[str, list[str] | list[list[str]]]:
    """The columns and rows of the table of rounds."""
    values = [round_values(each) for each in record.rounds]
    names = list(dict.fromkeys(name for each in values for name in each))
    shown = any(each.sdr is not None for each in record.rounds)
    rows = []
    for each, own in zip(record.rounds, values, strict=True):
        row = [f"{each.quality.step:,}", counts_of(each.dropped), *(own.get(name, "-") for name in names)]
        rows.append([*row, *([str(each.sdr or "-")] if shown else [])])
    return {"columns": ["Step", "Dropped", *(name.capitalize() for name in names), *(["SDR"] * shown)], "rows": rows}


def _lede(plan: DropPlan | None) -> str:
    if not plan:
        return "No sublayer was dropped."
    steps = sorted({drop.step for drop in plan.drops if drop.step is not None})
    when = f" at step {steps[0]:,}" if steps else ""
    if len(steps) > 1:
        when = f" in {len(steps)} rounds from step {steps[0]:,} to step {steps[-1]:,}"
    return f"{len(plan)} sublayer{'s' if len(plan) > 1 else ''} dropped{when}: {counts_of(plan)}."


def _lines(text: str) -> str:
    """A text of several lines without control codes."""
    return "\n".join(map(printable, text.splitlines()))


def _typeset(text: str) -> str:
    """The ASCII of a summary value with the signs that a browser can show."""
    text = text.replace("->", "\N{RIGHTWARDS ARROW}").replace(", x", ", \N{MULTIPLICATION SIGN}")
    return re.sub(r"(?<![^ (])-(?=\d)", "\N{MINUS SIGN}", text)
