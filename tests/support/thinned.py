"""Cross products of parameters, of which the default run takes a row and a column."""

import itertools

import pytest


def crossed(*axes):
    """All combinations for ``pytest.mark.parametrize``; those that leave the first value of two axes or more are slow.

    So the default run has every value of every axis, beside the first values of the others.
    """
    found, axes = [], [list(axis) for axis in axes]
    for values in itertools.product(*axes):
        others = sum(value != axis[0] for value, axis in zip(values, axes, strict=True))
        found.append(pytest.param(*values, marks=pytest.mark.slow if others > 1 else ()))
    return found


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
