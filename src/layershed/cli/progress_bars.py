"""Shows how far long work is: bars on a terminal, without one a plain line where it takes long."""

from __future__ import annotations

import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_LONG = 20.0  # seconds after which, and between which, there is a plain line


class ProgressBars:
    """A listener of :func:`layershed.progress.listening`.

    Args:
        bars: Whether to draw bars on a terminal. ``fit`` has a bar of its own.
    """

    def __init__(self, *, bars: bool) -> None:
        self.bars = bars
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._lines: dict[str, tuple[float, float]] = {}  # when each work began, and when it was last told

    def __call__(self, what: str, done: int | None, total: int | None) -> None:
        """Show how far the work is."""
        console = Console()
        if not console.is_terminal:
            self._line(what, done, total)
        elif self.bars:
            self._bar(console, what, done, total)

    def _bar(self, console: Console, what: str, done: int | None, total: int | None) -> None:
        if done is None:
            task = self._tasks.pop(what, None)
            if self._progress is not None and task is not None:
                self._progress.remove_task(task)
                if not self._tasks:
                    self._progress.stop()
                    self._progress = None
            return
        if self._progress is None:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(True)
            # drawn between two pieces of work only: a thread that draws would disturb a measurement of speed
            self._progress = Progress(*columns, console=console, transient=True, auto_refresh=False)
            self._progress.start()
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done, refresh=True)

    def _line(self, what: str, done: int | None, total: int | None) -> None:
        now = time.monotonic()
        began, told = self._lines.setdefault(what, (now, now))
        if done is None:
            del self._lines[what]
        elif done and now - told >= _LONG:
            self._lines[what] = began, now
            left = None if total is None else (now - began) / done * (total - done)
            rest = " done" if left is None else f"/{total}, {timedelta(seconds=round(left))} left"
            print(f"{what}: {done}{rest}", flush=True)
