"""Has a run that was killed and resumed end as the run that was left alone."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from layershed.integration.checkpoint_io import keep_checkpoints_whole
from layershed.integration.lightning_private import give_back_header_rewrite
from layershed.integration.metrics_csv import keep_rows, note_rows, take_up_rows
from layershed.integration.module_hooks import carry_changes_by_hand, leave_structure, refuse_shards_changed_by_hand
from layershed.integration.pending_work import fits, give_back_loops, note_progress, take_up_progress
from layershed.integration.preflight import callbacks_of


class ExactResume(Callback):
    """Keeps in every checkpoint what Lightning leaves out, so that interrupted equals uninterrupted, bit for bit.

    It keeps

    - the random states of every rank, also those of generators that train loaders were given;
    - the row of metrics, the validation and the end of the epoch that were due at the checkpoint's step;
    - the rows of ``metrics.csv``, which CSVLogger deletes as it opens a version that is there already;
    - what was bypassed, quantized or adapted by hand before training.

    Checkpoint files are written whole or not at all, unless the Trainer has a CheckpointIO of its own.

    A train loader with a state (``state_dict`` and ``load_state_dict``, such as torchdata's StatefulDataLoader) goes on
    within an epoch. For any other one a warning says that the epoch starts from its first batch again.

    Hooks: ``setup``, ``on_save_checkpoint`` and ``on_load_checkpoint``. In a resumed fit it also stands in ``run``,
    ``on_advance_start`` and ``advance`` of the fit loop, once each, and gives them back in ``teardown`` and
    ``on_exception``, as it does the header rewrite of CSVLogger. Its place in the list does not matter, and a second
    one does nothing.
    Logs: the row that was due at the checkpoint's step.
    Writes: ``.metrics.csv.kept`` beside ``metrics.csv``, a second name of the same file.
    Checkpoint: the above, as primitives and tensors.

    Raises:
        StrategyError: Before training, if FSDP2 shards a model that was bypassed by hand, and no callback changes it.
    """

    def __init__(self) -> None:
        self._writers: list[ExperimentWriter] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have checkpoints and metrics.csv written whole."""
        if not self._acts(trainer):
            return
        keep_checkpoints_whole(trainer.strategy)
        carry_changes_by_hand(pl_module)
        if stage == "fit":
            writers = (keep_rows(logger) for logger in trainer.loggers)
            self._writers = [writer for writer in writers if writer is not None]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse shards that would be taken for those of the dense model."""
        refuse_shards_changed_by_hand(trainer, pl_module, self)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note what is still to come at this step, and flush what was logged until now."""
        if not (self._acts(trainer) and fits(trainer)):
            return
        for logger in trainer.loggers:
            logger.save()
        note_progress(checkpoint, trainer)
        note_rows(checkpoint, trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Bring the rows back, log the one that was due, and have the fit loop do what else was."""
        if self._acts(trainer) and fits(trainer):
            take_up_rows(checkpoint, trainer)
            take_up_progress(checkpoint, trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give back what was replaced; the CheckpointIO stays, as a checkpoint may be saved after the fit."""
        give_back_loops(trainer)
        while self._writers:
            give_back_header_rewrite(self._writers.pop())
        leave_structure(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give it back after an error, too."""
        self.teardown(trainer, pl_module, "")

    def _acts(self, trainer: Trainer) -> bool:
        """Whether it is the first of its kind in the list."""
        return next(other for other in callbacks_of(trainer) if isinstance(other, ExactResume)) is self
