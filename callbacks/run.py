"""What the callbacks agree on: the run directory with its files, and how metrics are published."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer

from layershed.overrides import overridden
from layershed.plan import Sublayer
from layershed.surgery import bypassed_sublayers

IMPORTANCE_FILE = "importance.csv"
PLAN_FILE = "drop_plan.json"
SPEED_FILE = "speed.json"
REPORT_FILE = "report.html"


def run_directory(trainer: Trainer) -> Path:
    """The directory of this run: the first logger's, or the trainer's root; the same on every rank."""
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def publish(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Log metrics at the current step, in any hook: to every logger, and where other callbacks can monitor them.

    ``pl_module.log`` is refused in most hooks, and reaches the loggers only every ``log_every_n_steps``.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step)
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: a reader, and a killed run, never see half of it."""
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def current_drop(pl_module: LightningModule) -> tuple[Sublayer, ...]:
    """What is bypassed now, without a probe: cheap enough for every step."""
    return bypassed_sublayers(pl_module) if next(overridden(pl_module), None) else ()


class StepCounter:
    """Tells whether an optimizer step was taken since the last call, whatever the accumulation."""

    def __init__(self) -> None:
        self._last = -1

    def start(self, trainer: Trainer) -> None:
        """Begin counting at the trainer's current step."""
        self._last = trainer.global_step

    def stepped(self, trainer: Trainer) -> bool:
        """Whether ``trainer.global_step`` has moved."""
        moved = trainer.global_step != self._last
        self._last = trainer.global_step
        return moved
