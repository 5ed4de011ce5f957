"""What the commands beside training share: the run directory, preparation as Lightning does it, scores and quality."""

from __future__ import annotations

import os
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import SaveConfigCallback
from torch import nn

from layershed.building import build_model
from layershed.calibration import estimate_importance
from layershed.console import watched
from layershed.data import TextData
from layershed.errors import CalibrationError, CheckpointError, DataError, LayershedError, ModelError
from layershed.metrics import get_metric
from layershed.module import CausalLM
from layershed.plan import ImportanceScores
from layershed.quality import Quality, evaluate_quality
from layershed.surgery import dropped_sublayers


class TrainerError(LayershedError, ValueError):
    """A Trainer that cannot be had on this machine."""


def check_writable(folder: Path) -> None:
    """Refuse a folder that nothing can be written to.

    Raises:
        TrainerError: If so.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise TrainerError(f"trainer.default_root_dir={str(folder)!r}: {str(there)!r} is a file, not a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise TrainerError(f"trainer.default_root_dir={str(folder)!r}: nothing can be written to {str(there)!r}.")


def check_scoring(metric: str, batches: int, quality_batches: int = 1) -> None:
    """Refuse an unknown metric, or no batches.

    Raises:
        LayershedError: If so.
    """
    get_metric(metric)
    for name, number in (("batches", batches), ("quality_batches", quality_batches)):
        if number < 1:
            raise CalibrationError(f"{name}={number}: it must be at least 1.")


def next_version(folder: Path) -> int:
    """The number of the next run in a folder."""
    taken = [int(path.name.removeprefix("version_")) for path in folder.glob("version_*") if path.name[8:].isdigit()]
    return max(taken, default=-1) + 1


def run_directory(trainer: pl.Trainer) -> Path:
    """Where the results of this run go."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def open_folder(trainer: pl.Trainer, model: CausalLM) -> Path:
    """The run directory, with the config in it that repeats the run."""
    folder = run_directory(trainer)
    folder.mkdir(parents=True, exist_ok=True)
    for callback in getattr(trainer, "callbacks", ()):
        if isinstance(callback, SaveConfigCallback):
            callback.setup(trainer, model, stage="predict")
    return folder


def prepare(trainer: pl.Trainer, model: CausalLM, data: TextData) -> Path:
    """What Lightning does before it trains: data, device, precision, and the config on disk."""
    if model.hparams.get("pretrained") is None:
        note = "note: without --model.pretrained the weights are random, and so is what is measured of them"
        print(note)
    data.prepare_data()
    data.setup()
    trainer.precision_plugin.convert_module(model)
    model.to(trainer.strategy.root_device)
    return open_folder(trainer, model)


def score_sublayers(
    trainer: pl.Trainer, model: CausalLM, data: TextData, metric: str, batches: int, folder: Path
) -> ImportanceScores:
    """The importances, written into ``importance.csv``."""
    with trainer.precision_plugin.forward_context():
        scores = estimate_importance(model, watched(data.train_dataloader(), batches, "Scoring"), metric)
    rows = [f"0,{block},{kind},{metric},{value!r}\n" for block, kind, value in scores.rows()]
    (folder / "importance.csv").write_text("step,block,kind,metric,value\n" + "".join(rows), encoding="utf-8")
    return scores


def held_out_quality(trainer: pl.Trainer, model: nn.Module, data: TextData, batches: int, when: str = "") -> Quality:
    """Quality on the held-out text."""
    with trainer.precision_plugin.forward_context():
        return evaluate_quality(model, watched(data.val_dataloader(), batches, f"Measuring quality {when}".rstrip()))


def load_base(trainer: pl.Trainer, source: str, model: CausalLM, data: TextData) -> nn.Module:
    """The dense model to compare with, where and as the model itself is.

    Raises:
        LayershedError: If it cannot be built, is not dense, or has no embedding for every token of the text.
    """
    base = build_model(source, None, next(model.model.parameters()).dtype).eval()
    if gone := dropped_sublayers(base):
        names = ", ".join(sublayer.name for sublayer in gone)
        raise ModelError(f"base={source!r}: it lacks {names}, so it is not dense; give the model that it came from.")
    vocabulary = base.config.get_text_config().vocab_size
    if data.vocab_size > vocabulary:
        raise DataError(f"base={source!r}: the tokenizer has {data.vocab_size} ids and the base only {vocabulary}.")
    trainer.precision_plugin.convert_module(base)
    base.to(trainer.strategy.root_device)
    return base


def load_checkpoint(model: CausalLM, path: str) -> None:
    """Become what a checkpoint of ``fit`` holds, as Lightning's validate does.

    Raises:
        CheckpointError: If it does not fit.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"ckpt_path={path!r}: there is no such file.")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    model.on_load_checkpoint(checkpoint)
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise CheckpointError(
            f"ckpt_path={path!r}: its weights do not fit this model; give the config of its run by --config."
        ) from error


def name_of(model: CausalLM) -> str:
    """The model as it is called in titles."""
    source = str(model.hparams.get("pretrained") or type(model.model).__name__)
    return Path(source).stem if source.endswith(".gguf") else source
