"""``train.py fit --control``: the same steps without the drop, so that the report can say what the drop cost."""

from __future__ import annotations

import math
import pydoc
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelSummary, Timer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from rich.console import Console

from layershed.callbacks import Export, LoRARecovery, Quantization, RedundancyMonitor, SpeedMonitor, SublayerDrop
from layershed.callbacks.report import Report
from layershed.cli.control_callbacks import BEFORE_DROP, EndControl, KeepBeforeDrop
from layershed.cli.stop_on_signal import StopOnSignal
from layershed.cli.stopped import StoppedControl
from layershed.errors import ControlError
from layershed.files.run_config import named_entries
from layershed.integration.measurements import logged_quality
from layershed.integration.preflight import callbacks_of
from layershed.integration.run import run_directory
from layershed.reporting.control import (
    CONTROL_FOLDER,
    differences,
    read_control,
)
from layershed.reporting.control_file import CONTROL_FILE
from layershed.reporting.drop_cost import cost_rows
from layershed.reporting.metrics_file import METRICS_FILE
from layershed.reporting.record import RunRecord
from layershed.reporting.summary import rows_table

# What the control leaves out and names, and what would write into the run's files, end the control sooner, or repeat
# what the run has said.
_CHANGES = (SublayerDrop, Quantization, LoRARecovery)
_LEFT_OUT = (
    *(*_CHANGES, SpeedMonitor, Export, Report, RedundancyMonitor),
    *(Checkpoint, EarlyStopping, ModelSummary, Timer, StopOnSignal),
)


def prepare_control(trainer: pl.Trainer, control: bool | str | None, dump: Callable[[], str]) -> None:
    """Prepare a run for its control, and say what that takes; or check a finished control.

    Args:
        trainer: The Trainer, before it fits.
        control: True for a control after the run, or the run directory of a finished one.
        dump: Gives the config of this run as YAML.

    Raises:
        ControlError: If nothing is dropped, or the finished run is no control of this one.
    """
    if not control:
        return
    reports = [each for each in callbacks_of(trainer) if isinstance(each, Report)]
    drop = dropping(trainer)
    for report in reports:
        report.control = control
    if control is True:
        trainer.callbacks.append(KeepBeforeDrop(drop.first_step))  # type: ignore[attr-defined]
        again, most = trainer.max_steps - drop.first_step + 1, trainer.max_steps
        share = f" ({again:,} of {most:,}, about {100 * again / most:.0f} % more time)" if most > 0 else ""
        _say(f"Control: after the run, its steps from {drop.first_step} on run again without the drop{share}.")
        return
    doubts = differences(yaml.safe_load(dump()), control)
    for report in reports:
        report.control_doubts = tuple(doubts)
    if doubts:
        rank_zero_warn(f"control={control!r}: it differs from this run in {'; '.join(doubts)}. The report says so.")
    if not reports:
        raise ControlError(f"control={control!r}: no Report is among trainer.callbacks to compare the runs. List one.")


def dropping(trainer: pl.Trainer) -> SublayerDrop:
    """The SublayerDrop of a run.

    Raises:
        ControlError: If there is none.
    """
    found = next((each for each in callbacks_of(trainer) if isinstance(each, SublayerDrop)), None)
    if found is None:
        raise ControlError(
            "control: no SublayerDrop is among trainer.callbacks, so a control would be the same run. List one, or "
            "leave out control."
        )
    return found


def run_control(cli: LightningCLI, start: Callable[[type[LightningCLI], Any], LightningCLI]) -> pl.Trainer | None:
    """Run the same steps without the drop in the folder ``control`` of the run directory, and tell what the drop cost.

    Args:
        cli: The command line whose run has ended.
        start: Starts a command line of the given class with a parsed config.

    Returns:
        The control's Trainer; None if the run ended before the drop.

    Raises:
        StoppedControl: After Ctrl-C or SIGTERM in the control.
    """
    trainer: pl.Trainer = cli.trainer
    callbacks, drop = callbacks_of(trainer), dropping(trainer)
    if trainer.global_step < drop.first_step:
        _say(f"note: the run ended at step {trainer.global_step}, before the drop, so there is no control")
        return None
    kept = next(each for each in callbacks if isinstance(each, KeepBeforeDrop))
    folder = run_directory(trainer) / CONTROL_FOLDER
    first, last = (0 if kept.path is None else kept.start), trainer.global_step
    without = [type(each).__name__ for each in callbacks if isinstance(each, _CHANGES)]
    end = EndControl(drop, first, last, without)
    config = cli.config.clone()
    options = config[config.subcommand]
    options.ckpt_path = None if kept.path is None else str(kept.path)
    options.model.distillation, options.control = None, False
    options.trainer.callbacks = without_left_out(options.trainer.callbacks)

    class ControlCLI(type(cli)):  # type: ignore[misc]
        """The same command line, with a Trainer that does not drop."""

        def parse_arguments(self, parser: Any, args: Any) -> None:
            """Take the parsed config of the run."""
            self.config = parser.parse_object(args)

        def _parse_ckpt_path(self) -> None:
            """The config has the checkpoint's options."""

        def before_instantiate_classes(self) -> None:
            """The config was completed and checked for the run."""

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            """Leave out the drop, and write into the control's folder."""
            build: Any = self.trainer_class  # type: ignore[has-type]
            self.trainer_class = lambda **given: build(**settings_of_control(given, folder, end))
            return super().instantiate_trainer(**kwargs)

        def before_fit(self) -> None:
            """There is no control of a control."""

        after_fit = before_fit

    time_needed = "" if kept.seconds is None else f", about {math.ceil(kept.seconds * (last - first)):,} s"
    _say(f"Control: steps {first + 1:,} to {last:,} again without {' and '.join(without)}{time_needed}.")
    with _told_if_stopped(trainer), _alone(folder):
        done = start(ControlCLI, config)
    if trainer.is_global_zero:
        _tell(trainer, folder)
    return done.trainer


def _tell(trainer: pl.Trainer, folder: Path) -> None:
    """Complete the report, and print the rows about the control."""
    reports = [each for each in callbacks_of(trainer) if isinstance(each, Report)]
    if sum(report.tell_control() for report in reports):
        return
    control, quality = read_control(folder), logged_quality(trainer, "end")
    ends = {} if quality is None else {"end": quality}
    record = RunRecord("", quality=ends, steps=trainer.global_step, control=control)
    Console().print(rows_table("", cost_rows(record)))


def settings_of_control(options: dict[str, Any], folder: Path, end: EndControl) -> dict[str, Any]:
    """The Trainer's options for a control: the run's own, without the drop and what follows it, and with its own files.

    Args:
        options: The Trainer's options in the run; ``callbacks`` is a list.
        folder: Where the control's files go.
        end: The callback that ends the control.
    """
    kept = [each for each in options["callbacks"] if not isinstance(each, _LEFT_OUT)]
    return {
        **options,
        "callbacks": [*kept, end],
        "logger": CSVLogger(folder.parent, name=folder.name, version=""),
        "default_root_dir": str(folder),
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "max_time": None,
    }


def without_left_out(given: Any) -> Any:
    """The callbacks of a config that a control keeps, so that the config that it saves tells what ran."""
    kept = [(name, entry) for name, entry in named_entries(given) if not _left_out(entry)]
    by_name = isinstance(given, Mapping) and "class_path" not in given
    return dict(kept) if by_name else [entry for _, entry in kept]


def _left_out(entry: Any) -> bool:
    kind = None if entry is None else pydoc.locate(entry["class_path"])
    return entry is None or (isinstance(kind, type) and issubclass(kind, _LEFT_OUT))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Remove what a stopped control left in its folder, and silence what Lightning says of the absent callbacks."""
    if not getattr(rank_zero_only, "rank", 0):
        for name in (METRICS_FILE, CONTROL_FILE):
            (folder / name).unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be provided")
        warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
        yield


@contextmanager
def _told_if_stopped(trainer: pl.Trainer) -> Iterator[None]:
    """Let the report say that the control did not end; after Ctrl-C or SIGTERM also name the command that runs it.

    Raises:
        StoppedControl: Instead of Lightning's exit, which says neither.
    """
    try:
        yield
    except BaseException as error:
        for report in callbacks_of(trainer) if trainer.is_global_zero else ():
            if isinstance(report, Report):
                report.tell_no_control()
        signum = _signal_of(error)
        if signum is None:
            raise
        raise StoppedControl(signum, trainer.global_step, _last_checkpoint(trainer)) from None


def _signal_of(error: BaseException | None) -> signal.Signals | None:
    """The signal that stopped a run; Lightning makes an exit of it."""
    if isinstance(error, SIGTERMException):
        return signal.SIGTERM
    if isinstance(error, SystemExit):
        error = error.__context__
    return signal.SIGINT if isinstance(error, KeyboardInterrupt) else None


def _last_checkpoint(trainer: pl.Trainer) -> Path | None:
    """The run's checkpoint from which the least is left to do."""
    folder = run_directory(trainer) / "checkpoints"
    saved = [path for path in folder.glob("*.ckpt") if path.name != BEFORE_DROP]
    return max(saved, key=lambda path: (path.stem == "last", path.stat().st_mtime), default=None)


@rank_zero_only
def _say(line: str) -> None:
    print(line, flush=True)
