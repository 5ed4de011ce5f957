"""The progress bar of the command line, and a plain line now and then where there is no terminal."""

from __future__ import annotations

import math
import textwrap
import time
from collections import deque
from contextlib import ExitStack
from datetime import timedelta
from statistics import median
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from layershed.progress import listening

_SILENCE = 30.0  # seconds between two plain lines
_STEPS = 50  # of which the median is taken
_LEFT = "seconds_left"  # field of the bar of training


class FitBar(RichProgressBar):
    """Counts the optimizer steps of the whole run: to max_steps, or to the end of the last epoch if that comes first.

    Lightning's own bar counts the batches of an epoch. Without a terminal there is no bar, but a plain line every half
    minute.

    Prints: the bar in training, validation, test and prediction.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=10)
        self._pace, self._told = _Pace(0), 0.0
        self._open, self._works = ExitStack(), dict[str, TaskID]()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """No bar without a terminal: its last state would be the only one in the file."""
        super().setup(trainer, pl_module, stage)
        console = Console()
        if not (console.is_terminal or console.is_jupyter):
            self.disable()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        super().on_train_start(trainer, pl_module)
        if not self.is_disabled:
            self._open.enter_context(listening(self._show))
        self._told = time.monotonic()
        self._pace = _Pace(trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Its time is no time of steps."""
        super().on_validation_start(trainer, pl_module)
        self._pace.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on."""
        super().on_validation_end(trainer, pl_module)
        self._pace.go_on()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the one bar of all epochs."""
        if self.is_disabled or self.progress is None:
            return
        if self.train_progress_bar_id is None:
            self._initialize_train_progress_bar_id()
        if trainer.current_epoch and self.train_progress_bar_id is not None:
            what = f"Epoch {trainer.current_epoch + 1}".ljust(len(self.validation_description))
            self.progress.update(self.train_progress_bar_id, description=what)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the steps; after a silent half minute without a bar, print a line."""
        if self.train_progress_bar_id is None and not self.is_disabled:
            self._initialize_train_progress_bar_id()
        self._pace.note(trainer.global_step)
        if self.progress is not None and self.train_progress_bar_id is not None:
            left: Any = self._pace.left(last_step(trainer))
            self.progress.update(self.train_progress_bar_id, **{_LEFT: left})
        self._update(self.train_progress_bar_id, trainer.global_step)
        self._update_metrics(trainer, pl_module)
        if self.is_disabled and trainer.is_global_zero and time.monotonic() - self._told >= _SILENCE:
            self._told = time.monotonic()
            print(self._line(trainer, pl_module), flush=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop the bar, and listen no longer to the work of callbacks."""
        self._open.close()
        self._works.clear()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same after an error."""
        self.teardown(trainer, pl_module, "")

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What the module logs for the bar, without the number of the run."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Columns that leave room for the metrics on 80 columns."""
        bar = next(column for column in super().configure_columns(trainer) if isinstance(column, BarColumn))
        bar.bar_width = 12
        return [TextColumn("{task.description}"), bar, _Steps(), _Left()]

    def _initialize_train_progress_bar_id(self) -> None:
        self.train_progress_bar_id = self._add_task(
            last_step(self.trainer), self.train_description.ljust(len(self.validation_description))
        )

    def _show(self, what: str, done: int | None, total: int | None) -> None:
        """A bar for the work of a callback, such as the measuring of speed, as long as it lasts."""
        if self.progress is None:
            return
        if what not in self._works:
            # no wider than the names of Lightning's rows: on 80 columns, the metrics would break the row in two
            name = what.removeprefix("Measuring ").capitalize()
            name = textwrap.shorten(name, len(self.validation_description), placeholder="…")
            self._works[what] = self._add_task(total or math.inf, name)
        self.progress.update(self._works[what], completed=done or 0, visible=done is not None, refresh=True)
        if done is None:
            del self._works[what]

    def _line(self, trainer: Trainer, pl_module: LightningModule) -> str:
        last, done = last_step(trainer), trainer.global_step
        metrics = [f"{name} {value:.4g}" for name, value in self.get_metrics(trainer, pl_module).items()]
        if not math.isfinite(last):
            return ", ".join([f"step {done}", *metrics])
        left = self._pace.left(last)
        return ", ".join([f"step {done}/{last:.0f}", *metrics, *([] if left is None else [f"{_clock(left)} left"])])


def last_step(trainer: Trainer) -> float:
    """The optimizer step at which a run ends; infinite if it is unknown. Call it once training has begun."""
    known = trainer.estimated_stepping_batches
    return float(known) if not isinstance(known, int) or known > 0 else math.inf


class _Pace:
    """How long the rest of a run takes: the steps by the median of the last ones, the validations by their share.

    The median leaves out a step in which a callback works: the drop, the measuring of speed, a checkpoint.

    Args:
        step: The optimizer step at which the count begins.
    """

    def __init__(self, step: int) -> None:
        self._first = self._step = step
        self._since = self._paused = time.monotonic()
        self._validating = self._validated = 0.0  # in this step, and in all
        self._each = deque[float](maxlen=_STEPS)

    def pause(self) -> None:
        """A validation begins."""
        self._paused = time.monotonic()

    def go_on(self) -> None:
        """A validation ends."""
        took = time.monotonic() - self._paused
        self._validating += took
        self._validated += took

    def note(self, step: int) -> None:
        """A batch has ended at this optimizer step."""
        if step > self._step:
            now = time.monotonic()
            self._each.append((now - self._since - self._validating) / (step - self._step))
            self._step, self._since, self._validating = step, now, 0.0

    def left(self, last: float) -> float | None:
        """Seconds to the last step; None if it, or the pace, is unknown."""
        if not self._each or not math.isfinite(last):
            return None
        return (median(self._each) + self._validated / (self._step - self._first)) * (last - self._step)


class _Steps(ProgressColumn):
    """Done and total."""

    def render(self, task: Task) -> Text:
        total = "?" if task.total is None or not math.isfinite(task.total) else f"{task.total:.0f}"
        return Text(f"{task.completed:.0f}/{total}")


class _Left(ProgressColumn):
    """Time left, by the pace of the steps in training; the time taken if the total is unknown, or at the end."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        if task.finished or task.total is None or not math.isfinite(task.total):
            taken = task.finished_time if task.finished else task.elapsed
            return Text(f"in {_clock(taken or 0)}", style="dim")
        left = task.fields.get(_LEFT, task.time_remaining)
        return Text("" if left is None else f"{_clock(left)} left", style="dim")


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
