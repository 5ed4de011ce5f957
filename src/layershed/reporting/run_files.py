"""What the folder of a run tells: its kind, configuration, figures and curves; a damaged file is said. No torch."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from layershed.errors import LayershedError, ResultError
from layershed.files.run_config import CONFIG_FILE as CONFIG
from layershed.files.run_config import named_entries, read_config
from layershed.formatting import counts_of, short_bytes, short_count, short_number
from layershed.planning.plan import PLAN_FILE, DropPlan
from layershed.reporting.control_file import CONTROL_FILE, read_result
from layershed.reporting.metrics_file import METRICS_FILE as METRICS
from layershed.reporting.metrics_file import Curve, read_metrics

HPARAMS, SPEED, QUALITY = "hparams.yaml", "speed.json", "quality.json"
BENCHMARK, PREDICTION, IMPORTANCE, REPORT = "benchmark.json", "prediction.json", "importance.csv", "report.html"
_FILES = (METRICS, SPEED, QUALITY, BENCHMARK, PREDICTION, IMPORTANCE, PLAN_FILE, CONFIG)
# By callback, the file that a finished run of it has.
_WRITES = {"SublayerDrop": PLAN_FILE, "SpeedMonitor": SPEED, "RedundancyMonitor": IMPORTANCE, "Report": REPORT}
_OURS = ("drop/", "speed/", "importance", "recovery/", "quantization/", "lr-", "train_", "test_", "hp_metric")
_NO_METRIC = {"step", "epoch", "step_seconds", "tokens_per_second", "teacher_seconds", "val_loss"}


@dataclass
class RunFiles:
    """A run as its folder tells it.

    Args:
        folder: The folder.
        kind: ``fit``, ``control``, ``evaluation``, ``prune``, ``benchmark``, ``score``, ``plan`` or ``unknown``.
        config: The content of ``config.yaml``, else of ``hparams.yaml``; empty if there is none.
        sections: Figures as texts: by section, then by label.
        curves: Logged values by name.
        drops: The optimizer steps at which it dropped.
        notes: What is missing, damaged or unfinished.
    """

    folder: Path
    kind: str = "unknown"
    config: Mapping[str, Any] = field(default_factory=dict)
    sections: dict[str, dict[str, str]] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    drops: tuple[int, ...] = ()
    notes: list[str] = field(default_factory=list)

    def note(self, section: str, label: str, value: str) -> None:
        """Add a figure."""
        self.sections.setdefault(section, {})[label] = value


def is_run(folder: Path) -> bool:
    """Whether a folder holds a file of a run."""
    # a drop plan alone is in a saved model, too
    return any((folder / name).is_file() for name in _FILES if name != PLAN_FILE)


def read_run(folder: Path) -> RunFiles:
    """Read what a run has left.

    Raises:
        ResultError: If the folder is none of a run.
    """
    if not is_run(folder):
        raise ResultError(f"compare: {str(folder)!r} is no folder of a run: it has neither {CONFIG} nor {METRICS}.")
    run = RunFiles(folder)
    run.kind = _kind(folder)
    # a project without our command line has the hyperparameters of its module at most
    name = HPARAMS if (folder / HPARAMS).is_file() and not (folder / CONFIG).exists() else CONFIG
    with _noting(run, name):
        run.config = read_config(folder / name)
    for name, read in _READERS.items():
        if (folder / name).is_file():
            with _noting(run, name):
                read(run, folder / name)
    _note_missing(run)
    return run


def callbacks_in(config: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Class, own name and options of each callback in a config, which lists them or names them."""
    trainer = config.get("trainer")
    given = trainer.get("callbacks") if isinstance(trainer, Mapping) else None
    for name, entry in named_entries(given):
        if isinstance(entry, Mapping) and isinstance(entry.get("class_path"), str):
            options = entry.get("init_args")
            yield (
                entry["class_path"].rpartition(".")[2],
                str(name or ""),
                options if isinstance(options, Mapping) else {},
            )


@contextmanager
def _noting(run: RunFiles, name: str) -> Iterator[None]:
    """Note a file that cannot be read, and go on without it."""
    try:
        yield
    except FileNotFoundError:
        run.notes.append(f"has no {name}")
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        yaml.YAMLError,
        RecursionError,
        csv.Error,
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        run.notes.append(f"{name} cannot be read ({type(error).__name__}: {reason:.80})")


def _kind(folder: Path) -> str:
    if (folder / CONTROL_FILE).is_file():
        return "control"
    has = {name for name in _FILES if (folder / name).is_file()}
    if METRICS in has:
        with (folder / METRICS).open("rb") as file:
            header = file.readline(1 << 16).decode("utf-8", "replace").split(",")
        return "fit" if any(name.startswith(("train_", "lr-", "drop/")) for name in header) else "evaluation"
    kinds = {BENCHMARK: "benchmark", PREDICTION: "plan", QUALITY: "prune", SPEED: "prune", IMPORTANCE: "score"}
    if (folder / "checkpoints").is_dir():
        return "fit"
    return next((kind for name, kind in kinds.items() if name in has), "unknown")


def _note_missing(run: RunFiles) -> None:
    if run.kind == "unknown":
        run.notes.append("holds its configuration and no result")
    if run.kind == "fit":
        if not run.curves and not any(METRICS in note for note in run.notes):
            run.notes.append(f"has no {METRICS}")
        listed = {name for name, _, _ in callbacks_in(run.config)}
        missing = [file for name, file in _WRITES.items() if name in listed and not (run.folder / file).is_file()]
        run.notes += [f"has no {name}" for name in missing]
        _note_end(run, interrupted=REPORT in missing)
    if run.kind == "prune":
        run.notes += [f"has no {name}" for name in (SPEED, QUALITY, PLAN_FILE) if not (run.folder / name).is_file()]


def _note_end(run: RunFiles, *, interrupted: bool) -> None:
    """Note a run that took fewer steps than its configuration says."""
    trainer = run.config.get("trainer")
    options = trainer if isinstance(trainer, Mapping) else {}
    wanted, every = options.get("max_steps"), options.get("log_every_n_steps")
    steps = [points[-1][0] for points in run.curves.values() if points]
    if not steps or not isinstance(wanted, int) or wanted < 1:
        if interrupted:
            run.notes.append("did not finish")
        return
    # the last steps may have no row, and a run that took all of them stopped after them
    if max(steps) + (every if isinstance(every, int) else 50) <= wanted or (interrupted and max(steps) < wanted):
        how = "was interrupted" if interrupted else "ended early"
        run.notes.append(f"{how}: its last row is of step {max(steps):,} of {wanted:,}")


# ---- one reader for each file ----


def _metrics(run: RunFiles, path: Path) -> None:
    columns = read_metrics(path)
    finite = {name: tuple(point for point in points if math.isfinite(point[1])) for name, points in columns.items()}
    run.curves = {name: points for name, points in finite.items() if points}
    first = {name: points[0][1] for name, points in run.curves.items()}
    last = {name: points[-1][1] for name, points in run.curves.items()}
    _note_quality(run, first, last)
    for name, value in last.items():
        if name not in _NO_METRIC and not name.startswith(_OURS):
            run.note("Metrics and tasks", name, short_number(value) if abs(value) >= 100 else f"{value:.4f}")
    for name, label, unit in (("tokens_per_second", "Training", "tokens/s"), ("step_seconds", "A step", "s")):
        if name in run.curves:
            middle = statistics.median(value for _, value in run.curves[name])
            run.note("Speed", f"{label} (median)", f"{short_number(middle)} {unit}")
    for name, words in (("speed/sdr", "right after the drop"), ("speed/sdr_end", "at the end")):
        if name in columns:
            run.note("SDR", f"SDR {words}", _ratio(columns[name][-1][1]))


def _note_quality(run: RunFiles, first: Mapping[str, float], last: Mapping[str, float]) -> None:
    for what in ("loss", "accuracy"):
        # of several rounds, before the first and after the last
        for when, words in (("before", "before the drop"), ("after", "right after the drop"), ("end", "at the end")):
            values, name = first if when == "before" else last, f"drop/{what}_{when}"
            if name in values:
                run.note("Quality", f"Validation {what} {words}", f"{values[name]:.4f}")
    for name in ("train_loss", "val_loss", "test_loss"):
        if name in last:
            run.note("Quality", f"Last {name}", f"{last[name]:.4f}")


def _control(run: RunFiles, path: Path) -> None:
    result = read_result(path)
    run.note("Drop", "Control", f"steps {result.start + 1:,} to {result.end:,} without {' and '.join(result.without)}")
    for what in ("loss", "accuracy"):
        if what in result.quality:
            run.note("Quality", f"Validation {what} at the end", f"{result.quality[what]:.4f}")


def _plan(run: RunFiles, path: Path) -> None:
    try:
        plan = DropPlan.load(path)
    except LayershedError as error:
        raise ValueError(str(error)) from None
    run.drops = tuple(sorted({drop.step for drop in plan.drops if drop.step is not None}))
    run.note("Drop", "Dropped", counts_of(plan) or "nothing")
    run.note("Drop", "Scope", plan.scope)
    if run.drops:
        run.note("Drop", "At step", ", ".join(f"{step:,}" for step in run.drops))


def _speed(run: RunFiles, path: Path) -> None:
    _speed_figures(run, json.loads(path.read_text(encoding="utf-8")))


def _speed_figures(run: RunFiles, content: Mapping[str, Any]) -> None:
    for name, phase in content["phases"].items():
        speedup = phase["speedup"]
        sure = not speedup["low"] <= 1 <= speedup["high"]
        text = f"x{speedup['median']:.2f} [{speedup['low']:.2f}, {speedup['high']:.2f}]"
        run.note("Speed", f"{str(name).capitalize()} speedup", text + ("" if sure else ", not measurable"))
        run.note("Speed", f"{str(name).capitalize()} speed", f"{short_number(float(phase['dropped']))} tokens/s")
    shows: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("parameters_dropped", "Parameters", short_count),
        ("file_bytes_dropped", "File size", short_bytes),
        ("peak_memory_dropped", "Peak memory", short_bytes),
        ("kv_bytes_dropped", "KV cache per token", short_bytes),
    )
    for name, label, show in shows:
        if isinstance(content.get(name), int | float):
            run.note("Size", label, show(content[name]))


def _quality(run: RunFiles, path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    for when, words in (("before", "before the drop"), ("after", "right after the drop")):
        for what in ("loss", "accuracy"):
            run.note("Quality", f"Validation {what} {words}", f"{float(content[when][what]):.4f}")
    if "sdr" in content:
        run.note("SDR", "SDR right after the drop", _ratio(content["sdr"]["value"]))


def _benchmark(run: RunFiles, path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    run.note("Quality", "Validation loss before the drop", f"{float(content['dense']['loss']):.4f}")
    measured = content["measurements"]
    if len(measured) != 1:
        run.notes.append(f"is a sweep of {len(measured)} models; recommend reads it")
        return
    run.note("Quality", "Validation loss right after the drop", f"{float(measured[0]['quality']['loss']):.4f}")
    run.note("SDR", "SDR right after the drop", _ratio(measured[0]["sdr"]))
    _speed_figures(run, measured[0]["speed"])


def _prediction(run: RunFiles, path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    for phase in ("prefill", "decode"):
        if isinstance(content.get(f"{phase}_speedup"), int | float):
            run.note("Speed", f"{phase.capitalize()} speedup, predicted", f"x{content[f'{phase}_speedup']:.2f}")


def _ratio(value: float | None) -> str:
    return "undefined" if value is None or not math.isfinite(value) else f"{round(value, 2) + 0.0:.2f}"


_READERS: dict[str, Callable[[RunFiles, Path], None]] = {
    METRICS: _metrics,
    CONTROL_FILE: _control,
    PLAN_FILE: _plan,
    SPEED: _speed,
    QUALITY: _quality,
    BENCHMARK: _benchmark,
    PREDICTION: _prediction,
}
