"""Tracks the redundancy of every attention and MLP sublayer during training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from layershed.arguments import check_number
from layershed.errors import CalibrationError, NotFiniteError, ScheduleError
from layershed.importance.metrics import get_metric
from layershed.importance.tracker import ImportanceTracker
from layershed.integration.importance_csv import append, begin, note, take_up
from layershed.integration.metric_names import importance_group, importance_name, skipped_name
from layershed.integration.module_hooks import (
    leave_structure,
    refuse_shards_changed_by_hand,
    watch_for_bypass,
    watch_for_changes,
)
from layershed.integration.namespaces import Callback, LightningModule, Trainer, rank_zero_warn
from layershed.integration.preflight import callbacks_of
from layershed.integration.protocols import WritesHistory
from layershed.integration.rng import of_every_rank
from layershed.integration.run import (
    IMPORTANCE_FILE,
    StepCounter,
    own_share,
    publish,
    run_directory,
    show,
)
from layershed.integration.watching import Watcher


class RedundancyMonitor(Callback):
    """Measures the importance of every sublayer and block on the training batches of every n-th optimizer step.

    Hooks: measures between ``on_train_batch_start`` and ``on_before_backward``, without an extra forward pass.
    Logs: ``importance/attention.3``, ``importance/mlp.3``, ``importance/block.3`` and the mean of each kind,
    ``importance/attention_mean`` and so on. Another metric than cosine has its own group, ``importance_angular/...``.
    ``importance/skipped`` counts the forward passes of the step with a NaN or infinite importance. They are left out
    with a warning. It is logged from the first such pass on.
    Writes: ``importance.csv`` in the run directory, with the columns step, block, kind, metric, value. A step without
    a finite pass has no rows. A sublayer that does not run in a step, as under LayerDrop, or cannot be measured, has no
    row, with one warning in a run. No error of a measurement ends the run.
    Checkpoint: the running sums of every rank, and the path and length of ``importance.csv``. A resumed run continues
    the file from that length. If the file was moved, it is searched beside the checkpoint and one directory above.

    Args:
        every_n_steps: Optimizer steps between two measurements.
        metric: ``cosine`` (S = 1 - cos(X, Y) of arXiv 2406.15786), ``relative_magnitude`` or ``angular``.
        transformer: Path of the transformer in the LightningModule; needed only if it holds several.

    Raises:
        ScheduleError: If ``every_n_steps`` is below 1.
        UnknownNameError: If the metric is unknown.
        StrategyError: Before training, if FSDP2 shards a model that was bypassed by hand and no callback changes it.
    """

    def __init__(self, every_n_steps: int = 50, metric: str = "cosine", transformer: str | None = None) -> None:
        check_number(every_n_steps, "RedundancyMonitor: every_n_steps", ScheduleError, whole=True)
        if every_n_steps < 1:
            raise ScheduleError(f"RedundancyMonitor(every_n_steps={every_n_steps}): every_n_steps must be at least 1.")
        get_metric(metric)
        self.every_n_steps, self.metric, self.transformer = every_n_steps, metric, transformer
        self._steps = StepCounter()
        self._watcher = Watcher("RedundancyMonitor")
        self._trainer: Trainer | None = None
        self._tracker: ImportanceTracker | None = None
        self._measured = False
        self._latest: dict[str, float] = {}
        self._restored: dict[str, Any] = {}
        self._file: Path | None = None
        self._writes = False
        self.history_was_lost = False

    @property
    def state_key(self) -> str:
        """One state per metric, so that a Trainer can have a monitor of each."""
        return self._generate_state_key(metric=self.metric)

    def should_measure(self, step: int) -> bool:
        """Whether to measure the ``step``-th optimizer step, counted from 1; override it for another cadence."""
        return step % self.every_n_steps == 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start from the beginning unless this Trainer continues its run."""
        watch_for_changes(pl_module, self.transformer)
        if stage == "fit":  # a resumed run loads the checkpoint's state later
            self._restored = {}
            self._watcher.forget()
            if trainer.global_step == 0:
                self._latest, self._steps = {}, StepCounter()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the hooks of a module that is in its original state."""
        leave_structure(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the sublayers and register the hooks, before anything is compiled."""
        watch_for_changes(pl_module, self.transformer)
        refuse_shards_changed_by_hand(trainer, pl_module, self)
        self._trainer = trainer
        self._tracker = ImportanceTracker(pl_module, self.metric, name=self.transformer, strict=False)
        self._tracker.attach()
        self._file = run_directory(trainer) / IMPORTANCE_FILE
        self._writes, self.history_was_lost = trainer.is_global_zero, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin ``importance.csv``, or continue that of the resumed run."""
        restored, self._restored = self._restored, {}
        self._steps.start(trainer, restored.get("stride"))
        if restored:
            self._require_tracker().load_state_dict(own_share(trainer, restored["sums"]))
            self._latest = restored["latest"]
            show(trainer, self._latest)
        if self._file is not None and self._writes:
            self._begin_history(trainer, self._file, restored.get("history"))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Switch the hooks on if this batch belongs to a measured step."""
        if self._tracker is None:
            self._watcher.warn_once("late", ": it was added after training began, and measures nothing in this run.")
            return
        self._measured = any(self.should_measure(step) for step in self._steps.coming(trainer))
        if self._measured:
            self._tracker.start()
        else:
            self._tracker.stop()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Switch the hooks off: forward passes of other callbacks at the end of a batch must not count."""
        if pl_module.automatic_optimization and self._tracker is not None:
            self._tracker.stop()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write and log the importances after the measured optimizer step."""
        watch_for_bypass(pl_module, self.transformer)
        if self._tracker is None:
            return
        self._tracker.stop()
        if self._steps.taken(trainer) and self._measured:
            with self._watcher.leaving_out("a measurement"):
                rows = self._rows(self._tracker, trainer.global_step)
                self._record(trainer, rows, 0 if self._tracker.skipped is None else self._tracker.skipped.count)
            self._tracker.reset()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the hooks off the model."""
        if self._tracker is not None:
            self._tracker.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks off the model, after an error too."""
        leave_structure(pl_module)
        if self._tracker is not None:
            self._tracker.detach()

    def state_dict(self) -> dict[str, Any]:
        """The running sums and the length of the history, as primitives."""
        if self._trainer is None or self._tracker is None or self._file is None:
            return {}
        sums = of_every_rank(self._tracker.state_dict(), self._trainer)
        history = None
        if self._writes:
            with self._watcher.leaving_out(f"the length of {self._file.name} in a checkpoint"):
                history = note(self._file)
        return {"sums": sums, "history": history, "latest": dict(self._latest), "stride": self._steps.stride}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until training starts: the run directory is unknown before."""
        self._restored = state_dict

    def _begin_history(self, trainer: Trainer, file: Path, noted: dict[str, Any] | None) -> None:
        """Restore the rows measured before the checkpoint; other monitors share the file and do the same."""
        if noted is None:
            if trainer.global_step == 0 or not file.exists():
                begin(file)
        elif not take_up(noted, file, trainer.ckpt_path):
            begin(file)
            others = [other for other in callbacks_of(trainer) if isinstance(other, WritesHistory)]
            said, self.history_was_lost = any(other.history_was_lost for other in others), True
            if not said:
                rank_zero_warn(
                    f"RedundancyMonitor: neither {noted['file']} nor a file beside the checkpoint holds what was "
                    f"measured before; {file} begins after step {trainer.global_step}."
                )

    def _rows(self, tracker: ImportanceTracker, step: int) -> list[tuple[int, str, float]]:
        """What was measured in a step; nothing if nothing could be."""
        rows: list[tuple[int, str, float]] = []
        try:
            rows = list(tracker.compute().rows())
        except NotFiniteError:
            pass  # the count below says it
        except CalibrationError as error:
            self._watcher.warn_once("a step", f", step {step}: {error} Steps like this one are left out.")
        if tracker.skipped:
            rank_zero_warn(f"RedundancyMonitor, step {step}: {tracker.skipped}.")
        if tracker.left_out:
            text = f", step {step}: {tracker.left_out}. Later ones are left out without a warning."
            self._watcher.warn_once("a sublayer", text)
        return rows

    def _record(self, trainer: Trainer, rows: list[tuple[int, str, float]], skipped: int) -> None:
        if self._writes and self._file is not None:
            step = trainer.global_step
            with self._watcher.leaving_out(f"rows of {self._file.name}"):
                append(self._file, (f"{step},{block},{kind},{self.metric},{value!r}" for block, kind, value in rows))
        group = importance_group(self.metric)
        fresh = {importance_name(group, kind, block): value for block, kind, value in rows}
        for kind in dict.fromkeys(kind for _, kind, _ in rows):
            values = [value for _, own, value in rows if own == kind]
            if values:
                fresh[importance_name(group, kind, "mean")] = sum(values) / len(values)
        if skipped or skipped_name(group) in self._latest:
            fresh[skipped_name(group)] = float(skipped)
        self._latest.update(fresh)
        publish(trainer, fresh)

    def _require_tracker(self) -> ImportanceTracker:
        assert self._tracker is not None, "on_fit_start comes first"
        return self._tracker
