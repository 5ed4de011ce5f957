"""Steps marked in a picture: drops, and what else changed the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

from matplotlib.artist import Artist
from matplotlib.axes import Axes

from layershed.reporting.plot_style import INK, with_titles

# More labels than this do not fit beside one another, even when they are turned on end.
_MOST_LABELS = 16


def mark_steps(axes: Axes, labels: Mapping[int, str], underlay: str | None = None) -> list[Artist]:
    """Draw a dashed line at each of some steps, named above the axes.

    Args:
        axes: The axes, whose x axis counts steps; it is widened to hold them.
        labels: What to write, by step, ascending.
        underlay: Colour of a wider line under each, for a picture full of colours.

    Returns:
        If the names would overlap, only the steps are written, vertically, and one line for a legend is returned.
    """
    if not labels:
        return []
    low, high = axes.get_xlim()
    low, high = min(low, *labels), max(high, *labels)
    axes.set_xlim(low, high)
    width = axes.get_window_extent().width / axes.figure.dpi  # inches
    crowded = any((right - left) / (high - low) * width < 1.4 for left, right in pairwise(labels))
    stride = math.ceil(len(labels) / _MOST_LABELS)
    lines: list[Artist] = []
    for place, (step, label) in enumerate(labels.items()):
        if underlay:
            axes.axvline(step, color=underlay, linewidth=2.4)
        line = axes.axvline(step, color=INK, linewidth=1.2, linestyle=(0, (4, 2.5)), label="drop, step above")
        with_titles(line, [label])
        lines.append(line)
        if place % stride == 0:
            where = (step - low) / (high - low)
            align = "left" if where < 0.2 else "right" if where > 0.8 else "center"
            place_text = {"ha": "center", "rotation": 90} if crowded else {"ha": align}
            text, at, frame = str(step) if crowded else label, (step, 1), ("data", "axes fraction")
            axes.annotate(text, at, (0, 4), frame, "offset points", va="bottom", fontsize=8, color=INK, **place_text)
    return lines[:1] if crowded else []
