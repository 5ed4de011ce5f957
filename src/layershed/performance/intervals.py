"""Medians with their uncertainty. Pure: no torch, the same answer every time."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

_RESAMPLES = 2000
# Of fewer values no interval holds the median with 95 %: all are above it, or all below, with 2 * 0.5**n.
ENOUGH = 6


@dataclass(frozen=True)
class Interval:
    """A median with its 95 % interval.

    Args:
        median: Of the values.
        low: Lower end.
        high: Upper end.
        values: How many there were; None if that is not said. Below six, the ends are those of the values, and hold the
            median less often.
    """

    median: float
    low: float
    high: float
    values: int | None = field(default=None, compare=False)

    @property
    def trustworthy(self) -> bool:
        """Whether there were enough values for 95 %."""
        return self.values is None or self.values >= ENOUGH


def bootstrap_interval(values: Sequence[float]) -> Interval:
    """Median with its 95 % interval, always the same: the percentile bootstrap, widened where it is too narrow.

    Of few values the bootstrap (Efron and Tibshirani 1993, chapter 13) of a median holds it too seldom, of seven with
    87 %. So the interval is never narrower than from the k-th lowest to the k-th highest value, with the largest k for
    which 2 P(Bin(n, 1/2) < k) <= 5 %, which holds it with 95 % whatever the distribution (David and Nagaraja 2003,
    section 7.1).

    Args:
        values: Measurements, at least one.

    Example:
        >>> bootstrap_interval([1.2, 1.2, 1.2])
        Interval(median=1.2, low=1.2, high=1.2, values=3)
    """
    generator, n = random.Random(0), len(values)
    medians = sorted(statistics.median(generator.choices(values, k=n)) for _ in range(_RESAMPLES))
    low, high = medians[int(0.025 * _RESAMPLES)], medians[int(0.975 * _RESAMPLES) - 1]
    ordered, k = sorted(values), 1
    while 2 * sum(math.comb(n, i) for i in range(k + 1)) <= 0.05 * 2**n:
        k += 1
    return Interval(statistics.median(values), min(low, ordered[k - 1]), max(high, ordered[n - k]), n)
