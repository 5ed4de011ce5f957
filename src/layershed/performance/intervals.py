"""Medians with their 95 % intervals. Deterministic, without torch."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

_RESAMPLES = 2000
# With fewer values no interval reaches 95 %: all lie on one side of the median with probability 2 * 0.5**n.
ENOUGH = 6


@dataclass(frozen=True)
class Interval:
    """A median with its 95 % interval.

    Args:
        median: Median of the values.
        low: Lower end.
        high: Upper end.
        values: Number of values; None if unknown. Below six, the ends are the lowest and highest value, and the
            interval holds the median less often.
    """

    median: float
    low: float
    high: float
    values: int | None = field(default=None, compare=False)

    @property
    def doubt(self) -> str:
        """Why this is no 95 % interval; empty if it is one."""
        if self.values is None or self.values >= ENOUGH:
            return ""
        return f"{self.values} pair{'s' if self.values > 1 else ''}; an interval needs {ENOUGH}"

    def excludes(self, value: float) -> bool:
        """Whether the value lies outside."""
        return not self.low <= value <= self.high


def bootstrap_interval(values: Sequence[float]) -> Interval:
    """Compute the median and its 95 % interval: a deterministic percentile bootstrap, widened if it is too narrow.

    With few values the bootstrap interval (Efron and Tibshirani 1993, chapter 13) holds the median too seldom: with
    seven values in 87 % of cases. The interval therefore reaches at least from the k-th lowest to the k-th highest
    value, with the largest k for which 2 P(Bin(n, 1/2) < k) <= 5 %. That holds the median with 95 % for every
    distribution (David and Nagaraja 2003, section 7.1).

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
