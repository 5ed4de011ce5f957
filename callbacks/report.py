"""Ends a run with a table in the terminal and a self-contained HTML page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from layershed.arguments import check_number
from layershed.errors import ScheduleError
from layershed.integration.course import Course
from layershed.integration.facts import config_of, facts_of, usage_of
from layershed.integration.gathered import (
    changes_of,
    lora_events,
    loss_label,
    model_name,
    rounds_of,
    scores_of,
    sdr_of,
)
from layershed.integration.measurements import logged_quality, quality_from, quality_state
from layershed.integration.module_hooks import (
    leave_structure,
    refuse_shards_changed_by_hand,
    watch_for_bypass,
    watch_for_changes,
)
from layershed.integration.namespaces import Callback, LightningModule, Trainer
from layershed.integration.run import (
    IMPORTANCE_FILE,
    REPORT_FILE,
    SPEED_FILE,
    current_drop,
    plan_of,
    run_directory,
)
from layershed.integration.samples import Samples
from layershed.integration.validated_metrics import ValidatedMetrics
from layershed.integration.watching import Watcher
from layershed.performance.speed_report import MeasuredSpeed, report_from
from layershed.quality import OwnQuality, Quality
from layershed.reporting.control import CONTROL_FOLDER, find_control, read_control
from layershed.reporting.downsampling import shown_steps
from layershed.reporting.drop_cost import cost_rows
from layershed.reporting.figures import MOST_COLUMNS
from layershed.reporting.html_report import write_report
from layershed.reporting.importance_file import measured_steps, read_importance
from layershed.reporting.record import ImportancePoint, RunRecord, Sample, drop_steps
from layershed.reporting.summary import rows_table, summary_table

_SAMPLES = "the samples of text"


class Report(Callback):
    """Gathers what the run logged and wrote: losses, importances, the drop, its quality and its speed.

    Hooks: records losses in ``on_train_batch_end`` and ``on_validation_end``. On rank 0 it writes in ``on_fit_end``
    and prints in ``teardown``, when the progress bar is gone.
    Logs: nothing.
    Writes: ``report.html`` in the run directory, and the summary table to the terminal.
    Checkpoint: the losses so far, and what the model wrote before the drop. A long run keeps every second, fourth, ...
    loss, but all losses next to a drop.

    Each part comes from the logged metrics, the file or the state of another callback. A part is left out if its
    callback is absent, and with a warning if its file cannot be read: importances from RedundancyMonitor, the drop and
    its quality, also by round, from SublayerDrop, speed and SDR from SpeedMonitor, and what Quantization, LoRARecovery
    and Export did if they are listed before. It also shows what the module logs in validation.

    Args:
        every_n_steps: Optimizer steps between two recorded training losses.
        train_loss: Name under which the LightningModule logs its training loss.
        val_loss: Name under which it logs its validation loss.
        title: Title of the page; None for the name of the model.
        control: Run directory of the same run without the drop, to say what the drop cost. True for the folder
            ``control`` of this run's own directory, which ``train.py fit --control true`` fills after the run. None
            for no control; the report then says what the figures at the end cannot tell.
        samples: Prompts of the validation text after which a causal language model with a tokenizer writes, before the
            drop and at the end, the most likely next token each time; 0 for none. The tokenizer is the attribute
            ``tokenizer`` of the data module or of the module.

    Raises:
        ControlError: Before training, if ``control`` holds no finished run without a drop.
        ScheduleError: If ``every_n_steps`` is below 1 or ``samples`` below 0.
        StrategyError: Before training, if FSDP2 shards a model that was bypassed by hand and no callback changes it.
    """

    def __init__(
        self,
        every_n_steps: int = 10,
        train_loss: str = "train_loss",
        val_loss: str = "val_loss",
        title: str | None = None,
        control: str | Path | bool | None = None,
        samples: int = 2,
    ) -> None:
        check_number(every_n_steps, "Report: every_n_steps", ScheduleError, whole=True)
        if every_n_steps < 1:
            raise ScheduleError(f"Report(every_n_steps={every_n_steps}): every_n_steps must be at least 1.")
        self.every_n_steps, self.train_loss, self.val_loss, self.title = every_n_steps, train_loss, val_loss, title
        check_number(samples, "Report: samples", ScheduleError, whole=True)
        if samples < 0:
            raise ScheduleError(f"Report(samples={samples}): samples must be at least 0.")
        self.control, self.samples = control, samples
        self.control_doubts: tuple[str, ...] = ()
        self._watcher = Watcher("Report")
        self._course, self._samples = Course(), Samples(samples)
        self._quality: dict[str, Quality | OwnQuality] = {}
        self._metrics = ValidatedMetrics(val_loss)
        self._page: tuple[RunRecord, Path] | None = None
        self._printed = True
        self._stale: set[tuple[str, int]] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start from the beginning unless this Trainer continues its run."""
        watch_for_changes(pl_module)
        if stage == "fit":
            self._watcher.forget()
        if stage == "fit" and trainer.global_step == 0:  # a resumed run loads the checkpoint's state later
            self._course, self._samples = Course(), Samples(self.samples)
            self._quality, self._metrics = {}, ValidatedMetrics(self.val_loss)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the files of an earlier run in the directory: this run's report leaves them out."""
        watch_for_changes(pl_module)
        refuse_shards_changed_by_hand(trainer, pl_module, self)
        if isinstance(self.control, str | Path):
            find_control(self.control)
        self._page, self._printed = None, True
        self._stale = set(_files(run_directory(trainer)).items())
        self._course.start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the model writes, if it drops at the first step."""
        self._write_dense(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the quality around a drop by a callback that is listed after this one."""
        self._note_quality(trainer)
        self._course.note_quantization(trainer)
        self._course.batch_begins(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note training loss, learning rate and throughput, the quality around a drop, and what the model writes."""
        watch_for_bypass(pl_module)
        loss = trainer.callback_metrics.get(self.train_loss)
        step = trainer.global_step
        with self._watcher.leaving_out("the throughput"):
            self._course.batch_ends(trainer, batch, current_drop(pl_module))
        if (
            loss is not None
            and step % self.every_n_steps == 0
            and step != (self._course.curves["train"].last_step or 0)
        ):
            with self._watcher.leaving_out("a training loss"):
                self._course.point(step, loss.item())
        self._note_quality(trainer)
        self._write_dense(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note which metrics there are before the validation."""
        self._metrics.validation_begins(trainer)
        self._course.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the validation loss, and what else the module logs in validation."""
        self._course.go_on()
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        loss = trainer.callback_metrics.get(self.val_loss)
        if loss is not None:
            with self._watcher.leaving_out("a validation loss"):
                self._course.validation(trainer.global_step, loss.item())
        with self._watcher.leaving_out("a metric of the validation"):
            self._metrics.validation_ends(trainer, dropped=bool(current_drop(pl_module)))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page; :meth:`teardown` prints the table."""
        self._note_quality(trainer)
        with self._watcher.leaving_out(f"the table and {REPORT_FILE}"):
            directory = run_directory(trainer)
            if trainer.is_global_zero:
                record = self._record(trainer, directory, pl_module)
                self._page, self._printed = (record, write_report(record, directory / REPORT_FILE)), False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print the table, and restore the hooks of a module that is in its original state."""
        leave_structure(pl_module)
        if self._page is not None and not self._printed:
            self._printed = True
            with self._watcher.leaving_out("the table"):
                _tell(summary_table(self._page[0]), self._page[1])

    def tell_control(self) -> bool:
        """After the run: complete the page with the control in the run's own directory, and print what it tells.

        Returns:
            False if the page was not written in this process, as with ddp_spawn.
        """
        if self._page is None:
            return False
        record, path = self._page
        control = read_control(path.parent / CONTROL_FOLDER, self.train_loss, self.val_loss)
        record = replace(record, control=control, control_pending=False)
        self._page = record, write_report(record, path)
        _tell(rows_table("", cost_rows(record)), path)
        return True

    def tell_no_control(self) -> None:
        """After the run: let the page say that the control did not end."""
        if self._page is not None:
            record = replace(self._page[0], control_pending=False, control_failed=True)
            self._page = record, write_report(record, self._page[1])

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the hooks of a module that is in its original state, after an error too."""
        leave_structure(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The losses and qualities so far, as primitives."""
        return {
            **self._course.state_dict(),
            "samples": self._samples.state_dict(),
            "quality": quality_state(self._quality),
            "metrics": self._metrics.state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._course.load_state_dict(state_dict)
        if "samples" in state_dict:  # checkpoints of earlier versions have none
            self._samples.load_state_dict(state_dict["samples"])
        self._quality = quality_from(state_dict["quality"])
        self._metrics.load_state(state_dict.get("metrics", {}))  # checkpoints of earlier versions have none

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save throughput and duration."""
        self._course.save_times(checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore throughput and duration."""
        self._course.load_times(checkpoint)

    def _note_quality(self, trainer: Trainer) -> None:
        """Note the quality that SublayerDrop logged, and add its loss to the curve."""
        for when in ("before", "after", "end"):
            quality = logged_quality(trainer, when)
            if quality is not None and quality != self._quality.get(when):
                self._quality[when] = quality
                self._course.quality(trainer.global_step, quality.values.get("loss"))

    def _write_dense(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with self._watcher.leaving_out(_SAMPLES):
            if self._samples.due(trainer, pl_module) and not current_drop(pl_module):
                self._samples.write_dense(trainer, pl_module)
                self._course.interrupt()

    def _record(self, trainer: Trainer, directory: Path, pl_module: LightningModule) -> RunRecord:
        written = {name for name, _ in set(_files(directory).items()) - self._stale}
        plan, history, speed = None, directory / IMPORTANCE_FILE, None
        measured: dict[str, list[int]] = {}
        importance: tuple[ImportancePoint, ...] = ()
        with self._watcher.leaving_out("the drop"):
            plan = plan_of(directory, pl_module)
        if IMPORTANCE_FILE in written:
            with self._watcher.leaving_out("the importances"):
                steps = measured_steps(history)
                # only the steps that will be drawn: all rows of a long run would fill the memory
                shown = {metric: set(shown_steps(own, drop_steps(plan), MOST_COLUMNS)) for metric, own in steps.items()}
                importance, measured = read_importance(history, shown), steps
        if SPEED_FILE in written:
            with self._watcher.leaving_out("the speed"):
                speed = _read_speed(directory / SPEED_FILE)
        rounds, quality = rounds_of(trainer, plan), dict(self._quality)
        if rounds and (first := rounds[0].quality.before) is not None:
            quality["before"] = first
        changes: tuple[tuple[str, str], ...] = ()
        with self._watcher.leaving_out("quantization, LoRA and the exported folder"):
            changes = changes_of(trainer, pl_module, directory)
        facts: tuple[tuple[str, str], ...] = ()
        usage: tuple[tuple[str, str], ...] = ()
        samples: tuple[Sample, ...] = ()
        config = ""
        with self._watcher.leaving_out("how it ran"):
            facts = facts_of(trainer, pl_module, self._course.elapsed)
            config, usage = config_of(trainer, pl_module, directory), usage_of(trainer, directory)
        with self._watcher.leaving_out(_SAMPLES):
            samples = self._samples.samples(trainer, pl_module)
        control = None
        if isinstance(self.control, str | Path):
            with self._watcher.leaving_out("the control"):
                control = read_control(self.control, self.train_loss, self.val_loss)
                control = replace(control, doubts=self.control_doubts)
        return RunRecord(
            model=self.title or model_name(pl_module),
            importance=importance,
            losses=self._course.losses(),
            plan=plan,
            quality=quality,
            speed=speed,
            measured={metric: len(steps) for metric, steps in measured.items()},
            sdr=sdr_of(trainer, rounds),
            rounds=rounds if len(rounds) > 1 else (),
            metrics=self._metrics.points(dropped=bool(plan)),
            changes=changes,
            loss_label=loss_label(pl_module),
            steps=trainer.global_step,
            validations=tuple(self._course.curves["own"]),
            control=control,
            control_pending=self.control is True,
            curves=self._course.others(),
            events=tuple(sorted([*lora_events(trainer), *self._course.events()])),
            scores=scores_of(trainer, plan),
            samples=samples,
            facts=facts,
            config=config,
            usage=usage,
        )


def _tell(table: Table, path: Path) -> None:
    console = Console()
    console.print(table)
    console.print(f"Report: {path}", soft_wrap=True, highlight=False, markup=False)


def _read_speed(path: Path) -> MeasuredSpeed:
    return report_from(json.loads(path.read_text(encoding="utf-8")))


def _files(directory: Path) -> dict[str, int]:
    """The other callbacks' files in the run directory, with the times of their last changes."""
    paths = (directory / name for name in (IMPORTANCE_FILE, SPEED_FILE))
    return {path.name: path.stat().st_mtime_ns for path in paths if path.is_file()}
