"""Who monitors a metric that comes with the drop must not look sooner: Lightning would end the run there."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from layershed.callbacks.structure import callbacks_of
from layershed.errors import ScheduleError

_WITH_THE_DROP = ("drop/", "speed/")


def check_monitors(trainer: Trainer, first_step: int) -> None:
    """Refuse, before training, early stopping and checkpoints by a metric that is not there when they first look.

    Args:
        trainer: The Trainer, once its loaders are set up.
        first_step: The step of the first drop.

    Raises:
        ScheduleError: If so.
    """
    for watcher in callbacks_of(trainer):
        monitor = str(getattr(watcher, "monitor", None))
        if not monitor.startswith(_WITH_THE_DROP) or not _insists(watcher):
            continue
        named = f"{type(watcher).__name__}(monitor={monitor!r})"
        if monitor.endswith("_end"):
            raise ScheduleError(f"{named}: it is measured when training is over; monitor {monitor[:-4]}_after instead.")
        look = _first_look(trainer, watcher)
        if look < first_step:
            lenient = ", or set strict=False" if isinstance(watcher, EarlyStopping) else ""
            raise ScheduleError(
                f"{named}: it first looks after {look} steps, and the metric comes with the drop, at step "
                f"{first_step}; let it look later (val_check_interval, every_n_train_steps), drop sooner{lenient}."
            )


def _insists(watcher: Any) -> bool:
    """Whether it cannot do without its metric."""
    if isinstance(watcher, EarlyStopping):
        return bool(watcher.strict)
    return isinstance(watcher, ModelCheckpoint) and watcher.save_top_k != 0


def _first_look(trainer: Any, watcher: Any) -> float:
    """The optimizer steps before it, infinite where nobody can tell."""
    if every := getattr(watcher, "_every_n_train_steps", 0):
        return int(every)
    epoch, interval = trainer.num_training_batches, trainer.val_check_batch
    if not trainer.lightning_module.automatic_optimization:
        return math.inf
    if not trainer.enable_validation:
        batches = epoch
    elif interval is None:  # by the clock
        return math.inf
    else:
        batches = epoch * ((trainer.check_val_every_n_epoch or 1) - 1) + interval
    return batches if batches == math.inf else math.ceil(batches / trainer.accumulate_grad_batches)
