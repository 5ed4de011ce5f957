"""Importance over training as a picture. No model, no torch and no pyplot, so no global state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from layershed.errors import DataError
from layershed.planning.notation import short_importance
from layershed.planning.plan import DropPlan
from layershed.reporting.downsampling import shown_steps
from layershed.reporting.marks import mark_steps
from layershed.reporting.plot_style import (
    CARD,
    COLOURS,
    GONE,
    GONE_LINES,
    INK,
    LEGEND,
    MUTED,
    TEXT,
    new_figure,
    value_scale,
    with_titles,
)
from layershed.reporting.record import PANELS, ImportancePoint, drop_steps

_DROPPED: dict[str, Any] = {"facecolor": GONE, "edgecolor": GONE_LINES, "hatch": "////", "linewidth": 0.0}
# Over a cell that keeps its colour: its importance was measured before the drop.
_CROSSED: dict[str, Any] = {"facecolor": "none", "edgecolor": "#fefefe", "hatch": "////", "linewidth": 0.0}
# Every cell is an element of the page, with its value.
MOST_COLUMNS = 60


def importance_heatmap(
    points: Sequence[ImportancePoint], plan: DropPlan | None = None, *, stacked: bool = False
) -> Figure:
    """Draw importance over training: blocks by steps, one panel per kind, on one colour scale.

    - A dropped sublayer has no importance; its cells are hatched. Cells without a value for other reasons stay white.
    - Of a single measurement before a drop outside training, the cells of what was then dropped are hatched in colour.
    - The colour scale is logarithmic if the values span more than two decades.
    - A single measurement has no axis of steps.
    - Of more than ``MOST_COLUMNS`` measurements some are left out at equal distances, but none next to a drop.

    Args:
        points: The importances, all of one metric. The later of two for the same cell counts.
        plan: What was dropped and when.
        stacked: Put the panels above one another, for a phone.

    Returns:
        A figure whose panels hold one mesh each, of shape (blocks, steps), NaN where there is no value.

    Raises:
        DataError: If there are no points, or points of several metrics.
    """
    metrics = sorted({point.metric for point in points})
    if len(metrics) != 1:
        raise DataError(f"A heat map shows the importances of one metric, got {len(metrics)}: {metrics}.")
    steps = shown_steps(sorted({point.step for point in points}), drop_steps(plan), MOST_COLUMNS)
    shown = set(steps)
    cells = {(point.kind, point.block, point.step): point.value for point in points if point.step in shown}
    dropped = _dropped_at(plan)
    kinds = [kind for kind in PANELS if any(point.kind == kind for point in points)]
    blocks = sorted({point.block for point in points} | {block for _, block in dropped})
    edges = _column_edges(steps, cells, dropped)
    norm = value_scale([value for value in cells.values() if math.isfinite(value)])

    height = min(max(0.24 * len(blocks), 2.0), 9.0)
    size = (3.8, (height + 0.9) * len(kinds) + 0.7) if stacked else (10.0, height + 1.4)
    figure = new_figure(size)
    shape = (len(kinds), 1) if stacked else (1, len(kinds))
    panels = figure.subplots(*shape, sharey=True, squeeze=False).ravel()
    for axes, kind in zip(panels, kinds, strict=True):
        grid = np.array([[cells.get((kind, block, step), math.nan) for step in steps] for block in blocks])
        rows = np.arange(len(blocks) + 1) - 0.5
        # with an edge of its own colour a cell leaves no gap to the next one
        mesh = axes.pcolormesh(edges, rows, grid, norm=norm, cmap=COLOURS, edgecolors="face", linewidth=0.3)
        with_titles(mesh, [_title(block, kind, step, cells) for block in blocks for step in steps])
        for row, block in enumerate(blocks):
            _hatch(axes, row, edges, steps, grid[row], dropped.get((kind, block), math.inf))
        _style_panel(axes, PANELS[kind], blocks, steps)
        lines = mark_steps(axes, {step: f"drop at {step}" for step in drop_steps(plan)}, underlay=CARD)
    panels[0].invert_yaxis()  # shared: block 0 is at the top, as in every table
    for axes in panels if stacked else panels[:1]:
        axes.set_ylabel("block", **TEXT)
    for axes in panels if len(steps) == 1 else ():
        axes.set_xticks([])
    for axes in panels[-1:] if stacked else panels:
        axes.set_xlabel("" if len(steps) == 1 else "optimizer step", **TEXT)
    _add_scale(figure, mesh, list(panels), stacked)
    hatched = [patch for axes in panels for patch in axes.patches]
    if hatched:
        crossed = hatched[0].get_facecolor()[3] == 0
        patch = Patch(**_DROPPED, label="dropped: no importance left to measure")
        if crossed:
            patch = Patch(**{**_CROSSED, "facecolor": "#414487"}, label="dropped")
        figure.legend(handles=[patch, *lines], loc="outside lower center", ncols=1 + (not stacked), **LEGEND)
    return figure


def _title(block: int, kind: str, step: int, cells: Mapping[tuple[str, int, int], float]) -> str:
    value = cells.get((kind, block, step))
    shown = "no value" if value is None or math.isnan(value) else short_importance(value)
    return f"block {block}, {PANELS[kind]}, step {step:,}: {shown}"


def _hatch(axes: Axes, row: int, edges: list[float], steps: list[int], values: Iterable[float], since: float) -> None:
    """Hatch the cells of a row from the step of its drop on."""
    missing = [math.isnan(value) for value in values]
    for start, stop in _runs(gone and step >= since for step, gone in zip(steps, missing, strict=True)):
        axes.add_patch(Rectangle((edges[start], row - 0.5), edges[stop] - edges[start], 1, **_DROPPED))
    if since == -math.inf and missing == [False]:
        axes.add_patch(Rectangle((edges[0], row - 0.5), edges[1] - edges[0], 1, **_CROSSED))


def _dropped_at(plan: DropPlan | None) -> dict[tuple[str, int], float]:
    """The step at which each (kind, block) was dropped; minus infinity for a drop outside training."""
    gone: dict[tuple[str, int], float] = {}
    for drop in plan.drops if plan else ():
        gone[drop.sublayer.kind, drop.sublayer.block] = -math.inf if drop.step is None else drop.step
    for kind, block in [key for key in gone if key[0] == "attention"]:
        if ("mlp", block) in gone:  # only without both does the block do nothing
            gone["block", block] = max(gone[kind, block], gone["mlp", block])
    return gone


def _column_edges(
    steps: list[int], cells: Mapping[tuple[str, int, int], float], dropped: Mapping[tuple[str, int], float]
) -> list[float]:
    """Edges of the columns: halfway between two measurements, or at the drop that lies between them.

    A measurement at the step of a drop was made before the drop if the dropped sublayer has a value there.
    """
    drops = sorted({step for step in dropped.values() if math.isfinite(step)})
    before = {step: any((*key, step) in cells for key, at in dropped.items() if at == step) for step in drops}
    gaps = [right - left for left, right in pairwise(steps)] or [1]
    edges: list[float] = []
    for left, right in pairwise([steps[0] - gaps[0], *steps, steps[-1] + gaps[-1]]):
        cuts = [
            at for at in drops if left < at < right or (at == left and before[at]) or (at == right and not before[at])
        ]
        edges.append(cuts[0] if cuts else (left + right) / 2)
    return edges


def _runs(flags: Iterable[bool]) -> Iterator[tuple[int, int]]:
    """Half-open index ranges of the consecutive true flags."""
    for flag, group in groupby(enumerate(flags), key=lambda pair: pair[1]):
        places = [place for place, _ in group]
        if flag:
            yield places[0], places[-1] + 1


def _style_panel(axes: Axes, title: str, blocks: list[int], steps: list[int]) -> None:
    axes.set_title(title, loc="left", pad=20, fontsize=10.5, fontweight="bold", color=INK)
    axes.set_facecolor(CARD)
    stride = math.ceil(len(blocks) / 16)
    axes.set_yticks(range(0, len(blocks), stride), [str(block) for block in blocks[::stride]])
    ticks = MaxNLocator(5, integer=True).tick_values(steps[0], steps[-1])
    axes.set_xticks([tick for tick in ticks if steps[0] <= tick <= steps[-1]])
    axes.tick_params(labelsize=9, colors=MUTED, labelcolor=INK, labelleft=True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _add_scale(figure: Figure, mesh: QuadMesh, panels: list[Axes], stacked: bool) -> None:
    # The bar is 0.13 inch thick at any length.
    length = 3.0 if stacked else figure.get_figheight() - 1.4
    where: dict[str, Any] = {"location": "bottom" if stacked else "right", "aspect": length / 0.13}
    bar = figure.colorbar(mesh, ax=panels, fraction=0.05, pad=0.02, **where)
    scale = ", log scale" if isinstance(bar.norm, LogNorm) else ""
    bar.set_label(f"importance{scale} (low = redundant)", **TEXT)
    bar.ax.tick_params(labelsize=9, colors=MUTED, labelcolor=INK)
    axis = bar.ax.xaxis if stacked else bar.ax.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    if scale:
        axis.set_minor_locator(NullLocator())
    bar.outline.set_visible(False)
