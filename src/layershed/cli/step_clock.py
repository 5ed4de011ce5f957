"""Step time and tokens per second of ``fit``, in the loggers."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from layershed.devices import Clock, clock_for

STEP_SECONDS, TOKENS_PER_SECOND = "step_seconds", "tokens_per_second"


class StepClock(pl.Callback):
    """Logs ``step_seconds`` and ``tokens_per_second`` in every row of the training loss.

    Both are means over the steps since the last row. A step is forward, backward and optimizer, of all its accumulated
    batches. Loading of batches, validation and the work of other callbacks between steps do not count, so it is the
    first of the callbacks. Tokens are those of all devices, padding included.
    """

    def __init__(self) -> None:
        self._clock: Clock | None = None
        self._start: Any = None
        self._step = 0
        self._spans: list[tuple[Any, Any]] = []
        self._tokens = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start counting."""
        self._clock, self._step = clock_for(trainer.strategy.root_device), trainer.global_step
        self._spans, self._tokens = [], 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the time."""
        self._start = None if self._clock is None else self._clock.mark()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the time; log where Lightning writes a row."""
        if self._clock is None or self._start is None:
            return
        self._spans.append((self._start, self._clock.mark()))
        tokens = batch.get("input_ids") if isinstance(batch, dict) else None
        self._tokens += tokens.numel() * trainer.world_size if isinstance(tokens, Tensor) else 0
        steps = trainer.global_step - self._step
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not steps or not (trainer.global_step % every == 0 or trainer.should_stop):
            return
        seconds = sum(self._clock.seconds(start, end) for start, end in self._spans)
        pl_module.log(STEP_SECONDS, seconds / steps)
        if self._tokens and seconds > 0:
            pl_module.log(TOKENS_PER_SECOND, self._tokens / seconds)
        self._step, self._spans, self._tokens = trainer.global_step, [], 0
