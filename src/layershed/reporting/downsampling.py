"""What is kept of a long run: curves and pictures that stay small, however many steps there were."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any


class ThinnedCurve:
    """A curve that grows point by point, of which every second point goes whenever there are too many.

    What goes depends on nothing but the points that came, so that a resumed run keeps the same. The first, the last,
    and those around a mark stay.

    Args:
        most: How many points may be held, those around marks apart.
    """

    def __init__(self, most: int = 500) -> None:
        self.most = most
        # step, value and the number of the point, from 0; no number where it is to stay
        self._points: list[tuple[int, float, int | None]] = []
        self._seen, self._stride, self._marked = 0, 1, False

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return ((step, value) for step, value, _ in self._points)

    @property
    def last_step(self) -> int | None:
        """The step of the last point."""
        return self._points[-1][0] if self._points else None

    def add(self, step: int, value: float) -> None:
        """Take in the next point."""
        if self._points and not self._stays(self._points[-1]):
            self._points.pop()  # it was there as the last one
        self._points.append((step, value, None if self._marked else self._seen))
        self._seen, self._marked = self._seen + 1, False
        if len(self._points) > self.most and sum(number is not None for _, _, number in self._points) > self.most:
            self._stride *= 2
            self._points = [point for point in self._points[:-1] if self._stays(point)] + self._points[-1:]

    def mark(self) -> None:
        """Have the last point stay, and the next one."""
        if self._points:
            step, value, _ = self._points[-1]
            self._points[-1] = (step, value, None)
        self._marked = True

    def _stays(self, point: tuple[int, float, int | None]) -> bool:
        number = point[2]
        return number is None or number % self._stride == 0

    def state_dict(self) -> dict[str, Any]:
        """Everything, as primitives."""
        points = [list(point) for point in self._points]
        return {"points": points, "seen": self._seen, "stride": self._stride, "marked": self._marked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._points = [(step, value, number) for step, value, number in state["points"]]
        self._seen, self._stride, self._marked = state["seen"], state["stride"], state["marked"]


def shown_steps(steps: Sequence[int], around: Iterable[int], most: int) -> list[int]:
    """Steps at equal distances, the first and the last among them, and those next to each of ``around``.

    Args:
        steps: What there is, ascending.
        around: Steps whose points just before, at and just after are kept.
        most: How many are few enough to take them all, and how many are taken at most, those around apart.
    """
    if len(steps) <= most:
        return list(steps)
    stride = math.ceil((len(steps) - 1) / (most - 1))
    taken = {*steps[::stride], steps[-1]}
    for step in around:
        before, behind = bisect_left(steps, step), bisect_right(steps, step)
        taken.update(steps[max(before - 1, 0) : behind + 1])
    return sorted(taken)
