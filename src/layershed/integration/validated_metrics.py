"""What a module logs in validation, noted for the report."""

from __future__ import annotations

from typing import Any

from layershed.integration.gathered import own_metrics
from layershed.integration.namespaces import Trainer
from layershed.reporting.record import MetricPoint


class ValidatedMetrics:
    """Of each metric the last value before the drop, and the last one, with their steps.

    Args:
        left_out: A metric that is shown elsewhere.
    """

    def __init__(self, left_out: str) -> None:
        self._left_out = left_out
        self._points: dict[str, tuple[MetricPoint | None, MetricPoint]] = {}
        self._earlier: dict[str, Any] = {}  # the metrics when a validation began

    def validation_begins(self, trainer: Trainer) -> None:
        """Note which metrics there are before the validation."""
        self._earlier = dict(trainer.callback_metrics)

    def validation_ends(self, trainer: Trainer, *, dropped: bool) -> None:
        """Note what the validation logged."""
        for name, value in own_metrics(self._earlier, trainer, self._left_out).items():
            before, _ = self._points.get(name, (None, None))
            point = MetricPoint(trainer.global_step, value)
            self._points[name] = (before if dropped else point), point

    def points(self, *, dropped: bool) -> dict[str, tuple[MetricPoint | None, MetricPoint]]:
        """Before the drop, if there was one, and last, by name."""
        return {name: (before if dropped else None, last) for name, (before, last) in self._points.items()}

    def state(self) -> dict[str, Any]:
        """As primitives."""
        return {
            name: [None if point is None else [point.step, point.value] for point in points]
            for name, points in self._points.items()
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`; values of an earlier version, which kept no steps, are left out."""
        self._points = {
            name: (None if before is None else MetricPoint(*before), MetricPoint(*last))
            for name, (before, last) in state.items()
            if isinstance(last, list)
        }
