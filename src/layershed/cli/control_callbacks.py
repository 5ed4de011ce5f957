"""The callbacks of a run with a control: the checkpoint before the drop, and the end of the control."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from layershed.callbacks import SublayerDrop
from layershed.errors import ControlError
from layershed.files.atomic import write_text
from layershed.integration.measurements import validation_quality
from layershed.integration.run import run_directory
from layershed.integration.watching import Watcher
from layershed.reporting.control_file import CONTROL_FILE, ControlResult

BEFORE_DROP = "before_drop.ckpt"
_KEY = "layershed_control"


class KeepBeforeDrop(pl.Callback):
    """Saves ``checkpoints/before_drop.ckpt`` one step before the first drop; the control begins there.

    A control of a drop at the first step begins at the beginning, and needs no checkpoint. A run that is resumed after
    the drop takes the checkpoint of its former part.

    Args:
        first: The step of the first drop.

    Raises:
        ControlError: Before training, if the run is resumed after the drop and there is no checkpoint from before.
    """

    def __init__(self, first: int) -> None:
        self.start = first - 1
        self.path: Path | None = None
        self.seconds: float | None = None  # per dense step
        self._began: tuple[int, float] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the checkpoint of a run that is resumed after the drop."""
        step, resumed = trainer.global_step, trainer.ckpt_path
        if step == self.start:
            self.path = None if resumed is None else Path(str(resumed))
        elif step > self.start > 0:
            beside = [] if resumed is None else [Path(str(resumed)).with_name(BEFORE_DROP)]
            found = [path for path in [*filter(None, [self.path]), *beside] if path.exists()]
            if not found:
                raise ControlError(
                    f"control=true: the run is resumed at step {step}, after the drop at step {self.start + 1}, and "
                    f"there is no {BEFORE_DROP} beside the checkpoint. Resume one from before the drop, or give a "
                    "finished control by --control RUN."
                )
            self.path = found[0]

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Begin to measure the time of a step, after the first one."""
        if self._began is None and trainer.global_step > 0:
            self._began = trainer.global_step, time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Save the checkpoint."""
        if trainer.global_step != self.start or self.path is not None:
            return
        if self._began is not None and trainer.global_step > self._began[0]:
            self.seconds = (time.monotonic() - self._began[1]) / (trainer.global_step - self._began[0])
        self.path = run_directory(trainer) / "checkpoints" / BEFORE_DROP
        trainer.save_checkpoint(self.path, weights_only=False)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note where the checkpoint is, and how long a step takes; not as a state, which every command would miss."""
        path = None if self.path is None else os.path.abspath(self.path)
        checkpoint[_KEY] = {"path": path, "seconds": self.seconds}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """The inverse of :meth:`on_save_checkpoint`."""
        noted = checkpoint.get(_KEY) or {"path": None, "seconds": None}
        self.path = None if noted["path"] is None else Path(noted["path"])
        self.seconds = noted["seconds"]


class EndControl(pl.Callback):
    """Ends the control at the run's last step, measures its quality there, and writes ``control.json``.

    Args:
        drop: The SublayerDrop of the run, which says how to measure.
        start: The step at which the control begins.
        end: The run's last step.
        without: Names of the callbacks that the control left out.
    """

    def __init__(self, drop: SublayerDrop, start: int, end: int, without: Iterable[str]) -> None:
        self.wanted = drop.quality_batches, drop.quality_metric, drop.transformer
        self.start, self.end, self.without = start, end, tuple(without)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Stop where an early stop ended the run; elsewhere it ends by itself, without one more validation."""
        if self.end <= trainer.global_step < trainer.estimated_stepping_batches:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the quality as SublayerDrop does at the end."""
        quality = validation_quality(trainer, pl_module, *self.wanted, Watcher("The control"))
        values = {} if quality is None else dict(quality.values)
        folder = run_directory(trainer)
        if trainer.is_global_zero:
            result = ControlResult(self.start, trainer.global_step, values, self.without)
            write_text(folder / CONTROL_FILE, json.dumps(asdict(result), indent=2) + "\n")
