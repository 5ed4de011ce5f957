"""The speedup degradation ratio of a drop: how many points of which quality it cost per percent of which speed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from layershed.formatting import printable
from layershed.performance.intervals import Interval
from layershed.performance.speed_report import MeasuredSpeed, PhaseSpeed

Better = Literal["max", "min"]
# The qualities that SublayerDrop measures around the drop, and whether higher or lower is better.
AROUND_THE_DROP: dict[str, Better] = {"accuracy": "max", "loss": "min", "perplexity": "min"}
_POINTS = {
    "accuracy": "points of next-token accuracy",
    "loss": "hundredths of the loss",
    "perplexity": "hundredths of the perplexity",
}


@dataclass(frozen=True)
class Degradation:
    """An SDR. ``str`` shows it.

    Args:
        ratio: Points lost per percent of speed gained; NaN if no speedup is measurable or none was gained.
        quality: What the points are of: ``accuracy``, ``loss``, ``perplexity`` or a metric of the module.
        phase: The phase whose speedup counts.
        doubt: Why it is NaN; empty if it is a number.
    """

    ratio: float
    quality: str
    phase: str
    doubt: str = ""

    def __str__(self) -> str:
        """Format it with its unit."""
        if math.isnan(self.ratio):
            return f"undefined ({self.doubt})"
        points = _POINTS.get(self.quality) or f"points of {printable(self.quality)}"
        return f"{round(self.ratio, 2) + 0.0:.2f} {points} per % of {self.phase} speed"


def degradation(
    before: Mapping[str, float],
    after: Mapping[str, float],
    speed: MeasuredSpeed,
    *,
    quality: str = "accuracy",
    better: Better | None = None,
    phase: str = "decode",
    earlier: MeasuredSpeed | None = None,
) -> Degradation | None:
    """Compute the SDR of a drop.

    Args:
        before: Qualities before the drop, by name. A point is 0.01 of any of them.
        after: The same qualities after it.
        speed: The measured speed, against the dense model.
        quality: Which quality counts. Where there is no ``accuracy``, the loss takes its place. ``perplexity`` is that
            of the loss.
        better: Whether ``max`` or ``min`` is better; needed only for a metric of the module.
        phase: The phase whose speedup counts; of a model that does not decode it is the forward pass.
        earlier: The measured speed before this drop; None for the dense model. The interval of what was gained since
            then reaches from the lowest over the highest to the highest over the lowest.

    Returns:
        The SDR; None if the quality is unknown before or after.
    """
    for name in (quality, "loss") if quality == "accuracy" else (quality,):
        measured = "loss" if name == "perplexity" else name
        if measured in before and measured in after:
            lost = _value(after[measured], name) - _value(before[measured], name)
            sign = -1 if AROUND_THE_DROP.get(name, better) == "max" else 1
            shown, of_phase = speed.chosen(phase)
            if earlier is not None:
                of_phase = _since(of_phase, earlier.chosen(phase)[1])
            ratio = of_phase.degradation(100 * sign * lost)
            doubt = (of_phase.doubt or "no speed gained") if math.isnan(ratio) else ""
            return Degradation(ratio, name, shown, doubt)
    return None


def _value(number: float, name: str) -> float:
    return math.exp(number) if name == "perplexity" else number


def _since(phase: PhaseSpeed, earlier: PhaseSpeed) -> PhaseSpeed:
    now, then = phase.speedup, earlier.speedup
    fewest = min((n for n in (now.values, then.values) if n is not None), default=None)
    gained = Interval(now.median / then.median, now.low / then.high, now.high / then.low, fewest)
    return replace(phase, speedup=gained)
