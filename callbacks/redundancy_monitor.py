"""Tracks how redundant every attention and MLP sublayer is while a model trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from layershed.calibration import ImportanceTracker
from layershed.callbacks.run import (
    IMPORTANCE_FILE,
    StepCounter,
    every_share,
    own_share,
    publish,
    run_directory,
    show,
    write_text,
)
from layershed.errors import ScheduleError
from layershed.metrics import get_metric
from layershed.plan import ImportanceScores

_HEADER = "step,block,kind,metric,value\n"


class RedundancyMonitor(Callback):
    """Measures the importance of every sublayer and block on the training batches of every n-th optimizer step.

    Hooks: measures between ``on_train_batch_start`` and ``on_before_backward``; no extra forward pass.
    Logs: ``importance/attention.3``, ``importance/mlp.3``, ``importance/block.3`` and the means of the three kinds,
    ``importance/attention_mean`` and so on; under ``importance_angular/...`` if the metric is not cosine but angular.
    Writes: ``importance.csv`` in the run directory, with the columns step, block, kind, metric, value.
    Checkpoint: the running sums of every rank and the history so far, so that a resumed run has one unbroken
    ``importance.csv``.

    Args:
        every_n_steps: Optimizer steps between two measurements.
        metric: ``cosine`` (S = 1 - cos(X, Y) of arXiv 2406.15786), ``relative_magnitude`` or ``angular``.
        transformer: Path of the transformer in the LightningModule; needed only where it holds more than one.

    Raises:
        ScheduleError: If ``every_n_steps`` is below 1.
        UnknownNameError: If there is no such metric.
    """

    def __init__(self, every_n_steps: int = 50, metric: str = "cosine", transformer: str | None = None) -> None:
        if every_n_steps < 1:
            raise ScheduleError(f"RedundancyMonitor(every_n_steps={every_n_steps}): it must be at least 1.")
        get_metric(metric)
        self.every_n_steps, self.metric, self.transformer = every_n_steps, metric, transformer
        self._steps = StepCounter()
        self._tracker: ImportanceTracker | None = None
        self._measured = False
        self._latest: dict[str, float] = {}
        self._restored: dict[str, Any] | None = None
        self._file: Path | None = None

    @property
    def state_key(self) -> str:
        """One state per metric: two monitors can stand side by side."""
        return self._generate_state_key(metric=self.metric)

    def should_measure(self, step: int) -> bool:
        """Whether the ``step``-th optimizer step, counted from 1, is measured; override it for another cadence."""
        return step % self.every_n_steps == 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the sublayers and register the hooks, before anything is compiled."""
        self._tracker = ImportanceTracker(pl_module, self.metric, name=self.transformer)
        self._tracker.attach()
        self._file = run_directory(trainer) / IMPORTANCE_FILE
        if trainer.is_global_zero and self._restored is None and trainer.global_step == 0:
            # what an earlier run left here; not in the next hook, where other monitors begin the new file
            self._file.unlink(missing_ok=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin ``importance.csv``, with the history of the run that is resumed."""
        self._steps.start(trainer)
        restored, self._restored = self._restored or {}, None
        if restored:
            self._require_tracker().load_state_dict(own_share(trainer, restored["sums"]))
            self._latest = restored["latest"]
            show(trainer, self._latest)
        if self._file is not None and trainer.is_global_zero and (restored or not self._file.exists()):
            write_text(self._file, restored.get("history", _HEADER))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Switch the hooks on if this batch belongs to a measured step."""
        self._measured = any(self.should_measure(step) for step in self._steps.coming(trainer))
        self._require_tracker().active = self._measured

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Switch them off: the passes that other callbacks make at the end of a batch are not the training step's."""
        if pl_module.automatic_optimization:
            self._require_tracker().active = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Once the measured optimizer step is done, write and log the importances."""
        tracker = self._require_tracker()
        tracker.active = False
        if self._steps.taken(trainer) and self._measured:
            self._record(trainer, tracker.compute())
            tracker.reset()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the hooks off the model."""
        self._require_tracker().detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks off the model after an error, too."""
        if self._tracker is not None:
            self._tracker.detach()

    def state_dict(self) -> dict[str, Any]:
        """Running sums and history, as primitives."""
        if self._tracker is None or self._file is None:
            return {}
        history = self._file.read_text(encoding="utf-8") if self._file.exists() else _HEADER
        return {"sums": every_share(self._tracker.state_dict()), "history": history, "latest": self._latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training starts, when the run directory is known."""
        self._restored = state_dict

    def _record(self, trainer: Trainer, scores: ImportanceScores) -> None:
        rows = list(scores.rows())
        if trainer.is_global_zero and self._file is not None:
            lines = [f"{trainer.global_step},{block},{kind},{self.metric},{value!r}\n" for block, kind, value in rows]
            with self._file.open("a", encoding="utf-8") as file:
                file.writelines(lines)
        # two monitors of different metrics must not log under one name
        group = "importance" if self.metric == "cosine" else f"importance_{self.metric}"
        fresh = {f"{group}/{kind}.{block}": value for block, kind, value in rows}
        for kind in dict.fromkeys(kind for _, kind, _ in rows):
            values = [value for _, own, value in rows if own == kind]
            if values:
                fresh[f"{group}/{kind}_mean"] = sum(values) / len(values)
        self._latest.update(fresh)
        publish(trainer, fresh)

    def _require_tracker(self) -> ImportanceTracker:
        assert self._tracker is not None, "on_fit_start comes first"
        return self._tracker
