"""Medians with their uncertainty. Pure: no torch, the same answer every time."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A median with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float


def bootstrap_interval(values: Sequence[float], *, resamples: int = 2000) -> Interval:
    """Median with its 95 % percentile-bootstrap interval (Efron and Tibshirani 1993, chapter 13), always the same.

    Example:
        >>> bootstrap_interval([1.2, 1.2, 1.2])
        Interval(median=1.2, low=1.2, high=1.2)
    """
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(resamples))
    low, high = medians[int(0.025 * resamples)], medians[int(0.975 * resamples) - 1]
    return Interval(statistics.median(values), low, high)
