"""Importances of one moment as bars, one panel per kind, and speedups with their intervals. No pyplot."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter

from layershed.errors import DataError
from layershed.performance.speed_report import MeasuredSpeed
from layershed.planning.notation import short_importance
from layershed.reporting.plot_style import (
    DROPPED,
    INK,
    KEPT,
    LEGEND,
    MUTED,
    TEXT,
    VAL,
    new_figure,
    plain_axes,
    value_scale,
    with_titles,
)
from layershed.reporting.record import PANELS, ImportancePoint

_TIMES = "\N{MULTIPLICATION SIGN}"


def importance_bars(
    points: Sequence[ImportancePoint], dropped: Collection[tuple[str, int]] = (), *, stacked: bool = False
) -> Figure:
    """Draw importances as bars: a row per block, block 0 at the top, a panel per kind, on one scale.

    Bars of dropped sublayers are hatched and have another colour. The scale is logarithmic if the values span more than
    two decades.

    Args:
        points: The importances, all of one metric; the later of two for the same sublayer counts.
        dropped: (kind, block) of what was dropped.
        stacked: Put the panels above one another, for a phone.

    Raises:
        DataError: If there are no points, or points of several metrics.
    """
    metrics = sorted({point.metric for point in points})
    if len(metrics) != 1:
        raise DataError(f"A picture shows the importances of one metric, got {len(metrics)}: {metrics}.")
    values = {(point.kind, point.block): point.value for point in points}
    kinds = [kind for kind in PANELS if any(own == kind for own, _ in values)]
    blocks = sorted({block for _, block in values})
    finite = [value for value in values.values() if math.isfinite(value)]
    log = isinstance(value_scale(finite), LogNorm)
    low = min((value for value in finite if value > 0), default=1.0) / 2 if log else 0.0
    high = max([value for value in finite if value > 0], default=1.0)

    height = 0.19 * (blocks[-1] + 1) + 0.75
    figure = new_figure((3.8, height * len(kinds) + 0.7) if stacked else (10.0, height + 0.75))
    shape = (len(kinds), 1) if stacked else (1, len(kinds))
    panels = figure.subplots(*shape, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, kind in zip(panels, kinds, strict=True):
        plain_axes(axes)
        axes.grid(visible=False, axis="y")
        own = [block for block in blocks if (kind, block) in values]
        widths = [_shown(values[kind, block], low, high) for block in own]
        gone = [(kind, block) in dropped for block in own]
        bars = axes.barh(own, [width - low for width in widths], left=low, height=0.72, color=KEPT)
        for bar, block, out in zip(bars, own, gone, strict=True):
            value = short_importance(values[kind, block])
            if out:
                bar.set(facecolor=DROPPED, edgecolor="#fefefe", hatch="////", linewidth=0)
            with_titles(bar, [f"block {block}, {PANELS[kind]}: {value}{', dropped' if out else ''}"])
            axes.annotate(
                *(value, (bar.get_x() + bar.get_width(), block), (3, 0), "data", "offset points"),
                **{"va": "center", "fontsize": 7.5, "color": INK, "fontweight": "bold" if out else "normal"},
            )
        axes.set_title(PANELS[kind], loc="left", fontsize=10.5, fontweight="bold", color=INK)
        axes.tick_params(labelleft=True, left=False)
        axes.set_yticks(range(0, blocks[-1] + 1, math.ceil((blocks[-1] + 1) / 40)))
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
        axes.set_xlim(low, high * (high / low) ** 0.2 if log else high * 1.22)  # room for the values
        axes.set_ylim(-0.7, blocks[-1] + 0.7)
    panels[0].invert_yaxis()
    for axes in panels if stacked else panels[:1]:
        axes.set_ylabel("block", **TEXT)
    scale = ", log scale" if log else ""
    for axes in panels[-1:] if stacked else panels:
        axes.set_xlabel(f"importance{scale}", **TEXT)
    if any(key in dropped for key in values):
        patch = Patch(facecolor=DROPPED, edgecolor="#fefefe", hatch="////", label="dropped")
        kept = Patch(facecolor=KEPT, label="kept")
        figure.legend(handles=[patch, kept], loc="outside lower center", ncols=2, **LEGEND)
    return figure


def speed_figure(speed: MeasuredSpeed, *, narrow: bool = False) -> Figure:
    """Draw the speedup of each phase with its 95 % interval, beside what the roofline model predicts.

    Args:
        speed: The measurement.
        narrow: Draw for a phone.
    """
    phases = list(speed.phases.items())
    figure = new_figure(((3.8 if narrow else 10.0), 0.42 * len(phases) + 1.0))
    axes = figure.subplots()
    plain_axes(axes)
    axes.grid(visible=False, axis="y")
    axes.axvline(1, color=MUTED, linewidth=1.2, linestyle=(0, (4, 2.5)))
    handles: dict[str, Any] = {}
    for row, (_, phase) in enumerate(phases):
        at, told = phase.speedup, f"{_TIMES}{phase.speedup.median:.2f}"
        if not at.doubt:
            axes.plot([at.low, at.high], [row, row], color=VAL, linewidth=2.4, solid_capstyle="butt")
            told += f" [{at.low:.2f}, {at.high:.2f}]"
        (mark,) = axes.plot([at.median], [row], "o", color=VAL, markersize=8, label="measured, with 95 % interval")
        with_titles(mark, [f"{phases[row][0]}: {told}{f', {phase.doubt}' if phase.doubt else ''}"])
        handles["measured"] = mark
        if phase.predicted is not None:
            style: dict[str, Any] = {"markersize": 7, "markerfacecolor": "none", "color": INK}
            (theory,) = axes.plot([phase.predicted], [row], "D", **style, label="in theory")
            with_titles(theory, [f"{phases[row][0]}, in theory: {_TIMES}{phase.predicted:.2f}"])
            handles["theory"] = theory
    axes.set_yticks(range(len(phases)), [name for name, _ in phases])
    axes.set_ylim(len(phases) - 0.5, -0.5)
    axes.set_xlabel("speedup, dropped over dense", **TEXT)
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=2, **LEGEND)
    return figure


def _shown(value: float, low: float, high: float) -> float:
    """Where a bar ends; a value that is no number has none."""
    return min(max(value, low), high) if math.isfinite(value) else low
