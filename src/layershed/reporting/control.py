"""The control of a run: the same steps without the drop, read from its run directory. No model, no torch."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from layershed.errors import ConfigError, ControlError
from layershed.files.run_config import CONFIG_FILE, read_config
from layershed.planning.plan import PLAN_FILE
from layershed.reporting.control_file import CONTROL_FILE, read_result
from layershed.reporting.metrics_file import METRICS_FILE, read_metrics
from layershed.reporting.record import Control, LossPoint

CONTROL_FOLDER = "control"
# What must be equal in both runs: else the difference is not the drop's.
_EQUAL = (
    *("seed_everything", "data", "model"),
    *("trainer.max_steps", "trainer.max_epochs", "trainer.accumulate_grad_batches", "trainer.precision"),
)
# What may differ between a run with a drop and one without it.
_FREE = (
    *("trainer.callbacks", "trainer.default_root_dir", "trainer.logger"),
    *("ckpt_path", "control", "model.distillation"),
)


def find_control(folder: str | Path) -> Path:
    """The directory of a control: the folder, or the control within the directory of a run.

    Raises:
        ControlError: If the folder holds no finished run, or a run that drops sublayers and has no control.
    """
    folder = Path(folder)
    for path in (folder / CONTROL_FOLDER, folder):
        if (path / METRICS_FILE).is_file() or (path / CONTROL_FILE).is_file():  # a short one logs no row
            if (path / PLAN_FILE).is_file():
                raise ControlError(
                    f"control={str(folder)!r}: this run drops sublayers itself ({PLAN_FILE}), so it is no control. "
                    "Give a run of the same config without the drop."
                )
            return path
    raise ControlError(
        f"control={str(folder)!r}: there is no {METRICS_FILE} in it. Give the directory of a finished run that has a "
        "CSVLogger, as train.py fit has by default."
    )


def read_control(folder: str | Path, train_loss: str = "train_loss", val_loss: str = "val_loss") -> Control:
    """Read what a control logged.

    Args:
        folder: Its run directory, or that of a run that holds it.
        train_loss: Name of its training loss.
        val_loss: Name of its validation loss.

    Raises:
        ControlError: If the folder holds no control, or a file cannot be read.
    """
    path = find_control(folder)
    try:
        result = read_result(path / CONTROL_FILE) if (path / CONTROL_FILE).is_file() else None
        curves = read_metrics(path / METRICS_FILE) if (path / METRICS_FILE).is_file() else {}
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ControlError(
            f"control={str(folder)!r}: {path} cannot be read ({error}). Run the control again."
        ) from None
    names = {"train": train_loss, "val": val_loss}
    losses = [LossPoint(step, split, loss) for split, name in names.items() for step, loss in curves.pop(name, ())]
    validated = {point.step for point in losses if point.split == "val"}
    others = {name: {step: value for step, value in curve if step in validated} for name, curve in curves.items()}
    return Control(
        folder=str(folder),
        start=None if result is None else result.start,
        end=max((point.step for point in losses), default=0) if result is None else result.end,
        quality={} if result is None else result.quality,
        without=() if result is None else result.without,
        # a log may also hold the steps before it, which are the run's own
        losses=tuple(point for point in losses if result is None or point.step >= result.start),
        metrics={name: values for name, values in others.items() if values},
    )


def differences(own: Mapping[str, Any], folder: str | Path) -> list[str]:
    """The options in which a control differs from this run, such as ``data.seed: 0, control 1``.

    Args:
        own: The config of this run.
        folder: The run directory of the control.

    Raises:
        ControlError: If the seed, the data, the model, its training or the number of steps differ.
    """
    path = find_control(folder)
    places = [path, path.parent] if path.name == CONTROL_FOLDER else [path]
    file = next((place / CONFIG_FILE for place in places if (place / CONFIG_FILE).is_file()), None)
    if file is None:
        return [f"the control has no config.yaml, so nothing tells whether its options are those of this run ({path})"]
    try:
        other = dict(_flat(read_config(file)))
    except (OSError, ConfigError, yaml.YAMLError, RecursionError) as error:
        raise ControlError(f"control={str(folder)!r}: {file} cannot be read ({error}).") from None
    mine = dict(_flat(own))
    names = [name for name in {**mine, **other} if not any(_within(name, free) for free in _FREE)]
    unlike = [name for name in names if mine.get(name) != other.get(name)]
    told = {name: f"{name}: {mine.get(name)}, control {other.get(name)}" for name in unlike}
    # an option that only one version of layershed has is said alone
    known = [name for name in unlike if _has(mine, name) and _has(other, name)]
    grave = [told[name] for name in known if any(_within(name, equal) for equal in _EQUAL)]
    if grave:
        raise ControlError(
            f"control={str(folder)!r}: it differs from this run in more than the drop ({'; '.join(grave)}). Give a run "
            "with the same seed, data, model, optimizer and steps, or --control true."
        )
    return list(told.values())


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(config, Mapping) and config:
        for name, value in config.items():
            yield from _flat(value, f"{prefix}{name}.")
    elif prefix:
        yield prefix.removesuffix("."), config


def _has(config: Mapping[str, Any], name: str) -> bool:
    """Whether a flat config has an option: with a value, or a part of it, or null instead of a class with options."""
    return any(_within(name, own) or _within(own, name) for own in config)


def _within(name: str, option: str) -> bool:
    return f"{name}.".startswith(f"{option}.")
