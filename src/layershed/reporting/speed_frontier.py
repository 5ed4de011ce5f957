"""The frontier of a sweep: quality against measured speedup, one line per scope."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from layershed.performance.intervals import Interval
from layershed.planning.plan import Scope
from layershed.reporting.plot_style import INK, LEGEND, MUTED, TEXT, new_figure, plain_axes

# Okabe and Ito's colours, which colour-blind readers can tell apart, and markers for print in black and white.
_STYLES: dict[Scope, tuple[str, str]] = {
    "attention": ("#0072b2", "o"),
    "cross_attention": ("#e69f00", "v"),
    "mlp": ("#d55e00", "s"),
    "joint": ("#009e73", "D"),
    "block": ("#cc79a7", "^"),
}
# Scopes whose count is written below the point: Joint Layer Drop starts with attentions, and the counts would overlap.
_BELOW: set[Scope] = {"joint", "mlp"}
_NAMES: dict[Scope, str] = {
    "attention": "Attention Drop",
    "cross_attention": "Cross-attention Drop",
    "mlp": "MLP Drop",
    "joint": "Joint Layer Drop",
    "block": "Block Drop",
}


@dataclass(frozen=True)
class FrontierPoint:
    """One dropped model of a sweep.

    Args:
        scope: What was ranked.
        count: How many were dropped; written beside the point.
        quality: In the unit of the axis.
        prefill: Measured speedup with its 95 % interval.
        decode: The same of decoding.
    """

    scope: Scope
    count: int
    quality: float
    prefill: Interval
    decode: Interval


def frontier_figure(
    points: Sequence[FrontierPoint], dense: float, label: str, *, title: str = "", log_scale: bool = False
) -> Figure:
    """Draw quality against measured speedup, prefill beside decode.

    Every scope has a line. It begins at the dense model, at a speedup of 1, and follows the points by count. Horizontal
    bars show the 95 % intervals of the speedup.

    Args:
        points: The dropped models.
        dense: Quality of the dense model.
        label: Name of the quality, with its unit.
        title: Title of the whole figure.
        log_scale: Whether the axis of quality is logarithmic.

    Returns:
        The figure; each panel has one line per scope, in the order of ``points``.
    """
    figure = new_figure((10.0, 4.4))
    panels = figure.subplots(1, 2, sharey=True)
    scopes = list(dict.fromkeys(point.scope for point in points))
    for axes, phase in zip(panels, ("prefill", "decode"), strict=True):
        plain_axes(axes)
        axes.set_title(phase, loc="left", fontsize=10.5, fontweight="bold", color=INK)
        axes.set_xlabel(f"measured {phase} speedup (dropped / dense), 95 % interval", **TEXT)
        axes.axvline(1, color=MUTED, linewidth=0.8, linestyle=(0, (4, 2.5)), zorder=1)
        if log_scale:
            axes.set_yscale("log")
        handles: list[Artist] = [_line(axes, scope, points, dense, phase) for scope in scopes]
        handles += axes.plot(1, dense, "*", color=INK, markersize=11, zorder=4, label="dense")
        axes.tick_params(labelleft=True)
    panels[0].set_ylabel(label, **TEXT)
    if title:
        figure.suptitle(title, fontsize=11, color=INK, parse_math=False)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), **LEGEND)
    return figure


def _line(axes: Axes, scope: Scope, points: Sequence[FrontierPoint], dense: float, phase: str) -> Artist:
    colour, marker = _STYLES[scope]
    own = sorted((point for point in points if point.scope == scope), key=lambda point: point.count)
    speedups: list[Interval] = [getattr(point, phase) for point in own]
    x, y = [speedup.median for speedup in speedups], [point.quality for point in own]
    bars = [[at.median - at.low for at in speedups], [at.high - at.median for at in speedups]]
    (line,) = axes.plot([1, *x], [dense, *y], color=colour, linewidth=1.5, label=_NAMES[scope], zorder=2)
    line.set_marker(marker)
    line.set_markersize(5)
    line.set_markevery(slice(1, None))  # the dense model has a mark of its own
    if scope == "joint":
        # a ring around the mark of Attention Drop, where both are the same model
        line.set_markerfacecolor("none")
        line.set_markersize(9)
    axes.errorbar(x, y, xerr=bars, fmt="none", ecolor=colour, elinewidth=0.9, capsize=2, alpha=0.7, zorder=2)
    for point, at in zip(own, x, strict=True):
        place, away = (at, point.quality), -6 if scope in _BELOW else 5
        text: dict[str, Any] = {"ha": "center", "va": "top" if away < 0 else "baseline", "fontsize": 8, "color": colour}
        axes.annotate(str(point.count), place, (0, away), textcoords="offset points", **text)
    return line
