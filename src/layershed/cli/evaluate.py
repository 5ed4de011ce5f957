"""``train.py evaluate``: tasks and long contexts, by a dropped model and by the dense one beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from rich import box
from rich.console import Console
from rich.table import Table

from layershed.cli.generate import make_ready, voices_of
from layershed.errors import TaskError
from layershed.evaluation.long_context import passkey_retrieval
from layershed.evaluation.results import TaskResults, TaskScore
from layershed.evaluation.tasks import check_code, check_harness, evaluate_tasks, expand
from layershed.files.atomic import write_text
from layershed.formatting import printable
from layershed.training.causal_lm import CausalLM
from layershed.training.text_data import TextData


def evaluate(
    trainer: pl.Trainer,
    model: CausalLM,
    data: TextData,
    *,
    tasks: Sequence[str],
    passkey: Sequence[int],
    keys: int,
    limit: int | None,
    shots: int | None,
    batch_size: int,
    run_generated_code: bool,
    dense: bool | str,
    ckpt_path: str | None,
    output: str | None,
) -> dict[str, TaskResults]:
    """Evaluate and print a table. Arguments: see :meth:`layershed.cli.trainer.Trainer.evaluate`.

    Returns:
        The results by the title of the model.

    Raises:
        LayershedError: Before evaluating, if there is nothing to evaluate, or no dense model.
    """
    if not tasks and not passkey:
        raise TaskError("evaluate: there is nothing to evaluate. Give --tasks '[sciq, ...]' or --passkey '[512, ...]'.")
    if tasks:
        check_code(expand(tasks), run_generated_code)
        check_harness()
    make_ready(trainer, model, ckpt_path, "evaluate", TaskError)
    found: dict[str, TaskResults] = {}
    for voice in voices_of(trainer, model, data, dense):
        scores: tuple[TaskScore, ...] = ()
        with voice.within(), trainer.precision_plugin.forward_context():
            if tasks:
                options: dict[str, Any] = {"limit": limit, "shots": shots, "run_generated_code": run_generated_code}
                scores = evaluate_tasks(voice.model, data.tokenizer, tasks, batch_size=batch_size, **options).scores
            if passkey:
                questions: dict[str, Any] = {} if limit is None else {"questions": limit}
                scores += passkey_retrieval(voice.model, data.tokenizer, passkey, keys=keys, **questions).scores
        found[voice.title] = TaskResults(scores)
    if output is not None:
        content = {title: results.to_dict() for title, results in found.items()}
        write_text(Path(output), json.dumps(content, indent=2) + "\n")
    Console().print(task_table(found))
    return found


def task_table(found: dict[str, TaskResults]) -> Table:
    """The scores as a table for the terminal: a row for each task, a column for each model."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("task")
    table.add_column("metric")
    for title in found:
        table.add_column(printable(title), justify="right")
    first, *_ = found.values()
    for place, score in enumerate(first.scores):
        cells = [_cell(results.scores[place]) for results in found.values()]
        table.add_row(printable(score.task), printable(score.metric), *cells)
    if len(first.scores) > 1:
        table.add_row("average", "", *(_percent(results.average, results.stderr) for results in found.values()))
    return table


def _cell(score: TaskScore) -> str:
    if not score.is_share:
        return f"{score.value:.3f}"
    calibration = "" if score.calibration_error is None else f", ECE {100 * score.calibration_error:.1f} %"
    return f"{_percent(score.value, score.stderr)}{calibration}"


def _percent(value: float, stderr: float | None) -> str:
    return f"{100 * value:.1f} %" + ("" if stderr is None else f" +- {100 * stderr:.1f} %")
