"""Makes a killed and resumed run end like the uninterrupted run."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from layershed.errors import CheckpointError
from layershed.integration.checkpoint_io import keep_checkpoints_whole
from layershed.integration.lightning_private import give_back_header_rewrite, supports_exact_resume
from layershed.integration.loader_positions import note_positions, take_up_positions
from layershed.integration.metrics_csv import keep_rows, note_rows, take_up_rows
from layershed.integration.module_hooks import (
    carry_changes_by_hand,
    changed_by_hand,
    follow_training,
    leave_structure,
    refuse_shards_changed_by_hand,
)
from layershed.integration.namespaces import Callback, ExperimentWriter, LightningModule, Trainer
from layershed.integration.pending_work import fits, give_back_loops, note_progress, take_up_progress
from layershed.integration.preflight import callbacks_of
from layershed.recovery.frozen import StaysFrozen
from layershed.stand_ins.carried import dropped_parameters


class ExactResume(Callback):
    """Saves in every checkpoint what Lightning leaves out: a resumed run equals the uninterrupted one, bit for bit.

    It saves

    - the random states of every rank, and of the generators that the train loaders hold;
    - the positions of every rank's train loaders, where they differ;
    - the metrics row, the validation and the end of the epoch that are due at the checkpoint's step;
    - the rows of ``metrics.csv``, which CSVLogger deletes when it opens an existing version;
    - the changes made by hand before training: bypass, quantization and adapters;
    - what other callbacks unfroze, or added to the optimizers.

    What was bypassed by hand stays frozen.

    Each checkpoint file is written whole or not at all, unless the Trainer has its own CheckpointIO.

    A train loader with a state (``state_dict`` and ``load_state_dict``, such as torchdata's StatefulDataLoader)
    continues within an epoch. Any other loader starts the epoch again from its first batch, with a warning.

    Hooks: ``setup``, ``on_fit_start``, ``on_train_batch_start``, ``on_before_optimizer_step``, ``on_save_checkpoint``
    and ``on_load_checkpoint``. It replaces ``load_optimizer_state_dict`` of the strategy, and of DDP and FSDP2 also its
    steps. In a resumed fit it also replaces ``run``, ``on_advance_start`` and ``advance`` of the fit loop, once each.
    It restores them, and CSVLogger's header rewrite, in ``teardown`` and ``on_exception``. Its place in the list does
    not matter. A second ExactResume does nothing.
    Logs: the metrics row that was due at the checkpoint's step.
    Writes: ``.metrics.csv.kept`` beside ``metrics.csv``, a second name of the same file.
    Checkpoint: all of the above, as primitives and tensors.

    Raises:
        CheckpointError: Before training, if Lightning is older than 2.5.3.
        StrategyError: Before training, if FSDP2 shards a model that was bypassed by hand and no callback changes it.
    """

    def __init__(self) -> None:
        self._writers: list[ExperimentWriter] = []
        self._frozen = StaysFrozen()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make checkpoints and metrics.csv be written whole or not at all."""
        if not self._acts(trainer):
            return
        if stage == "fit" and not supports_exact_resume(trainer):
            raise CheckpointError(
                "ExactResume needs Lightning 2.5.3 or newer: the loops of an older one do not say where they resume. "
                "Update lightning, or leave ExactResume out."
            )
        keep_checkpoints_whole(trainer.strategy)
        carry_changes_by_hand(pl_module)
        if stage == "fit":
            writers = (keep_rows(logger) for logger in trainer.loggers)
            self._writers = [writer for writer in writers if writer is not None]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse shards that would later load as those of the dense model."""
        refuse_shards_changed_by_hand(trainer, pl_module, self)
        if not self._acts(trainer):
            return
        follow_training(trainer, pl_module)
        if (transformer := changed_by_hand(pl_module)) is not None:
            self._frozen.hold(transformer, dropped_parameters)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep what was bypassed by hand frozen, whatever has unfrozen it."""
        self.refreeze()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The same before each optimizer step."""
        self.refreeze()

    def refreeze(self) -> None:
        """Freeze again what others unfroze. The optimizers keep what they were given."""
        self._frozen.enforce(())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save what is still due at this step, and flush the loggers."""
        if not (self._acts(trainer) and fits(trainer)):
            return
        for logger in trainer.loggers:
            logger.save()
        note_progress(checkpoint, trainer)
        note_positions(checkpoint, trainer)
        note_rows(checkpoint, trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the rows, log the row that was due, and let the fit loop do the rest that was due."""
        if self._acts(trainer) and fits(trainer):
            take_up_positions(checkpoint, trainer)
            take_up_rows(checkpoint, trainer)
            take_up_progress(checkpoint, trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore what was replaced. The CheckpointIO stays: a checkpoint may be saved after the fit."""
        self._frozen = StaysFrozen()
        give_back_loops(trainer)
        while self._writers:
            give_back_header_rewrite(self._writers.pop())
        leave_structure(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore what was replaced, after an error too."""
        self.teardown(trainer, pl_module, "")

    def _acts(self, trainer: Trainer) -> bool:
        """Whether this is the first ExactResume in the list."""
        return next(other for other in callbacks_of(trainer) if isinstance(other, ExactResume)) is self
