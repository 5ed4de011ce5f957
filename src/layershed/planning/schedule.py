"""One-shot and iterative drop schedules. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from layershed.arguments import check_number
from layershed.errors import ScheduleError


@dataclass(frozen=True)
class DropSchedule:
    """The optimizer steps at which sublayers are dropped.

    A one-shot schedule drops everything at ``start``. An iterative schedule drops every ``every_n_steps`` steps, for
    ``rounds`` rounds, and measures importance anew in each round.

    Args:
        start: Number of optimizer steps before the first drop.
        every_n_steps: Steps between two rounds; None for one-shot.
        rounds: Number of drops; 1 for one-shot.

    Raises:
        ScheduleError: If a number is too low, or one-shot and iterative arguments are mixed.

    Example:
        >>> DropSchedule(start=100, every_n_steps=50, rounds=3).steps
        (100, 150, 200)
        >>> DropSchedule(start=100).should_drop(100)
        True
    """

    start: int
    every_n_steps: int | None = None
    rounds: int = 1

    def __post_init__(self) -> None:
        for name in ("start", "rounds", *([] if self.every_n_steps is None else ["every_n_steps"])):
            check_number(getattr(self, name), f"DropSchedule: {name}", ScheduleError, whole=True)
        if self.start < 1:
            raise ScheduleError(f"DropSchedule(start={self.start}): start must be at least 1 optimizer step.")
        if self.rounds < 1:
            raise ScheduleError(f"DropSchedule(rounds={self.rounds}): rounds must be at least 1.")
        if self.every_n_steps is not None and self.every_n_steps < 1:
            raise ScheduleError(f"DropSchedule(every_n_steps={self.every_n_steps}): every_n_steps must be at least 1.")
        if (self.rounds > 1) != (self.every_n_steps is not None):
            raise ScheduleError(
                f"DropSchedule(every_n_steps={self.every_n_steps}, rounds={self.rounds}): an iterative schedule "
                "needs both every_n_steps and rounds above 1; a one-shot schedule needs neither."
            )

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps of all drops, in order."""
        return tuple(self.start + i * (self.every_n_steps or 0) for i in range(self.rounds))

    def should_drop(self, step: int) -> bool:
        """Tell whether to drop after ``step`` optimizer steps."""
        return step in self.steps

    def share_due(self, step: int) -> float:
        """Share of the rounds that are due after ``step`` optimizer steps. The first round always counts as due."""
        return max(1, sum(due <= step for due in self.steps)) / self.rounds

    def check_against(self, max_steps: int) -> None:
        """Refuse a schedule that leaves no training after its last drop.

        Args:
            max_steps: Number of optimizer steps of the run; -1 for a run without an end.

        Raises:
            ScheduleError: If a drop falls on or after the last step.
        """
        if max_steps != -1 and self.steps[-1] >= max_steps:
            raise ScheduleError(
                f"The drop at step {self.steps[-1]} comes too late: training ends after {max_steps} optimizer "
                f"steps. Drop earlier: start + every_n_steps * (rounds - 1) must be below {max_steps}."
            )
