"""Thinning against lists that keep everything."""

import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layershed.reporting.downsampling import ThinnedCurve, shown_steps


def curve_of(count, most=10, marks=()):
    """A curve of the points (3 i, i) with marks after the given points, and its greatest length."""
    curve, longest = ThinnedCurve(most), 0
    for number in range(count):
        curve.add(3 * number, float(number))
        if number in marks:
            curve.mark()
        longest = max(longest, len(list(curve)))
    return curve, longest


@given(st.integers(0, 200), st.integers(4, 20), st.sets(st.integers(0, 200), max_size=4))
@settings(max_examples=60, deadline=None)
def test_thinned_curve_stays_short_and_keeps_ends_and_marks(count, most, marks):
    curve, longest = curve_of(count, most, marks)
    kept = [int(value) for _, value in curve]
    assert list(curve) == [(3 * number, float(number)) for number in kept], "points are left out, not changed"
    assert kept == sorted(set(kept))
    wanted = {number for mark in marks for number in (mark, mark + 1)} | {0, count - 1}
    assert wanted & set(range(count)) <= set(kept)
    assert longest <= most + 1 + 2 * len(marks)
    # of each stretch as much as of any other
    stride = 2 * max(1, 2 ** math.ceil(math.log2(count / most))) if count else 1
    assert set(range(0, count, stride)) <= set(kept)


@pytest.mark.parametrize("cut", [0, 1, 10, 11, 12, 57, 58, 300])
def test_thinned_curve_restored_midway_goes_on_the_same(cut):
    whole, _ = curve_of(301, marks={56, 57})
    first, _ = curve_of(cut, marks={56, 57})
    second = ThinnedCurve(10)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for number in range(cut, 301):
        second.add(3 * number, float(number))
        if number in (56, 57):
            second.mark()
    assert second.state_dict() == whole.state_dict()
    assert second.last_step == 900


def test_empty_curve_has_no_points_and_no_last_step():
    curve = ThinnedCurve()
    assert (list(curve), curve.last_step) == ([], None)
    curve.mark()
    curve.add(7, 0.5)
    assert (list(curve), curve.last_step) == ([(7, 0.5)], 7)


@given(
    st.sets(st.integers(0, 500), min_size=1),
    st.sets(st.integers(0, 500), max_size=3),
    st.integers(2, 30),
)
@settings(max_examples=60, deadline=None)
def test_shown_steps_keep_both_ends_and_neighbours_of_drops(steps, around, most):
    steps = sorted(steps)
    shown = shown_steps(steps, around, most)
    assert shown == sorted(set(shown) & set(steps))
    if len(steps) <= most:
        assert shown == steps
        return
    wanted = {steps[0], steps[-1]}
    for drop in around:
        wanted |= {max((s for s in steps if s < drop), default=steps[0]), drop}
        wanted |= {min((s for s in steps if s > drop), default=steps[-1])}
    assert wanted & set(steps) <= set(shown)
    assert len(shown) <= most + 1 + 3 * len(around)
    places = [steps.index(step) for step in shown]
    assert max(b - a for a, b in itertools.pairwise(places)) <= math.ceil((len(steps) - 1) / (most - 1))
