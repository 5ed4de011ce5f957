"""The knee against plain geometry, and counts within a budget."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as some

from layershed.planning.recommendation import (
    MeasuredCount,
    fastest,
    knee,
    knee_of_losses,
    knee_of_scores,
    largest_within,
)


def distance_below(x, y, index):
    """Of a point from the chord, in the unit square, by the area of a triangle."""
    points = [((a - x[0]) / (x[-1] - x[0]), (b - y[0]) / (y[-1] - y[0])) for a, b in zip(x, y, strict=True)]
    (ax, ay), (bx, by), (px, py) = points[0], points[-1], points[index]
    return ((bx - ax) * (ay - py) - (ax - px) * (by - ay)) / math.hypot(bx - ax, by - ay)


@given(
    some.lists(some.integers(1, 50), min_size=2, max_size=12),
    some.lists(some.floats(0.001, 5), min_size=2, max_size=12),
)
def test_knee_is_the_point_furthest_below_the_chord(widths, heights):
    length = min(len(widths), len(heights))
    x, y = [0.0], [0.0]
    for width, height in zip(widths[:length], heights[:length], strict=True):
        x.append(x[-1] + width)
        y.append(y[-1] + height)
    distances = [distance_below(x, y, index) for index in range(len(x))]
    found = knee(x, y)
    if max(distances) < 1e-9:
        assert found is None
    elif found is not None:
        assert distances[found] == pytest.approx(max(distances), abs=1e-9)
        assert 0 < found < len(x) - 1


@pytest.mark.parametrize(
    "y",
    [[0, 1, 2, 3], [0, 2, 3, 3.5], [1, 1, 1, 1], [3, 2, 1, 0], [0, 1], [0, 1, math.nan, 3], [0, 1, 2, math.inf]],
    ids=["a line", "concave", "flat", "falling", "two points", "NaN", "infinite"],
)
def test_curve_without_a_knee_has_none(y):
    assert knee(range(len(y)), y) is None


def at(count, loss, speedup=1.1, measurable=True, scope="attention"):
    return MeasuredCount(scope, count, loss, speedup, measurable)


def test_knee_of_losses_begins_at_the_dense_model_in_any_order():
    points = [at(8, 3.9), at(2, 3.02), at(4, 3.05), at(6, 3.4)]
    assert knee_of_losses(points, 3.0).count == 4
    assert knee_of_losses(points[:1], 3.0) is None


def test_knee_of_scores_counts_those_up_to_the_knee():
    assert knee_of_scores([0.9, 0.01, 0.02, 0.03, 0.5]) == 3
    assert knee_of_scores([0.1, 0.2, 0.3]) is None


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(0.0, None), (0.02, 2), (0.05, 4), (0.4, 6), (9.0, 8)],
    ids=["0", "one", "two", "three", "all"],
)
def test_largest_count_within_a_budget_meets_it(budget, expected):
    points = [at(8, 3.9), at(2, 3.015), at(4, 3.05 - 1e-12), at(6, 3.4 - 1e-12)]
    found = largest_within(points, 3.0, budget)
    assert (None if found is None else found.count) == expected


def test_fastest_prefers_what_is_measurable():
    noisy, sure = at(4, 3.0, 1.5, measurable=False), at(2, 3.0, 1.2)
    assert fastest([noisy, sure]) is sure
    assert fastest([noisy]) is noisy
    assert fastest([]) is None
