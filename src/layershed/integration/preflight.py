"""Who monitors a metric that comes with the drop must not look sooner: Lightning would end the run there."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from layershed.errors import ScheduleError
from layershed.integration.module_hooks import callbacks_of

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
                f"{first_step}; let it look later (val_check_interval, every_n_epochs, every_n_train_steps), drop "
                f"sooner{lenient}."
            )


def _insists(watcher: Any) -> bool:
    """Whether it cannot do without its metric."""
    if isinstance(watcher, EarlyStopping):
        return bool(watcher.strict)
    return isinstance(watcher, ModelCheckpoint) and watcher.save_top_k != 0


def _first_look(trainer: Any, watcher: Any) -> float:
    """The optimizer steps before it, infinite where nobody can tell or it never looks."""
    stops = isinstance(watcher, EarlyStopping)
    if not stops and watcher._every_n_train_steps:
        return int(watcher._every_n_train_steps)
    nth = 1 if stops else watcher._every_n_epochs
    if not nth or not trainer.lightning_module.automatic_optimization:  # every_n_epochs=0: by the clock
        return math.inf
    if watcher._check_on_train_epoch_end if stops else watcher._should_save_on_train_epoch_end(trainer):
        return _steps(trainer, nth * trainer.num_training_batches)
    if not trainer.enable_validation or trainer.val_check_batch is None:  # None: by the clock
        return math.inf
    return _steps(trainer, _first_validation(trainer, nth))


def _first_validation(trainer: Any, nth: int) -> float:
    """The batches before the first validation in an epoch whose number, from 1, is a multiple of ``nth``."""
    length, interval = trainer.num_training_batches, trainer.val_check_batch
    if trainer.check_val_every_n_epoch is not None:
        epochs = math.lcm(nth, trainer.check_val_every_n_epoch)
        return (length * (epochs - 1) if epochs > 1 else 0) + interval
    # it is counted across epochs
    if length == math.inf:
        return interval if nth == 1 else math.inf
    ends = (interval * number for number in range(1, length * nth + 1))
    return next(batches for batches in ends if math.ceil(batches / length) % nth == 0)


def _steps(trainer: Any, batches: float) -> float:
    """Every epoch's last batch takes a step, also if that gathers fewer than the others."""
    length, gathered = trainer.num_training_batches, trainer.accumulate_grad_batches
    if length == math.inf:
        return batches if batches == math.inf else batches // gathered
    epochs, rest = divmod(batches, length)
    return int(epochs * math.ceil(length / gathered) + rest // gathered)
