"""Ctrl-C and SIGTERM in ``fit``: the step in progress is finished, a checkpoint is saved, and the run ends."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from layershed.cli.stopped import SIGNALS, Stopped
from layershed.integration.preflight import callbacks_of
from layershed.integration.run import run_directory

_ASKS_EVERY = 10  # steps between two questions to the other ranks, as each question waits for the device


class StopOnSignal(pl.Callback):
    """Saves ``checkpoints/last.ckpt`` and raises :class:`Stopped` after the optimizer step in which a signal came.

    A second Ctrl-C interrupts at once, without a checkpoint.
    """

    def __init__(self) -> None:
        self._signum = 0
        self._step = 0
        self._former: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen from the first step on: before it, there is nothing to save."""
        self._signum, self._step = 0, trainer.global_step
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses
            for signum in SIGNALS:
                self._former[signum] = signal.signal(signum, self._note)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Stop, on every rank alike, where a step has just ended."""
        stepped, self._step = trainer.global_step > self._step, trainer.global_step
        if not stepped:
            return
        if trainer.world_size > 1:
            if trainer.global_step % _ASKS_EVERY:
                return
            told = torch.tensor(self._signum, device=trainer.strategy.root_device)
            self._signum = int(trainer.strategy.reduce(told, reduce_op="max"))
        if self._signum:
            signum, path = self._signum, _folder(trainer) / "last.ckpt"
            self._give_back()
            trainer.save_checkpoint(path, weights_only=False)
            raise Stopped(signum, trainer.global_step, path)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop listening: what follows can be interrupted."""
        self._give_back()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Stop listening, after an error too."""
        self._give_back()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self._signum == signum == signal.SIGINT:
            self._give_back()
            raise KeyboardInterrupt
        self._signum = signum
        print("\nStopping after this step, with a checkpoint. Ctrl-C again stops at once.", file=sys.stderr)

    def _give_back(self) -> None:
        while self._former:
            signal.signal(*self._former.popitem())


def _folder(trainer: pl.Trainer) -> Path:
    """Where the run's other checkpoints are, so that ``--ckpt_path last`` finds this one."""
    own = (callback.dirpath for callback in callbacks_of(trainer) if isinstance(callback, ModelCheckpoint))
    folder = next(filter(None, own), None)
    return run_directory(trainer) / "checkpoints" if folder is None else Path(str(folder))
