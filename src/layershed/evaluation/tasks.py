"""Tasks of EleutherAI's lm-evaluation-harness on the model in memory."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layershed.arguments import as_names, check_most
from layershed.batches import device_of
from layershed.discovery.find import find_transformer
from layershed.discovery.probe import evaluating
from layershed.errors import TaskError
from layershed.evaluation.request_files import ENDINGS, is_request_file, request_task
from layershed.evaluation.results import TaskResults, TaskScore, expected_calibration_error
from layershed.extras import needs
from layershed.quality import check_head

# Main metrics, the first that a task has; the names are the harness's.
_MAIN = ("acc_norm", "acc", "exact_match", "pass@1", "prompt_level_strict_acc", "f1", "perplexity")
_RUN_CODE = ("humaneval", "mbpp")
_BOOTSTRAPS = 100  # means have an error without them; 0 would leave that out, too
PRESETS: dict[str, dict[str, int]] = {
    "paper": {
        "arc_challenge": 25,
        "boolq": 0,
        "hellaswag": 10,
        "mmlu": 5,
        "openbookqa": 0,
        "piqa": 0,
        "rte": 0,
        "winogrande": 5,
    },
    "generative": {"gsm8k": 5, "humaneval": 0, "ifeval": 0},
}
"""Tasks with their shots. ``paper``: the suite of arXiv 2406.15786, with the shots of its authors' own script.
``generative``: multiple choice hides the damage that generation shows."""


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: str | Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    run_generated_code: bool = False,
    name: str | None = None,
) -> TaskResults:
    """Score a causal language model on tasks, in eval mode, as it is now: dropped, with maps, with adapters.

    Args:
        model: A causal language model, or a module that holds one.
        tokenizer: Its tokenizer.
        tasks: Names of tasks of lm-evaluation-harness, which it fetches from the hub; paths of its YAML files; paths of
            files of requests (``.jsonl`` or ``.jsonl.gz``), which need no hub; or the presets ``paper`` and
            ``generative``.
        limit: At most so many questions of each task; None takes all.
        shots: Examples before each question; None takes the preset's or the task's own.
        batch_size: Sequences in a forward pass.
        run_generated_code: Allow tasks that run the code that the model writes (HumanEval), on this machine.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Returns:
        The scores. Of several tasks, one that fails is left out with a warning.

    Raises:
        TaskError: If a task is unknown, or would run generated code without permission; if none has a score.
        MeasurementError: If the model does not predict the next token.
        MissingExtraError: If lm-evaluation-harness is not installed (extra ``eval``).
    """
    wanted = expand(tasks)
    check_code(wanted, run_generated_code)
    check_most(limit, "limit", TaskError)
    check_most(batch_size, "batch_size", TaskError)
    transformer: Any = find_transformer(model, name=name)
    check_head(transformer)
    with needs("eval", "evaluate_tasks"):
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    found: list[TaskScore] = []
    failed: list[TaskError] = []
    with evaluating(transformer), torch.no_grad(), _quiet():
        runner = HFLM(pretrained=transformer, tokenizer=tokenizer, batch_size=batch_size, device=_device(transformer))
        for task, own_shots in wanted:
            settings, manager = _settings(task)
            options: dict[str, Any] = {"limit": limit, "bootstrap_iters": _BOOTSTRAPS, "log_samples": True}
            options["num_fewshot"] = own_shots if shots is None else shots
            options["confirm_run_unsafe_code"] = run_generated_code
            if is_request_file(task):
                options["num_fewshot"] = None
            try:
                results = lm_eval.simple_evaluate(runner, tasks=[settings], task_manager=manager, **options)
                found.append(_score(task, results or {}))
            except TaskError as error:
                failed.append(error)
            except Exception as error:  # the harness, datasets and hubs raise errors of many kinds
                failed.append(TaskError(f"tasks: {task!r} could not be evaluated ({_first(error)})."))
    if failed and not found:
        raise failed[0]
    for why in failed:
        warnings.warn(f"{why} It is left out.", stacklevel=2)
    return TaskResults(tuple(found))


def check_code(tasks: Iterable[tuple[str, int | None]], allowed: bool) -> None:
    """Refuse tasks that run generated code, unless that is allowed.

    Raises:
        TaskError: If there is one.
    """
    runs = [task for task, _ in tasks if task.startswith(_RUN_CODE)]
    if runs and not allowed:
        raise TaskError(
            f"tasks: {runs[0]!r} runs the code that the model writes, on this machine. Set run_generated_code to allow "
            "it, or leave the task out."
        )


def check_harness() -> None:
    """Refuse to go on without lm-evaluation-harness.

    Raises:
        MissingExtraError: If it is not installed.
    """
    with needs("eval", "evaluate_tasks"):
        import lm_eval  # noqa: F401


def expand(tasks: str | Sequence[str]) -> list[tuple[str, int | None]]:
    """The tasks of a list of names, files and presets, with the shots of presets.

    Raises:
        TaskError: If there is none, one appears twice, or a file does not exist.
    """
    names = as_names([tasks] if isinstance(tasks, str) else tasks, "tasks", TaskError)
    found: list[tuple[str, int | None]] = []
    for each in names:
        found += list(PRESETS[each].items()) if each in PRESETS else [(each, None)]
    if not found:
        raise TaskError(f"tasks: there is none. Name tasks, files or a preset ({', '.join(PRESETS)}).")
    listed = [task for task, _ in found]
    if twice := [task for task in listed if listed.count(task) > 1]:
        raise TaskError(f"tasks: {twice[0]!r} appears twice. List it once.")
    for task in listed:
        if task.endswith((*ENDINGS, ".yaml", ".yml")) and not Path(task).is_file():
            raise TaskError(f"tasks: there is no file {task!r}. Check the path.")
    return found


def name_of_task(task: str) -> str:
    """Short name of a task for tables: of a file, its folders and its stem."""
    if not task.endswith((*ENDINGS, ".yaml", ".yml")):
        return task
    parts = Path(task.removesuffix(".gz")).with_suffix("").parts
    return "_".join(parts[-3:-1]) if parts[-1] == "requests" and len(parts) > 2 else parts[-1]


def _settings(task: str) -> tuple[Any, Any]:
    """What the harness takes for a task, and the manager that finds it."""
    from lm_eval.tasks import TaskManager

    if is_request_file(task):
        return request_task(task, name_of_task(task)), TaskManager(include_defaults=False)
    if task.endswith((".yaml", ".yml")):
        return task, TaskManager(include_path=str(Path(task).parent), include_defaults=False)
    manager = _manager()
    if task not in manager.all_tasks:
        raise TaskError(f"tasks: lm-evaluation-harness has no task {task!r}. See `lm-eval ls tasks`.")
    return task, manager


@cache
def _manager() -> Any:
    """The harness's list of tasks; making it reads thousands of files."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _score(task: str, results: Mapping[str, Any]) -> TaskScore:
    found = {**results.get("results", {}), **results.get("groups", {})}
    for metric in _MAIN:
        own = [(key, values) for key, values in found.items() if f"{metric},none" in values or _key(values, metric)]
        if own:
            _, values = next(((k, v) for k, v in own if k in (task, name_of_task(task))), own[0])
            key = f"{metric},none" if f"{metric},none" in values else _key(values, metric)
            metric_name, _, way = key.partition(",")
            samples = [s for rows in results.get("samples", {}).values() for s in rows]
            return TaskScore(
                name_of_task(task),
                metric,
                float(values[key]),
                _number(values.get(f"{metric_name}_stderr,{way}")),
                calibration_error(samples) if metric in ("acc", "acc_norm") else None,
                sum(each.get("effective", 0) for each in results.get("n-samples", {}).values()),
            )
    raise TaskError(f"tasks: {task!r} has none of the metrics {', '.join(_MAIN)}.")


def _key(values: Mapping[str, Any], metric: str) -> str:
    """The harness's key of a metric, such as ``exact_match,strict-match``; empty without one."""
    return next((key for key in values if key.partition(",")[0] == metric), "")


def calibration_error(samples: Iterable[Mapping[str, Any]]) -> float | None:
    """Expected calibration error of multiple-choice samples of the harness; None if they are of another kind.

    The probability of an answer is its share of the likelihoods of all answers.
    """
    confidences, hits = [], []
    for sample in samples:
        likely = [_log_likelihood(response) for response in sample["resps"]]
        if len(likely) < 2 or not isinstance(sample.get("target"), int):
            return None
        shares = torch.tensor(likely, dtype=torch.float64).softmax(0)
        confidences.append(float(shares.max()))
        hits.append(int(shares.argmax()) == sample["target"])
    return expected_calibration_error(confidences, hits) if confidences else None


def _log_likelihood(response: Any) -> float:
    """Of one answer; the harness keeps it with whether the answer is the most likely text."""
    return float(response[0][0] if isinstance(response[0], list | tuple) else response[0])


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not math.isnan(value) else None


def _device(transformer: nn.Module) -> str:
    return str(device_of(transformer))


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the context the harness reports only warnings."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
