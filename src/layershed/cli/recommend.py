"""``train.py recommend``: how many to drop, from a sweep of ``benchmark`` or from importances."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from layershed.cli.commands import PROGRAM
from layershed.errors import DataError, PlanError, ResultError
from layershed.files.run_config import config_in
from layershed.formatting import printable
from layershed.planning.plan import KINDS, PLAN_FILE, SCOPES, DropPlan, Scope
from layershed.planning.recommendation import (
    MeasuredCount,
    fastest,
    knee_of_losses,
    knee_of_scores,
    largest_within,
)
from layershed.reporting.importance_file import measured_steps, read_importance
from layershed.reporting.record import ImportancePoint, drop_steps

_UNKNOWN = "MODEL"
SWEEP, SCORES = "benchmark.json", "importance.csv"
_SOURCE = (
    "Knee: where the curve lies furthest below the line from its first to its last point, both axes scaled to [0, 1] "
    "(Kneedle; Satopää et al. 2011)."
)


def recommend(result: str, *, max_loss_increase: float | None = None, scope: Scope | None = None) -> None:
    """Print how many to drop, and the command that does it.

    Args:
        result: The folder of a sweep (``benchmark --counts``) or of importances (``score``, ``fit``), or its file.
        max_loss_increase: The budget: most loss on held-out text, in nats per token, above that of the dense model.
        scope: Only this one: attention, cross_attention, mlp, block or joint.

    Raises:
        ResultError: If the file is missing, damaged or holds no sweep, or importances alone are to meet a budget.
    """
    if max_loss_increase is not None and not 0 <= max_loss_increase < float("inf"):
        raise ResultError(f"recommend: max_loss_increase={max_loss_increase}: it must be a number of at least 0.")
    path = _file_of(Path(result).expanduser())
    if path.name == SCORES:
        _from_scores(path, max_loss_increase, scope)
    else:
        _from_sweep(path, max_loss_increase, scope)


# ---- from a sweep ----


def _from_sweep(path: Path, budget: float | None, scope: Scope | None) -> None:
    content = _json(path)
    dense, points = _measured(content, path, scope)
    scopes: dict[Scope, list[MeasuredCount]] = {}
    for point in points:
        scopes.setdefault(point.scope, []).append(point)
    knees = {name: knee_of_losses(own, dense) for name, own in scopes.items()}
    within = {name: None if budget is None else largest_within(own, dense, budget) for name, own in scopes.items()}

    console = _console()
    title = f"{content.get('model')}: {path}, dense loss {dense:.4f} nats per token"
    table = Table(title=Text(printable(title)), box=box.SIMPLE_HEAD, title_justify="left")
    columns = ["scope", "measured counts", "knee", *([] if budget is None else [f"loss at most +{budget:g}"])]
    for column in columns:
        table.add_column(column)
    for name, own in scopes.items():
        counts = ", ".join(str(point.count) for point in sorted(own, key=lambda point: point.count))
        cells = [_shown(knees[name], dense) if knees[name] else "none"]
        if budget is not None:
            cells.append(_within_cell(within[name], own, dense))
        table.add_row(name, counts, *cells)
    console.print(table)
    console.print(f"{_SOURCE} Here: loss over count, from the dense model on.", highlight=False)
    console.print("Counts between the measured ones are unknown: benchmark --counts measures more.", highlight=False)
    chosen = fastest(each for each in (knees if budget is None else within).values() if each is not None)
    why = "at a knee" if budget is None else "within the budget"
    if chosen is None:
        nothing = "no curve has a knee" if budget is None else "no measured count is within the budget"
        console.print(f"No recommendation: {nothing}. Sweep over other counts.", highlight=False)
        return
    console.print(f"Fastest decoding {why}: {chosen.scope} {_shown(chosen, dense)}.", highlight=False)
    settings = content.get("settings")
    options = settings if isinstance(settings, Mapping) else {}
    words = [*_model_words(path), "--scope", chosen.scope, "--count", str(chosen.count)]
    for option in ("metric", "objective", "batches"):
        if option in options:
            words += [f"--{option}", str(options[option])]
    _tell_command("prune", words)


def _measured(content: Mapping[str, Any], path: Path, scope: Scope | None) -> tuple[float, list[MeasuredCount]]:
    try:
        dense, points = float(content["dense"]["loss"]), []
        for one in content["measurements"]:
            if one["scope"] is None or one["count"] is None:
                raise ResultError(
                    f"recommend: {str(path)!r} compares one model and is no sweep. Measure several counts: "
                    f"{PROGRAM} benchmark --model.pretrained MODEL --counts '[2, 4, 8]'."
                )
            if one["scope"] not in SCOPES:
                raise ValueError(f"unknown scope {one['scope']!r}")
            decode = one["speed"]["phases"]["decode"]
            loss, speedup = float(one["quality"]["loss"]), float(decode["speedup"]["median"])
            points.append(MeasuredCount(one["scope"], int(one["count"]), loss, speedup, bool(decode["measurable"])))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ResultError):
            raise
        raise ResultError(
            f"recommend: {str(path)!r} is no result of benchmark ({error!r}); run benchmark anew."
        ) from None
    chosen = [point for point in points if scope in (None, point.scope)]
    if not chosen:
        known = ", ".join(dict.fromkeys(point.scope for point in points)) or "nothing"
        raise ResultError(f"recommend: {str(path)!r} measured {known}, and not scope {scope}. Sweep over --scopes.")
    return dense, chosen


def _shown(point: MeasuredCount | None, dense: float) -> str:
    if point is None:
        return "-"
    doubt = "" if point.measurable else ", not measurable"
    return f"{point.count} (loss {point.loss - dense:+.4f}, decode x{point.speedup:.2f}{doubt})"


def _within_cell(found: MeasuredCount | None, own: Sequence[MeasuredCount], dense: float) -> str:
    larger = [point for point in own if found is None or point.count > found.count]
    following = min(larger, key=lambda point: point.count, default=None)
    words = "none" if found is None else _shown(found, dense)
    if following is None:
        return f"{words}, the largest measured"
    return f"{words}; {following.count} would be {following.loss - dense:+.4f}"


# ---- from importances ----


def _from_scores(path: Path, budget: float | None, scope: Scope | None) -> None:
    points, drop = _dense_importances(path)
    metric = points[-1].metric
    kinds = {kind: [p.value for p in points if p.kind == kind and p.metric == metric] for kind in (*KINDS, "block")}
    kinds["joint"] = [value for kind in KINDS for value in kinds[kind]]
    names = [name for name in SCOPES if kinds[name] and scope in (None, name)]
    if not names:
        raise ResultError(f"recommend: {str(path)!r} has no importances of scope {scope}.")
    found = {name: knee_of_scores(kinds[name]) for name in names}
    words = [*_model_words(path), "--counts", str(_around(found, kinds)).replace(" ", "")]
    words += ["--scopes", f"[{','.join(names)}]", "--metric", metric]
    if budget is not None:
        raise ResultError(
            "recommend: importances alone do not tell the loss, so no count can be said to be within "
            f"max_loss_increase={budget:g}. Measure losses first: {_command('benchmark', words)}"
        )
    console = _console()
    step = points[-1].step
    when = f", step {step:,}" if step else ""
    when += "" if drop is None else f", the last of the dense model; the run drops at step {drop:,}"
    table = Table(title=Text(printable(f"{path}: {metric}{when}")), box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("scope", "of", "knee of the sorted importances"):
        table.add_column(column)
    for name in names:
        ordered, count = sorted(kinds[name]), found[name]
        knee_cell = "none"
        if count is not None:
            after = "" if count == len(ordered) else f"; the next has {ordered[count]:.3g}"
            knee_cell = f"{count}: importance up to {ordered[count - 1]:.3g}{after}"
        table.add_row(name, str(len(ordered)), knee_cell)
    console.print(table)
    console.print(_SOURCE, highlight=False)
    console.print("Importances alone do not tell the loss of a drop. This measures it:", highlight=False)
    _tell_command("benchmark", words)


def _dense_importances(path: Path) -> tuple[tuple[ImportancePoint, ...], int | None]:
    """The last importances of the dense model, and the step of the first drop if there is one.

    RedundancyMonitor writes those of the drop's own step with or without the dropped sublayers: if it is listed before
    SublayerDrop or after it.

    Raises:
        ResultError: If there are none, or a file is damaged.
    """
    try:
        steps = measured_steps(path)
        plan = DropPlan.load(path.parent / PLAN_FILE) if (path.parent / PLAN_FILE).is_file() else None
        first = min(drop_steps(plan), default=None)
        gone = {} if plan is None else {(d.sublayer.block, d.sublayer.kind): d.step for d in plan.drops}
        last: dict[str, set[int]] = {}
        for metric, own in steps.items():
            for step in reversed(own if first is None else [step for step in own if step <= first]):
                measured = {(p.block, p.kind) for p in read_importance(path, {metric: {step}})}
                if step != first or measured >= {each for each, when in gone.items() if when == first}:
                    last[metric] = {step}
                    break
        points = read_importance(path, last)
    except (DataError, PlanError) as error:
        raise ResultError(f"recommend: {error}") from None
    if not points:
        before = "" if first is None else f" from before the drop at step {first:,}"
        raise ResultError(f"recommend: {str(path)!r} holds no importance{before}. Give the folder of a score.")
    return points, first


def _around(found: Mapping[Scope, int | None], kinds: Mapping[str, Sequence[float]]) -> list[int]:
    """Counts to measure that every scope has: half of a knee, the knee, and beyond."""
    least = min(len(kinds[name]) for name in found)
    knees = [count for count in found.values() if count is not None] or [max(1, least // 2)]
    wanted = {max(1, count // 2) for count in knees} | set(knees) | {round(1.5 * count) for count in knees}
    return sorted({count for count in wanted if count < least} or {1})


# ---- files and commands ----


def _file_of(path: Path) -> Path:
    if path.is_dir():
        for name in (SWEEP, SCORES):
            if (path / name).is_file():
                return path / name
        raise ResultError(
            f"recommend: {str(path)!r} holds neither {SWEEP} (of a benchmark) nor {SCORES} (of a score). Give the "
            "folder of such a run."
        )
    if not path.is_file():
        raise ResultError(f"recommend: there is no {str(path)!r}. Give the folder of a benchmark or of a score.")
    return path


def _json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ResultError(f"recommend: {str(path)!r} cannot be read as JSON ({error}).") from None
    if not isinstance(content, Mapping):
        raise ResultError(f"recommend: {str(path)!r} is no result of benchmark.")
    return content


def _model_words(path: Path) -> list[str]:
    """The options that name model and text as the run's own config does; those at their defaults are left out."""
    try:
        config = config_in(path.parent) or {}
        model, data = dict(config["model"]), dict(config["data"])
    except (ValueError, KeyError, TypeError):
        return ["--model.pretrained", _UNKNOWN]
    if data.get("tokenizer") == model.get("pretrained"):
        data.pop("tokenizer", None)
    if model.get("pretrained") is None:  # trained from scratch: its config alone would give random weights
        model = {"pretrained": _UNKNOWN, "dtype": model.get("dtype")}
    return [*_changed("model", model), *_changed("data", data)]


def _changed(section: str, values: Mapping[str, Any]) -> Iterator[str]:
    from inspect import signature

    from layershed.training.causal_lm import CausalLM  # here because it takes seconds
    from layershed.training.text_data import TextData

    known = signature({"model": CausalLM, "data": TextData}[section]).parameters
    for option, value in values.items():
        if option in known and option != "optimizer" and value not in (None, known[option].default):
            yield from (f"--{section}.{option}", value if isinstance(value, str) else json.dumps(value))


def _console() -> Console:
    """As wide as the tables need, if the output is a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _command(name: str, words: Sequence[str]) -> str:
    return shlex.join(["python", PROGRAM, name, *words])


def _tell_command(name: str, words: Sequence[str]) -> None:
    if _UNKNOWN in words:
        print(f"The run does not name a saved model; put the dense one in the place of {_UNKNOWN}:")
    print(printable(_command(name, words)))
