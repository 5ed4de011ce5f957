"""The course of a run as a picture: losses with what happened, learning rate, throughput. No pyplot."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from layershed.formatting import short_number
from layershed.reporting.marks import mark_steps
from layershed.reporting.plot_style import (
    CONTROL,
    INK,
    LEGEND,
    MUTED,
    TEXT,
    TRAIN,
    VAL,
    new_figure,
    plain_axes,
    with_titles,
)
from layershed.reporting.record import RunRecord, drop_steps

_FEW, _BEGINNING, _FLAT = 20, 0.15, 1.5
_STYLES: dict[str, dict[str, Any]] = {
    "train": {"label": "training", "color": TRAIN, "linewidth": 1.0},
    "val": {"label": "validation", "color": VAL, "linewidth": 1.6, "marker": "o", "markersize": 4.5},
    "control": {
        "label": "validation of the control, without the drop",
        "color": CONTROL,
        "linewidth": 1.6,
        "linestyle": (0, (5, 2)),
        "marker": "s",
        "markersize": 4,
    },
}


def course_figure(record: RunRecord, *, narrow: bool = False) -> Figure:
    """Draw training loss (thin) and validation loss (with marks), those of the control, and what changed the model.

    Learning rate and throughput have panels below, if they are known.

    Args:
        record: The run.
        narrow: Draw for a phone.

    Returns:
        The figure. Its first axes have one line for each split that was logged.
    """
    below = {name: points for name, points in record.curves.items() if points}
    heights = [3.0, *([1.0] * len(below))]
    size = (3.8, 3.4 + 1.15 * len(below)) if narrow else (10.0, 3.9 + 1.2 * len(below))
    figure = new_figure(size)
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights).ravel()
    axes = panels[0]
    for each in panels:
        plain_axes(each)
    handles = _losses(axes, record)
    for (name, points), own in zip(below.items(), panels[1:], strict=True):
        _curve(own, name, points, TRAIN if name.startswith("learning") else VAL)
    panels[-1].set_xlabel("optimizer step", **TEXT)
    axes.set_ylabel(record.loss_label, **TEXT)
    axes.xaxis.set_major_locator(MaxNLocator(5 if narrow else 9, integer=True))
    labels = _happened(record)
    for each in panels[1:]:
        mark_steps(each, dict.fromkeys(labels, ""))
    lines = mark_steps(axes, labels)
    if handles or lines:
        columns = 1 if narrow and "control" in {*record.curves, *(["control"] * bool(record.control))} else 3
        figure.legend(handles=[*handles, *lines], loc="outside lower center", ncols=columns, **LEGEND)
    return figure


def _losses(axes: Axes, record: RunRecord) -> list[Artist]:
    handles: list[Artist] = []
    control = [] if record.control is None else [point for point in record.control.losses if point.split == "val"]
    splits = {split: [point for point in record.losses if point.split == split] for split in ("train", "val")}
    for split, points in {**splits, "control": control}.items():
        if points:
            points.sort(key=lambda point: point.step)  # stable: two at the step of a drop stay before and after it
            steps, losses = [point.step for point in points], [point.loss for point in points]
            (line,) = axes.plot(steps, losses, **_STYLES[split])
            handles.append(line)
            name = _STYLES[split]["label"].split(",")[0]
            titles = [f"{name} loss, step {step:,}: {loss:.4f}" for step, loss in zip(steps, losses, strict=True)]
            _hover(axes, steps, losses, titles)
    _leave_out_the_beginning(axes, record)
    return handles


def _leave_out_the_beginning(axes: Axes, record: RunRecord) -> None:
    """Begin the axis of losses where it is interesting: the first steps from scratch would flatten the rest."""
    finite = [point for point in record.losses if math.isfinite(point.loss)]
    if len(finite) < _FEW:
        return
    first, last = min(point.step for point in finite), max(point.step for point in finite)
    later = [point.loss for point in finite if point.step >= first + _BEGINNING * (last - first)]
    low, high = axes.get_ylim()
    top = max(later) + 0.08 * (max(later) - min(later))
    if max(later) > min(later) and high - low > _FLAT * (top - low):
        axes.set_ylim(min(later) - 0.08 * (max(later) - min(later)), top)
        where: dict[str, Any] = {
            "xycoords": "axes fraction",
            "textcoords": "offset points",
            "va": "top",
            "fontsize": 8,
            "color": MUTED,
        }
        axes.annotate("the first losses are above", (0, 1), (6, -4), **where)


def _curve(axes: Axes, name: str, points: tuple[tuple[int, float], ...], colour: str) -> None:
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, color=colour, linewidth=1.2)
    axes.set_ylabel(name.replace(" (", "\n("), **TEXT)
    axes.set_ylim(0, 1.12 * max(values) or 1)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    _hover(axes, steps, values, [f"{name}, step {step:,}: {short_number(value)}" for step, value in points])


def _hover(axes: Axes, steps: Any, values: Any, titles: list[str]) -> None:
    """Marks that nobody sees, but that tell their values."""
    (marks,) = axes.plot(steps, values, linestyle="none", marker="o", markersize=9, color=INK, alpha=0, label="_values")
    with_titles(marks, titles)


def _happened(record: RunRecord) -> dict[int, str]:
    """What changed the model, by step."""
    counts = Counter(drop.step for drop in record.plan.drops) if record.plan else Counter()
    parts: dict[int, list[str]] = {step: [f"{counts[step]} dropped"] for step in drop_steps(record.plan)}
    for step, what in record.events:
        parts.setdefault(step, []).append(what)
    return {step: f"{', '.join(parts[step])} at {step}" for step in sorted(parts)}
