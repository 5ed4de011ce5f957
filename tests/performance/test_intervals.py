"""Bootstrap intervals against the exact distribution of resampled medians."""

import math
import random
import statistics

import pytest

from layershed.performance.intervals import Interval, bootstrap_interval


def at_most(k, n):
    """Probability that the median of n draws from n sorted values is at most the k-th value."""
    return sum(math.comb(n, i) * (k / n) ** i * (1 - k / n) ** (n - i) for i in range(n // 2 + 1, n + 1))


def holds(k, n):
    """Probability that the true median lies between the k-th lowest and the k-th highest of n values."""
    return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n


@pytest.mark.parametrize("n", [1, 3, 5, 6, 7, 9, 10, 13, 19, 40])
def test_interval_is_the_wider_of_bootstrap_and_order_statistics(n):
    values = [1 + i / 100 for i in range(n)]
    random.Random(0).shuffle(values)
    bootstrap = next(k for k in range(1, n + 1) if n % 2 == 0 or at_most(k, n) >= 0.025)
    order = max([k for k in range(1, n // 2 + 1) if holds(k, n) >= 0.95], default=1)
    found = bootstrap_interval(values)
    if n % 2:
        # the quantile is well inside its step, so 2,000 resamples cannot decide otherwise
        assert at_most(bootstrap - 1, n) < 0.016
        assert at_most(bootstrap, n) > 0.03
        k = min(bootstrap, order)
        assert (found.low, found.high) == (1 + (k - 1) / 100, 1 + (n - k) / 100)
    assert found.median == statistics.median(values)
    assert found.low <= 1 + (order - 1) / 100
    assert (not found.doubt) == (holds(1, n) >= 0.95)


@pytest.mark.parametrize("n", [6, *(pytest.param(n, marks=pytest.mark.slow) for n in (7, 9, 10))])
def test_interval_holds_the_true_median_in_95_percent_of_samples(n):
    generator = random.Random(n)
    rounds = 300
    found = [bootstrap_interval([generator.lognormvariate(0, 1) for _ in range(n)]) for _ in range(rounds)]
    held = sum(interval.low <= 1 <= interval.high for interval in found)
    # three standard errors below 95 %
    assert held / rounds > 0.95 - 3 * (0.95 * 0.05 / rounds) ** 0.5


def test_interval_of_equal_values_has_no_width():
    assert bootstrap_interval([1.25] * 7) == Interval(1.25, 1.25, 1.25)
    assert bootstrap_interval([1.25]) == Interval(1.25, 1.25, 1.25)


@pytest.mark.parametrize("n", [2, 9, 15, 24])
def test_interval_is_symmetric_and_deterministic(n):
    generator = random.Random(1)
    values = [generator.gauss(1, 0.1) for _ in range(n)]
    state = random.getstate()
    there, back = bootstrap_interval(values), bootstrap_interval([-value for value in values])
    assert (back.low, back.median, back.high) == (-there.high, -there.median, -there.low)
    assert there == bootstrap_interval(values)
    assert there.low < there.median < there.high
    assert random.getstate() == state


def test_interval_widens_with_spread_and_narrows_with_count():
    generator = random.Random(1)
    noise = [generator.gauss(0, 1) for _ in range(101)]
    few, wide, many = (
        bootstrap_interval([1 + scale * x for x in part])
        for scale, part in ((0.01, noise[:11]), (0.1, noise[:11]), (0.01, noise))
    )
    assert wide.high - wide.low == pytest.approx(10 * (few.high - few.low))
    assert many.high - many.low < few.high - few.low
