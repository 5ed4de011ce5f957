"""What an evaluation found, as plain data. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TaskScore:
    """The score of one task.

    Args:
        task: Its name.
        metric: Its main metric, such as ``acc_norm``.
        value: The score, in [0, 1] for an accuracy.
        stderr: Its standard error; None if unknown.
        calibration_error: Expected calibration error of multiple choice, in [0, 1]: by how much the probability of the
            chosen answer is off, on average. None for other tasks.
        questions: Number of questions.
    """

    task: str
    metric: str
    value: float
    stderr: float | None = None
    calibration_error: float | None = None
    questions: int = 0

    @property
    def is_share(self) -> bool:
        """Whether the score is a share, of which more is better; a perplexity is none."""
        return self.metric != "perplexity"


@dataclass(frozen=True)
class TaskResults:
    """The scores of some tasks.

    Args:
        scores: One for each task.
    """

    scores: tuple[TaskScore, ...]

    @property
    def average(self) -> float:
        """Mean of the scores that are shares, so without perplexities; NaN without any."""
        shares = [score.value for score in self.scores if score.is_share]
        return sum(shares) / len(shares) if shares else math.nan

    @property
    def stderr(self) -> float | None:
        """Standard error of the average, of independent tasks; None if that of a task is unknown."""
        errors = [score.stderr for score in self.scores if score.is_share]
        if not errors or None in errors:
            return None
        return math.sqrt(sum(error * error for error in errors if error is not None)) / len(errors)

    @property
    def values(self) -> dict[str, float]:
        """Score by task, and their average as ``tasks``."""
        return {**{score.task: score.value for score in self.scores}, "tasks": self.average}

    def to_dict(self) -> dict[str, Any]:
        """Convert the results to plain primitives, for JSON."""
        return {"average": self.average, "stderr": self.stderr, "scores": [asdict(score) for score in self.scores]}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> TaskResults:
        """The inverse of :meth:`to_dict`.

        Raises:
            KeyError: If a field is missing, and TypeError if one is unknown.
        """
        return cls(tuple(TaskScore(**score) for score in content["scores"]))


def expected_calibration_error(confidences: Iterable[float], hits: Iterable[bool], bins: int = 15) -> float:
    r"""Expected calibration error.

    .. math:: \sum_b \frac{n_b}{n} \, |\mathrm{acc}(b) - \mathrm{conf}(b)|

    over bins of equal width (Guo et al., arXiv 1706.04599, equation 3).

    Args:
        confidences: Probability of the chosen answer, by question, in [0, 1].
        hits: Whether it was right.
        bins: Number of bins.

    Example:
        >>> round(expected_calibration_error([0.9, 0.9], [True, False]), 6)
        0.4
    """
    pairs = list(zip(confidences, hits, strict=True))
    total = 0.0
    for place in range(bins):
        inside = [(c, hit) for c, hit in pairs if min(int(c * bins), bins - 1) == place]
        total += abs(sum(hit for _, hit in inside) - sum(c for c, _ in inside))
    return total / len(pairs) if pairs else math.nan
