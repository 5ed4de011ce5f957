"""The callbacks that the command line adds to those of a config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelSummary, ProgressBar

from layershed.callbacks import ExactResume
from layershed.cli.evaluation import COMMANDS, EvaluatedModel
from layershed.cli.fit_bar import FitBar
from layershed.cli.model_line import ModelLine
from layershed.cli.named_callbacks import as_list
from layershed.cli.step_clock import StepClock
from layershed.cli.stop_on_signal import StopOnSignal


def with_own(
    trainer: Any, command: str | None, checkpoint: str | None, text: Mapping[str, Any] | None = None
) -> list[Callback]:
    """The callbacks of a config and those of the command line, in order.

    Every command has a bar and a line about the model, unless the config has its own or wants none. ``fit`` resumes
    exactly, stops with a checkpoint, and logs the time of a step and the learning rate. Commands that evaluate say
    which model they evaluate.

    Args:
        trainer: Config of the Trainer, its callbacks built.
        command: The command.
        checkpoint: Path of the checkpoint to evaluate.
        text: Options of the text to evaluate it on.
    """
    listed = as_list(trainer.get("callbacks"))

    def has(kind: type) -> bool:
        return any(isinstance(one, kind) for one in listed)

    if trainer.get("enable_progress_bar") is not False and not has(ProgressBar):
        listed.insert(0, FitBar())
    if trainer.get("enable_model_summary") is not False and not has(ModelSummary):
        listed.insert(0, ModelLine())
    if command == "fit":
        exact = [] if has(ExactResume) else [ExactResume()]
        logs = trainer.get("logger") not in (False, [])
        rates = [LearningRateMonitor("step")] if logs and not has(LearningRateMonitor) else []
        return [StepClock(), *listed, *exact, *rates, StopOnSignal()]
    if command in COMMANDS:
        path = Path(checkpoint or "")
        options = {"data": dict(text or {}), "trainer": {"precision": trainer.get("precision")}}
        listed.append(EvaluatedModel(path if path.is_file() else None, options))
    return listed
