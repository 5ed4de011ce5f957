"""How many to drop: the knee of a curve, and the largest count within a budget. Pure, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from layershed.planning.plan import Scope


@dataclass(frozen=True)
class MeasuredCount:
    """One dropped model of a sweep.

    Args:
        scope: What was ranked.
        count: How many were dropped.
        loss: Its loss on held-out text, in nats per token.
        speedup: Median of the measured decode speedup.
        measurable: Whether the 95 % interval of the speedup leaves 1 out.
    """

    scope: Scope
    count: int
    loss: float
    speedup: float
    measurable: bool


def knee(x: Sequence[float], y: Sequence[float]) -> int | None:
    """The index of the knee of a rising convex curve, by Kneedle's definition.

    Both axes are scaled to [0, 1]; the knee is where the curve lies furthest below the line from its first to its last
    point, argmax of x - y. Before it, more x costs little y; after it, much. (Satopää, Albrecht, Irwin and Raghavan
    2011, "Finding a Kneedle in a Haystack", section III; without its smoothing, as there are few points.)

    Args:
        x: Ascending.
        y: One for each x.

    Returns:
        The index; None below three points, or if no point lies below the line: then the curve has no knee.

    Example:
        >>> knee([0, 1, 2, 3, 4], [0.0, 0.1, 0.2, 1.0, 2.0])
        2
    """
    if len(x) < 3 or len(x) != len(y) or not all(math.isfinite(value) for value in (*x, *y)):
        return None
    width, height = x[-1] - x[0], y[-1] - y[0]
    if width <= 0 or height <= 0:
        return None
    below = [(right - x[0]) / width - (up - y[0]) / height for right, up in zip(x, y, strict=True)]
    best = max(range(len(below)), key=lambda index: (below[index], index))
    return best if below[best] > 1e-9 else None


def knee_of_losses(points: Sequence[MeasuredCount], dense: float) -> MeasuredCount | None:
    """The knee of the losses of one scope over the count; the curve begins at the dense model."""
    own = sorted(points, key=lambda point: point.count)
    found = knee([0, *(point.count for point in own)], [dense, *(point.loss for point in own)])
    return own[found - 1] if found else None


def knee_of_scores(scores: Iterable[float]) -> int | None:
    """How many of the scores, from the lowest, lie up to the knee of the sorted scores."""
    ordered = sorted(scores)
    found = knee(range(1, len(ordered) + 1), ordered)
    return None if found is None else found + 1


def largest_within(points: Iterable[MeasuredCount], dense: float, max_loss_increase: float) -> MeasuredCount | None:
    """Of one scope, the largest measured count whose loss exceeds the dense model's by no more than a budget."""
    fitting = [point for point in points if point.loss - dense <= max_loss_increase]
    return max(fitting, key=lambda point: point.count, default=None)


def fastest(points: Iterable[MeasuredCount]) -> MeasuredCount | None:
    """The point with the highest measurable speedup; if none is measurable, with the highest median."""
    return max(points, key=lambda point: (point.measurable, point.speedup, -point.loss), default=None)
