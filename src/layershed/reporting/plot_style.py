"""The look of the pictures: colours, type, and figures without pyplot and its global state."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure

INK, MUTED, GRID, CARD = "#1f2328", "#59636e", "#e4e7ea", "#ffffff"
# Okabe and Ito's colours, which colour-blind readers can tell apart; form and hatch say the same.
TRAIN, VAL, CONTROL, KEPT, DROPPED = "#8c98a6", "#0072b2", "#d55e00", "#6f9bc4", "#e0861a"
GONE, GONE_LINES = "#eceef1", "#a3abb5"
# Colours that follow a page's light or dark mode, by the name of its CSS variable; the others stay.
ADAPTIVE = {
    INK: "ink",
    MUTED: "muted",
    GRID: "line",
    CARD: "card",
    TRAIN: "train",
    VAL: "val",
    CONTROL: "control",
    KEPT: "kept",
    DROPPED: "dropped",
    GONE: "gone",
    GONE_LINES: "gone-lines",
}
TEXT: dict[str, Any] = {"color": INK, "fontsize": 9}
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": INK}
# Without its darkest eighth, which a dark page would swallow.
COLOURS = ListedColormap(colormaps["viridis"](np.linspace(0.125, 1, 256)), "importance")
HOVER = "layershed-hover"


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty figure.

    Args:
        size: Width and height in inches.
    """
    figure = Figure(figsize=size, dpi=200, layout="constrained", facecolor=CARD)
    FigureCanvasAgg(figure)
    return figure


def plain_axes(axes: Axes) -> None:
    """Style axes for lines: a light grid under the lines, and no frame at the top and on the right."""
    axes.set_facecolor(CARD)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(labelsize=9, colors=MUTED, labelcolor=INK)


def value_scale(values: list[float]) -> Normalize:
    """The scale of importances: logarithmic if they span more than two decades."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    if positive and max(positive) > 100 * min(positive):
        # Rounding can leave an importance at or a little below 0; clipping draws it as the most redundant.
        return LogNorm(min(positive), max(positive), clip=True)
    return Normalize(min(values, default=0.0), max(values, default=1.0))


def with_titles(artist: Any, titles: list[str]) -> None:
    """Let a reader of an SVG read values by hovering: a title for each mark of the artist, in the order of drawing."""
    figure = artist.get_figure()
    known: list[list[str]] = getattr(figure, "layershed_titles", [])
    artist.set_gid(f"{HOVER}-{len(known)}")
    figure.layershed_titles = [*known, titles]
