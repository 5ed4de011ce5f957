"""Arguments of the wrong type, refused in a sentence before anything is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from os import PathLike
from typing import Any

from layershed.arguments import shown
from layershed.errors import PlanError, SelectionError
from layershed.planning.plan import Sublayer


def sublayer_set(sublayers: Iterable[Sublayer], what: str) -> set[Sublayer]:
    """The given sublayers as a set.

    Raises:
        PlanError: If they are not sublayers, such as the path of a plan or names.
    """
    given: Any = sublayers
    if isinstance(given, str | bytes | PathLike):
        raise PlanError(f"{what}: takes sublayers, got {given!r}. Load a saved plan first: DropPlan.load(path).")
    if isinstance(given, Sublayer):
        raise PlanError(f"{what}: takes an iterable of sublayers, got one. Give [sublayer].")
    try:
        found = set(given)
    except TypeError:
        raise PlanError(f"{what}: takes a DropPlan or sublayers, got a {type(given).__name__}.") from None
    for each in found:
        if not isinstance(each, Sublayer):
            raise PlanError(f"{what}: {each!r} is no Sublayer. Take those of find_sublayers(model), or a DropPlan.")
    return found


def as_protected(protect: Any) -> tuple[Any, ...]:
    """What is protected, as a tuple.

    Raises:
        SelectionError: If it is one, or no iterable.
    """
    if isinstance(protect, Integral | str | Sublayer):
        raise SelectionError(f"protect={protect!r}: protect takes several blocks or sublayers. Give [{protect!r}].")
    if not isinstance(protect, Iterable):
        raise SelectionError(f"protect must be a list of blocks or sublayers, got {shown(protect)}.")
    return tuple(protect)


def check_amounts(count: Any, ratio: Any) -> None:
    """Refuse a count that is no whole number, and a ratio that is no number.

    Raises:
        SelectionError: If one is.
    """
    if count is not None and (isinstance(count, bool) or not isinstance(count, Integral)):
        raise SelectionError(f"count={count!r}: count must be an int, not a {type(count).__name__}.")
    if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, Real)):
        raise SelectionError(f"ratio={ratio!r}: ratio must be a number, not a {type(ratio).__name__}.")


def check_scores(scores: Any) -> None:
    """Refuse scores that are no mapping of sublayers.

    Raises:
        SelectionError: If they are not.
    """
    if not isinstance(scores, Mapping):
        raise SelectionError(
            f"scores must map sublayers to importance, as estimate_importance(model, batches) returns them; got a "
            f"{type(scores).__name__}."
        )
    for key in scores:
        if not isinstance(key, Sublayer):
            raise SelectionError(f"scores: {key!r} is no Sublayer. Pass the result of estimate_importance.")
