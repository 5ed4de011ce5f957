"""``validate``, ``test`` and ``predict``: which model is evaluated, on which text; whether fit measured the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from layershed.discovery.find import find_sublayers
from layershed.errors import LayershedError
from layershed.files.checkpoint_file import read_checkpoint
from layershed.files.run_config import config_in, named_entries
from layershed.formatting import counts_of
from layershed.surgery import dropped_sublayers

COMMANDS = ("validate", "test", "predict")
_BATCHES = {
    "val": ("limit_val_batches", "num_val_batches", "val_dataloaders"),
    "test": ("limit_test_batches", "num_test_batches", "test_dataloaders"),
    "predict": ("limit_predict_batches", "num_predict_batches", "predict_dataloaders"),
}
_OF_TRAINER = ("limit_val_batches", "precision")  # what decides the figure
_OF_TRAINING = ("max_tokens", "num_workers", "shuffle_rows")  # options of the text that do not touch what is held out


class EvaluatedModel(Callback):
    """Says which model is evaluated on how much text, and what came out.

    Prints: a line before the first batch of ``validate``, ``test`` and ``predict``; after ``validate`` and ``test``
    one with the metrics.

    Args:
        checkpoint: The checkpoint whose weights are evaluated; None for those that the model was built with.
        options: What they are evaluated on: the sections ``data`` and ``trainer`` of a config.
    """

    def __init__(self, checkpoint: Path | None, options: Mapping[str, Any]) -> None:
        self.checkpoint, self.options = checkpoint, options

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is evaluated."""
        self._tell(trainer, pl_module, "val")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is evaluated."""
        self._tell(trainer, pl_module, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what is evaluated."""
        self._tell(trainer, pl_module, "predict")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metrics."""
        if trainer.is_global_zero:
            print(", ".join(f"{name} {float(value):.4f}" for name, value in sorted(trainer.callback_metrics.items())))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metrics."""
        self.on_validation_end(trainer, pl_module)

    def _tell(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not trainer.is_global_zero:
            return
        noted = {} if self.checkpoint is None else read_checkpoint(self.checkpoint, mmap=True)
        where = f" ({self.checkpoint})" if self.checkpoint else ""
        print(f"evaluating {evaluated(pl_module, noted)}{where}")
        option, numbers, loaders = _BATCHES[stage]
        number, given, loader = sum(getattr(trainer, numbers)), getattr(trainer, option), getattr(trainer, loaders)
        limit = "" if isinstance(given, float) and given == 1 else f" (trainer.{option}={given})"
        compared = "" if stage == "predict" else self._as_reported(number, len(loader), noted.get("global_step", 0))
        print(f"on {number} batch{'es' * (number != 1)} of the held-out text{limit}{compared}")

    def _as_reported(self, number: int | float, available: int, step: int) -> str:
        config = None if self.checkpoint is None else config_of_run(self.checkpoint)
        reported = reported_batches(config)
        if config is None or reported is None:
            return ""
        if other := other_options(config, self.options):
            return f"; the losses in the report of the run have another {', another '.join(other)}, so they differ"
        reported = min(reported, available)  # a run measures on no more batches than exist
        if reported == number:
            steps = config["trainer"].get("max_steps")
            earlier = isinstance(steps, int) and 0 < step < steps
            of_step = f"; this checkpoint is of step {step} of {steps}, so its losses are not those at the end"
            return f", the same as the losses in the report of the run{of_step * earlier}"
        return f"; the losses in the report of the run are over the first {reported}, so they differ"


def other_options(config: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Names of the options that decide the losses of held-out text and differ, such as ``data.source``.

    Args:
        config: The config of a run. An option that it does not hold is not compared: an older version wrote it.
        given: The sections ``data`` and ``trainer`` of another, as far as they count.
    """
    return [
        f"{section}.{name}"
        for section, options in given.items()
        for name, value in options.items()
        if name in config[section] and name not in _OF_TRAINING and _plain(config[section][name]) != _plain(value)
    ]


def _plain(value: Any) -> str:
    return json.dumps(value, default=str)


def evaluated(module: LightningModule, noted: Mapping[str, Any]) -> str:
    """What a module holds, such as ``the dropped model: 6 of 24 sublayers, plan of step 200``.

    Args:
        module: A module of the command line.
        noted: The checkpoint that it was loaded from; empty without one.
    """
    gone = dropped_sublayers(module)
    if not gone:
        random = module.hparams.get("pretrained") is None and not noted
        return "a model with random weights; give --ckpt_path or --model.pretrained" if random else "the dense model"
    try:
        number = len({*find_sublayers(module), *gone})
    except LayershedError:  # nothing is left
        number = len(gone)
    plan = (noted.get("callbacks", {}).get("SublayerDrop") or {}).get("plan") or {}
    steps = [drop["step"] for drop in plan.get("drops", ()) if drop.get("step") is not None]
    of_step = f", plan of step {max(steps)}" if steps else ""
    return f"the dropped model: {len(gone)} of {number} sublayers{of_step} ({counts_of(gone)} dropped)"


def config_of_run(checkpoint: Path) -> Mapping[str, Any] | None:
    """The config that a run saved beside its checkpoints; None if it is not there or cannot be read.

    Raises:
        ConfigError: If it is no text, or expands to billions of values.
    """
    content = config_in(checkpoint.parent.parent)
    parts = content is not None and (content.get("data"), content.get("trainer"))
    return content if parts and all(isinstance(part, Mapping) for part in parts) else None


def options_of_run(checkpoint: Path) -> str | None:
    """The text and the batches of the run that wrote a checkpoint, as a config in JSON.

    It is for a command line without a config. No class is taken from the run's config, which may be a stranger's.
    """
    content = config_of_run(checkpoint)
    if content is None:
        return None
    trainer = {key: content["trainer"][key] for key in _OF_TRAINER if content["trainer"].get(key) is not None}
    return json.dumps({"data": dict(content["data"]), "trainer": trainer}, default=str)


def reported_batches(config: Mapping[str, Any] | None) -> int | None:
    """The number of validation batches on which a run measured the quality around its drop."""
    trainer = {} if config is None else config["trainer"]
    for _, entry in named_entries(trainer.get("callbacks")):
        if isinstance(entry, Mapping) and str(entry.get("class_path")).endswith(".SublayerDrop"):
            number, limit = (entry.get("init_args") or {}).get("quality_batches"), trainer.get("limit_val_batches")
            return min(number, limit) if isinstance(number, int) and isinstance(limit, int) else number
    return None
