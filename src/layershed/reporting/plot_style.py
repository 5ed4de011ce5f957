"""The look of the pictures: colours, type, and figures without pyplot and its global state."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2328", "#59636e", "#e4e7ea"
TEXT: dict[str, Any] = {"color": INK, "fontsize": 9}
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": INK}


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty figure.

    Args:
        size: Width and height in inches.
    """
    figure = Figure(figsize=size, dpi=200, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def plain_axes(axes: Axes) -> None:
    """Style axes for lines: a light grid under the lines, and no frame at the top and on the right."""
    axes.set_facecolor("white")
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=9, colors=MUTED, labelcolor=INK)
