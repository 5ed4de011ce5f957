"""Parts that the commands without training share: run directory, preparation, scores and quality."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback
from torch import nn
from transformers import PreTrainedModel

from layershed.errors import CalibrationError, DataError, ExportError, LayershedError, ModelError
from layershed.files.atomic import refuse_source, write_text
from layershed.importance.metrics import check_metric
from layershed.importance.tracker import estimate_importance
from layershed.planning.plan import ImportanceScores
from layershed.quality import Quality, evaluate_quality
from layershed.saving.load_model import build_model
from layershed.saving.pretrained import check_folder
from layershed.surgery import dropped_sublayers
from layershed.training.causal_lm import CausalLM
from layershed.training.text_data import TextData


class TrainerError(LayershedError, ValueError):
    """The Trainer cannot be built on this machine with these options."""


def check_writable(folder: Path) -> None:
    """Check that a folder can be written to.

    Raises:
        TrainerError: If it cannot.
    """
    try:
        if "\0" in str(folder):
            raise ValueError("it contains a null byte")
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        what = f"trainer.default_root_dir={str(folder)!r}"
        raise TrainerError(f"{what}: no folder can have that name ({reason}); give another.") from None
    if not there.is_dir():
        raise TrainerError(
            f"trainer.default_root_dir={str(folder)!r}: {str(there)!r} is a file, not a folder; give another."
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise TrainerError(
            f"trainer.default_root_dir={str(folder)!r}: nothing can be written to {str(there)!r}; give another folder."
        )
    try:
        # even root cannot write into /proc or onto a full disk
        with tempfile.TemporaryDirectory(dir=there) as trial:
            (Path(trial) / "trial").write_bytes(bytes(4096))
    except OSError as error:
        raise TrainerError(
            f"trainer.default_root_dir={str(folder)!r}: nothing can be written to {str(there)!r} ({error.strerror}); "
            "give another folder."
        ) from None


def check_seed(seed: int | bool | None) -> None:
    """Check that every random number generator accepts the seed.

    Raises:
        TrainerError: If one does not.
    """
    if seed is not None and not 0 <= seed < 2**32:
        raise TrainerError(f"seed_everything={seed}: it must be in [0, {2**32}).")


def check_devices(options: Mapping[str, Any]) -> None:
    """Check the options that Lightning's Trainer accepts although no run can succeed with them.

    Raises:
        TrainerError: If an option has such a value.
    """
    accumulated = options.get("accumulate_grad_batches", 1)
    if accumulated < 1:
        raise TrainerError(f"trainer: accumulate_grad_batches={accumulated}: it must be at least 1.")
    devices, cores = options.get("devices"), os.cpu_count() or 1
    given = str(devices)
    # at least two, so that a distributed run can be tried on any machine
    if options.get("accelerator") == "cpu" and given.isdecimal() and int(given) > max(2, cores):
        raise TrainerError(
            f"trainer: devices={devices}: each device is a process, but this machine has {cores} cores; lower it."
        )


def check_scoring(metric: str, batches: int, quality_batches: int = 1) -> None:
    """Check the metric and the numbers of batches.

    Raises:
        LayershedError: If the metric is unknown or a number is below 1.
    """
    check_metric(metric)
    for name, number in (("batches", batches), ("quality_batches", quality_batches)):
        if number < 1:
            raise CalibrationError(f"{name}={number}: it must be at least 1.")


def run_directory(trainer: pl.Trainer) -> Path:
    """Folder for the results of this run."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def check_output(trainer: pl.Trainer, output: str, model: CausalLM) -> None:
    """Check, before computing, that saving the dropped model destroys nothing.

    Raises:
        ExportError: If the output folder holds other files, the run directory or the source model.
    """
    directory = run_directory(trainer)
    try:
        check_folder(directory / output, apart=directory)
        refuse_source(directory / output, model.hparams.get("pretrained"))
    except ExportError:
        if trainer.loggers:
            with suppress(OSError):
                directory.rmdir()  # claimed for this run, and still empty
        raise


def open_folder(trainer: pl.Trainer, model: CausalLM) -> Path:
    """Create the run directory and write the config into it, so that the run can be repeated."""
    folder = run_directory(trainer)
    folder.mkdir(parents=True, exist_ok=True)
    for callback in getattr(trainer, "callbacks", ()):
        if isinstance(callback, SaveConfigCallback):
            callback.setup(trainer, model, stage="predict")
    return folder


def prepare(trainer: pl.Trainer, model: CausalLM, data: TextData, ckpt_path: str | None = None) -> Path:
    """Prepare as Lightning does before training: data, device, precision, config on disk."""
    if model.hparams.get("pretrained") is None and ckpt_path is None:
        note = "note: without --model.pretrained the weights are random, so the results mean nothing"
        print(note)
    data.prepare_data()
    data.setup()
    trainer.precision_plugin.convert_module(model)
    model.to(trainer.strategy.root_device)
    return open_folder(trainer, model)


def score_sublayers(
    trainer: pl.Trainer, model: CausalLM, data: TextData, metric: str, batches: int, folder: Path
) -> ImportanceScores:
    """Measure the importances and write them to ``importance.csv``."""
    with trainer.precision_plugin.forward_context():
        scores = estimate_importance(model, data.train_dataloader(), metric, max_batches=batches)
    rows = [f"0,{block},{kind},{metric},{value!r}\n" for block, kind, value in scores.rows()]
    write_text(folder / "importance.csv", "step,block,kind,metric,value\n" + "".join(rows))
    return scores


def held_out_quality(trainer: pl.Trainer, model: nn.Module, data: TextData, batches: int) -> Quality:
    """Measure quality on the held-out text."""
    with trainer.precision_plugin.forward_context():
        return evaluate_quality(model, data.val_dataloader(), max_batches=batches)


def load_base(
    trainer: pl.Trainer, source: str, model: CausalLM, data: TextData, option: str = "base"
) -> PreTrainedModel:
    """Load the dense model to compare with, on the device and in the dtype of the model.

    Args:
        trainer: The Trainer.
        source: A folder, a hub id or a GGUF file.
        model: The dropped model.
        data: The text, for its tokenizer.
        option: Name of the option that gave the source, for errors.

    Raises:
        LayershedError: If it cannot be built, is not dense, or has too few embeddings for the tokenizer.
    """
    try:
        base = build_model(source, None, next(model.model.parameters()).dtype).eval()
    except ModelError as error:  # it names another option
        raise ModelError(f"{option}: {error}") from error
    if gone := dropped_sublayers(base):
        names = ", ".join(sublayer.name for sublayer in gone)
        raise ModelError(f"{option}={source!r}: it lacks {names}, so it is not dense; give the dense model.")
    vocabulary = base.config.get_text_config().vocab_size
    if data.vocab_size > vocabulary:
        raise DataError(
            f"{option}={source!r}: the tokenizer has {data.vocab_size} ids, but the base has only {vocabulary} "
            "embeddings; give the model before the drop."
        )
    trainer.precision_plugin.convert_module(base)
    base.to(trainer.strategy.root_device)
    return base


def name_of(model: CausalLM) -> str:
    """Name of the model in titles."""
    source = str(model.hparams.get("pretrained") or type(model.model).__name__)
    return Path(source).stem if source.endswith(".gguf") else source
