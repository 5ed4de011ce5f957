"""Learning-rate schedules by name, as shares of the peak rate. Same formulas as transformers.get_scheduler."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine"]


def share_of_peak(schedule: Schedule, step: int, warmup: int, total: float) -> float:
    """Share of the peak learning rate at an optimizer step, counted from 0.

    The share rises linearly over the warm-up, then::

        linear: (total - step) / (total - warmup)
        cosine: (1 + cos(pi * (step - warmup) / (total - warmup))) / 2

    Args:
        schedule: Name of the schedule; ``constant`` has no warm-up.
        step: Optimizer steps taken so far.
        warmup: Optimizer steps of the warm-up.
        total: Optimizer steps of the run; infinite for a run without an end.

    Example:
        >>> [share_of_peak("linear", step, warmup=2, total=6) for step in range(7)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if schedule == "constant":
        return 1.0
    if step < warmup:
        return step / warmup
    if schedule == "constant_with_warmup" or total == math.inf:
        return 1.0
    length = max(1, total - warmup)
    if schedule == "linear":
        return max(0.0, (total - step) / length)
    return max(0.0, (1 + math.cos(math.pi * (step - warmup) / length)) / 2)
