"""Cross products of parameters, of which the default run takes a diagonal."""

import itertools

import pytest


def crossed(*axes):
    """All combinations for ``pytest.mark.parametrize``, as many of them not slow as the longest axis has values.

    Of every axis, each value is in one that is not slow: the i-th takes the i-th value of the longest axis, and of a
    shorter one goes on from its beginning.
    """
    axes = [list(axis) for axis in axes]
    chosen = {tuple(i % len(axis) for axis in axes) for i in range(max(map(len, axes)))}
    return [
        pytest.param(
            *(axis[i] for axis, i in zip(axes, places, strict=True)),
            marks=() if places in chosen else pytest.mark.slow,
        )
        for places in itertools.product(*(range(len(axis)) for axis in axes))
    ]


def some_of(values, every):
    """Values for ``pytest.mark.parametrize``: each ``every``-th from the first on, the others slow."""
    return [value if place % every == 0 else _slow(value) for place, value in enumerate(values)]


def one_of(values):
    """Values for ``pytest.mark.parametrize``, all but the first of them slow."""
    first, *others = values
    return [first, *map(_slow, others)]


def _slow(value):
    """Of a tuple, each part is a parameter."""
    return pytest.param(*value if isinstance(value, tuple) else (value,), marks=pytest.mark.slow)
