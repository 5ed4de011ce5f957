"""Curves and pictures that stay small in a long run."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any


class ThinnedCurve:
    """A curve that grows point by point; when it has too many points, every second one is removed.

    The choice depends only on the points added so far, so that a resumed run keeps the same ones. The first point, the
    last one and those next to a mark stay.

    Args:
        most: The most points to keep, not counting those next to marks.
    """

    def __init__(self, most: int = 500) -> None:
        self.most = most
        # step, value and the number of the point, from 0; None if the point must stay
        self._points: list[tuple[int, float, int | None]] = []
        self._seen, self._stride, self._marked = 0, 1, False

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return ((step, value) for step, value, _ in self._points)

    @property
    def last_step(self) -> int | None:
        """The step of the last point."""
        return self._points[-1][0] if self._points else None

    def add(self, step: int, value: float) -> None:
        """Add the next point."""
        if self._points and not self._stays(self._points[-1]):
            self._points.pop()  # it was kept only as the last point
        self._points.append((step, value, None if self._marked else self._seen))
        self._seen, self._marked = self._seen + 1, False
        if len(self._points) > self.most and sum(number is not None for _, _, number in self._points) > self.most:
            self._stride *= 2
            self._points = [point for point in self._points[:-1] if self._stays(point)] + self._points[-1:]

    def mark(self) -> None:
        """Keep the last point, and the next one."""
        if self._points:
            step, value, _ = self._points[-1]
            self._points[-1] = (step, value, None)
        self._marked = True

    def _stays(self, point: tuple[int, float, int | None]) -> bool:
        number = point[2]
        return number is None or number % self._stride == 0

    def state_dict(self) -> dict[str, Any]:
        """The whole state as primitives."""
        points = [list(point) for point in self._points]
        return {"points": points, "seen": self._seen, "stride": self._stride, "marked": self._marked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._points = [(step, value, number) for step, value, number in state["points"]]
        self._seen, self._stride, self._marked = state["seen"], state["stride"], state["marked"]


def shown_steps(steps: Sequence[int], around: Iterable[int], most: int) -> list[int]:
    """Choose steps at equal distances, including the first and the last, and those next to each of ``around``.

    Args:
        steps: All steps, ascending.
        around: Steps to show with their neighbours: the step before, the step itself and the step after.
        most: The most steps to choose, not counting those of ``around``.
    """
    if len(steps) <= most:
        return list(steps)
    stride = math.ceil((len(steps) - 1) / (most - 1))
    taken = {*steps[::stride], steps[-1]}
    for step in around:
        left, right = bisect_left(steps, step), bisect_right(steps, step)
        taken.update(steps[max(left - 1, 0) : right + 1])
    return sorted(taken)
