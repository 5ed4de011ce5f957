"""What TaskEvaluation found, as a file of the run, as logged metrics and as rows of the report."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from layershed.errors import LayershedError
from layershed.evaluation.results import TaskResults, TaskScore
from layershed.files.atomic import write_text
from layershed.formatting import printable
from layershed.integration.metric_names import task_name
from layershed.performance.degradation import degradation
from layershed.performance.speed_report import report_from

TASKS_FILE = "tasks.json"
_MOMENTS = {
    "before": "before the drop",
    "after": "right after the drop",
    "validation": "in validation",
    "end": "at the end",
}


def write_tasks(directory: Path, found: Mapping[str, TaskResults]) -> None:
    """Write the results by moment into the run directory."""
    content = {when: results.to_dict() for when, results in found.items()}
    write_text(directory / TASKS_FILE, json.dumps(content, indent=2) + "\n")


def task_metrics(when: str, results: TaskResults) -> dict[str, float]:
    """The metrics to log, by their names."""
    return {task_name(printable(task), when): value for task, value in results.values.items()}


def task_rows(found: Mapping[str, TaskResults], speed: Path) -> list[tuple[str, str]]:
    """Rows of (label, value) for the report, with the SDR of the average if the speed was measured.

    Args:
        found: Results by moment.
        speed: The run's file of measured speed; it need not exist.
    """
    rows = [(f"Tasks {words}", described(found[when])) for when, words in _MOMENTS.items() if when in found]
    for when, words in (("after", "right after the drop"), ("end", "at the end")):
        if "before" in found and when in found and speed.is_file():
            try:
                measured = report_from(json.loads(speed.read_text(encoding="utf-8")))
            except (OSError, ValueError, KeyError, TypeError, LayershedError):
                break
            before, after = ({"tasks": found[moment].average} for moment in ("before", when))
            sdr = degradation(before, after, measured, quality="tasks", better="max")
            rows += [] if sdr is None else [(f"SDR of the tasks {words}", str(sdr))]
    return rows


def described(results: TaskResults) -> str:
    """Average and single scores, such as ``49.4 % +- 1.4 % (sciq 70.0 %, piqa 61.0 %)``."""
    error = "" if results.stderr is None else f" +- {100 * results.stderr:.1f} %"
    parts = ", ".join(f"{printable(score.task)} {_shown(score)}" for score in results.scores)
    return parts if math.isnan(results.average) else f"{100 * results.average:.1f} %{error} ({parts})"


def _shown(score: TaskScore) -> str:
    return f"{100 * score.value:.1f} %" if score.is_share else f"{score.metric} {score.value:.3f}"
