"""Trying what others do: an action on a model whose sublayers are dropped before, meanwhile or afterwards."""

from __future__ import annotations

import logging
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import set_seed

import layershed as ls
from layershed.errors import LayershedError
from layershed.stand_ins.install import MARK
from tests.support.by_others import (
    accelerate_actions,
    lightning_actions,
    peft_actions,
    quantized_actions,
    torch_actions,
    trainer_actions,
    transformers_actions,
    user_actions,
    wrapping_actions,
)
from tests.support.by_others.action import Action, Case, cases
from tests.support.by_others.world import (
    ARCHITECTURES,
    Model,
    World,
    dense_model,
    logits,
    make_reference,
    silence,
    wanted,
)

ACTIONS: dict[str, Action] = {
    **peft_actions.ACTIONS,
    **accelerate_actions.ACTIONS,
    **transformers_actions.ACTIONS,
    **trainer_actions.ACTIONS,
    **quantized_actions.ACTIONS,
    **torch_actions.ACTIONS,
    **wrapping_actions.ACTIONS,
    **lightning_actions.ACTIONS,
    **user_actions.ACTIONS,
}
CASES: dict[str, Case] = {case.name: case for case in cases(ACTIONS)}


class HarnessError(Exception):
    """A case says nothing: its action fails on a dense model, or its reference computes what the dense model does."""


class LeftAloneError(Exception):
    """Layershed did not find all sublayers."""


@dataclass(frozen=True)
class Verdict:
    """What came of a case.

    Args:
        kind: ``right`` if the model computes what the reference does and says what is dropped; ``refused`` if an error
            or a report names the drop; else ``wrong``.
        what: What happened, in a line.
    """

    kind: Literal["right", "refused", "wrong"]
    what: str


def try_case(case: Case) -> Verdict:
    """Run a case and judge it."""
    expected, dense = expectations(case.architecture, case.action, case.moment if case.action.trains else 0)
    with tempfile.TemporaryDirectory() as place, heard() as said:
        world = World(case.architecture, dense_model(case.architecture), Path(place))
        try:
            with played(case.action, world, case.moment, _bypass) as model:
                problem = next(problems(case, model, world, expected, dense), None)
        except LayershedError as error:
            return Verdict("refused", _line(error))
        except LeftAloneError as error:
            if any("sublayer" in text or "left alone" in text for text in said()):
                return Verdict("refused", f"warned: {error}")
            problem = str(error)
        except Exception as error:
            if _names_the_drop(str(error)):
                return Verdict("refused", _line(error))
            problem = f"crash: {_line(error)}"
        reports = [*said(), *world.told]
    if problem is None:
        return Verdict("right", "")
    report = next((text for text in reports if _names_the_drop(text)), None)
    return Verdict("wrong", problem) if report is None else Verdict("refused", f"reported: {' '.join(report.split())}")


def problems(case: Case, model: Model, world: World, expected: Tensor, dense: Tensor) -> Iterator[str]:
    """What is wrong with a model, the worst first."""
    tolerance = case.action.tolerance
    found = logits(model, world.inputs)
    if not close(found, expected, tolerance):
        what = "the dense model" if close(found, dense, tolerance) else "another model"
        yield f"computes {what} (off by {_distance(found, expected):.2g})"
    if not case.action.named:
        return
    names = _dropped(model)
    if names != sorted(ARCHITECTURES[case.architecture].dropped):
        yield f"says that {len(names)} sublayers are dropped"
    yield from _saved(model, world, expected, tolerance)
    yield from _restored(model, world, None if case.action.follows else dense, tolerance)


def _saved(model: nn.Module, world: World, expected: Tensor, tolerance: float) -> Iterator[str]:
    folder = world.folder / "again"
    try:
        ls.save_pretrained(model, folder)
        loaded = ls.load_pretrained(folder)
        found = logits(loaded, world.inputs)
    except LayershedError:
        return
    except Exception as error:
        yield f"saving by layershed crashes: {_line(error)}"
        return
    if not close(found, expected, tolerance):
        yield f"layershed saves another model (off by {_distance(found, expected):.2g})"


def _restored(model: nn.Module, world: World, dense: Tensor | None, tolerance: float) -> Iterator[str]:
    if ls.removed_sublayers(model):
        return
    try:
        ls.restore(model)
        found, names = logits(model, world.inputs), _dropped(model)
    except LayershedError:
        return
    except Exception as error:
        yield f"restoring crashes: {_line(error)}"
        return
    if names or (dense is not None and not close(found, dense, tolerance)):
        yield "restoring does not give the dense model"


@contextmanager
def played(action: Action, world: World, moment: int | None, drop: Callable[[World, Model], None]) -> Iterator[Model]:
    """The model after an action, while what the action opened is still open; sublayers are dropped on the way."""
    set_seed(0)
    model = world.model
    if moment == 0:
        drop(world, model)
    steps = action.do(world)
    try:
        for step in range(1, action.steps + 1):
            model = next(steps)
            if world.silent and isinstance(model, nn.Module):
                silence(model, world.architecture)
            if step == moment:
                drop(world, model)
        yield model
    finally:
        steps.close()  # type: ignore[attr-defined]


def _bypass(world: World, model: nn.Module) -> None:
    sublayers = wanted(world.name, model)
    lacking = len(world.architecture.dropped) - len(sublayers)
    if lacking:
        ls.estimate_importance(model, [world.inputs])  # what a user who makes a plan hears
        raise LeftAloneError(f"layershed does not find {lacking} of the sublayers to drop")
    ls.bypass(model, sublayers)


def _silence(world: World, model: nn.Module) -> None:
    make_reference(model, world.architecture)
    world.silent = True


@cache
def expectations(architecture: str, action: Action, moment: int) -> tuple[Tensor, Tensor]:
    """Logits of the reference, dropped at a moment, and of the dense model after the action.

    Raises:
        HarnessError: If they say nothing.
    """
    with tempfile.TemporaryDirectory() as place, heard():
        expected, dense = _expected(architecture, action, moment, Path(place))
    if close(expected, dense, 2 * action.tolerance):
        raise HarnessError(f"{architecture}: {action.name}: reference and dense model compute the same")
    return expected, dense


def _expected(architecture: str, action: Action, moment: int, place: Path) -> tuple[Tensor, Tensor]:
    """A reference that does not follow the action is judged as it is."""
    found = []
    for when in (moment, None):
        world = World(architecture, dense_model(architecture), place / str(when))
        world.folder.mkdir()
        if when is not None and not action.follows:
            make_reference(world.model, world.architecture)
            found.append(logits(world.model, world.inputs))
            continue
        try:
            with played(action, world, when, _silence) as model:
                found.append(logits(model, world.inputs))
        except Exception as error:
            raise HarnessError(f"{architecture}: {action.name}: fails without any drop: {_line(error)}") from error
    return found[0], found[1]


@contextmanager
def heard() -> Iterator[Any]:
    """Gathers what is logged, warned and printed; the value returns it as texts."""
    texts: list[str] = []

    class Gather(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    gather, printed = Gather(logging.WARNING), StringIO()
    loggers = [logging.getLogger(n) for n in (None, "transformers", "accelerate", "peft", "lightning", "torch")]
    with ExitStack() as stack:
        warned = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        stack.enter_context(redirect_stdout(printed))
        stack.enter_context(redirect_stderr(printed))
        for logger in loggers:
            logger.addHandler(gather)
            stack.callback(logger.removeHandler, gather)
        yield lambda: [*texts, *(str(warning.message) for warning in warned), printed.getvalue()]


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether logits agree, relative to the largest."""
    return found.shape == expected.shape and _distance(found, expected) <= tolerance


def _distance(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("nan")
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1))


def _dropped(model: nn.Module) -> list[tuple[int, str]]:
    return sorted((s.block, str(s.kind)) for s in ls.dropped_sublayers(model))


def _names_the_drop(text: str) -> bool:
    return MARK in text


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:230]}"


def main(words: list[str] | None = None) -> int:
    """Try every case, or those whose name contains all words; the last line says how many were right or refused."""
    words = sys.argv[1:] if words is None else words
    chosen = [case for name, case in CASES.items() if all(word in name for word in words)]
    counts: Counter[str] = Counter()
    for case in chosen:
        start = time.perf_counter()
        try:
            verdict = try_case(case)
        except HarnessError as error:
            verdict = Verdict("wrong", f"the case says nothing: {error}")
        counts[verdict.kind] += 1
        mark = verdict.kind.upper() if verdict.kind == "wrong" else verdict.kind
        seconds = time.perf_counter() - start
        print(f"{mark:8}{case.name}{f' ({seconds:.0f} s)' if seconds > 3 else ''}", flush=True)
        if verdict.what:
            print(f"        {verdict.what}", flush=True)
    torch.compiler.reset()
    tried = {case.action.name for case in chosen}
    print(f"{len(tried)} actions on {len({case.architecture for case in chosen})} architectures, {dict(counts)}")
    good = counts["right"] + counts["refused"]
    print(f"{len(chosen)} tried, {good} right or refused")
    return int(good != len(chosen))
