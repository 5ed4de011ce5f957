"""Selects the sublayers of a drop plan from importances. Pure functions without torch: all ranks agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Literal, get_args

from layershed.arguments import plain_number
from layershed.errors import SelectionError
from layershed.planning.arguments import as_protected, check_amounts, check_scores
from layershed.planning.plan import KINDS, SCOPES, Drop, DropPlan, ImportanceScores, Kind, Scope, Sublayer

Objective = Literal["importance", "speed"]


def select_sublayers(
    scores: Mapping[Sublayer, float],
    scope: Scope = "joint",
    *,
    count: int | None = None,
    ratio: float | None = None,
    protect: Iterable[Sublayer | int] = (),
    objective: Objective = "importance",
    latency: Mapping[Sublayer, float] | None = None,
) -> DropPlan:
    """Select the sublayers with the least importance, or with the least importance per millisecond saved.

    The scopes follow arXiv 2406.15786. Attention Drop and MLP Drop rank one kind. Joint Layer Drop ranks both kinds in
    one array. Block Drop ranks whole blocks and drops both sublayers of each.

    Args:
        scores: Importance by sublayer; the lowest goes first. Scope ``"block"`` needs the block importances that
            :func:`estimate_importance` adds.
        scope: ``"attention"``, ``"cross_attention"``, ``"mlp"``, ``"block"`` or ``"joint"`` (every kind in one array).
        count: Number to drop: blocks with scope ``"block"``, else sublayers. Give count or ratio.
        ratio: Share of the candidates to drop, in (0, 1), rounded down. Protected sublayers count as candidates.
        protect: Sublayers or block indices that stay. Negative indices count from the end.
        objective: ``"importance"`` ranks by importance, ``"speed"`` by importance per millisecond saved.
        latency: Seconds of each sublayer, from ``measure_latency(...).sublayers``; for objective ``"speed"``.

    Returns:
        The plan. Ties go in forward order. Its scores are importances with either objective.

    Raises:
        SelectionError: If not exactly one of count and ratio is given, if it is out of range or cannot be met, or if
            objective ``"speed"`` lacks a latency.

    Example:
        >>> scores = {Sublayer(0, "mlp", "m.0"): 0.3, Sublayer(1, "mlp", "m.1"): 0.1}
        >>> [sublayer.name for sublayer in select_sublayers(scores, "mlp", count=1)]
        ['mlp.1']
    """
    check_selection(scope, count=count, ratio=ratio)
    groups = _candidates(scores, scope)
    if not groups:
        raise SelectionError(
            f"select_sublayers(scope={scope!r}): none of the {len(scores)} scores are of that scope. "
            "Choose another scope."
        )
    number = count if count is not None else math.floor((ratio or 0) * len(groups) + 1e-9)
    if number < 1:
        least = f"the smallest ratio that drops something is {math.ceil(1e4 / len(groups)) / 1e4}"
        raise SelectionError(
            f"select_sublayers(ratio={ratio}): nothing would be dropped, as that is less than one of {len(groups)} "
            f"candidates; {least if len(groups) > 1 else 'give count=1'}."
        )
    free = rank_sublayers(scores, scope, protect=protect, objective=objective, latency=latency)
    if number > len(free):
        raise SelectionError(
            f"select_sublayers(scope={scope!r}): asked to drop {number}, but there are only {len(free)} candidates"
            + (f" ({len(groups) - len(free)} more are protected)." if len(free) < len(groups) else ".")
        )
    return plan_of_groups(scores, scope, free[:number])


def rank_sublayers(
    scores: Mapping[Sublayer, float],
    scope: Scope,
    *,
    protect: Iterable[Sublayer | int] = (),
    objective: Objective = "importance",
    latency: Mapping[Sublayer, float] | None = None,
) -> list[tuple[Drop, ...]]:
    """Rank all droppable sublayers, first to drop first. Scope ``"block"`` groups the sublayers of a block.

    Arguments and errors are those of :func:`select_sublayers`. The list is empty if nothing may be dropped.
    """
    check_scores(scores)
    kept = protected_sublayers(scores, protect)
    free = [group for group in _candidates(scores, scope) if kept.isdisjoint(group[1])]
    price = _price(objective, latency)
    free.sort(key=lambda group: (price(*group), group[1]))
    return [tuple(Drop(sublayer, score) for sublayer in group) for score, group in free]


def plan_of_groups(scores: Mapping[Sublayer, float], scope: Scope, groups: Iterable[tuple[Drop, ...]]) -> DropPlan:
    """Build the plan that drops these groups from :func:`rank_sublayers`."""
    drops = tuple(drop for group in groups for drop in group)
    if not isinstance(scores, ImportanceScores):
        return DropPlan(drops, scope)
    return DropPlan(drops, scope, scores.metric, scores.model)


def _price(
    objective: Objective, latency: Mapping[Sublayer, float] | None
) -> Callable[[float, tuple[Sublayer, ...]], float]:
    """Return the sort key of a candidate: importance, or importance per millisecond."""
    check_objective(objective)
    if objective == "importance":
        return lambda importance, _: importance
    times = latency or {}

    def per_millisecond(importance: float, group: tuple[Sublayer, ...]) -> float:
        seconds = sum(times.get(sublayer, math.nan) for sublayer in group)
        if not seconds > 0:
            raise SelectionError(
                f"objective='speed': there is no latency of {group[0].name}. Pass latency=measure_latency(model, "
                "...).sublayers."
            )
        # rounding can leave an importance slightly below 0; a longer time would then raise its price
        return max(importance, 0.0) / (1000 * seconds)

    return per_millisecond


def equal_scores(sublayers: Collection[Sublayer]) -> ImportanceScores:
    """Give every sublayer the same importance, to check in advance whether a selection is possible."""
    blocks = dict.fromkeys((sublayer.block for sublayer in sublayers), 0.0)
    return ImportanceScores(dict.fromkeys(sublayers, 0.0), blocks=blocks)


def check_selection(scope: Scope, *, count: int | None, ratio: float | None) -> None:
    """Check the arguments that need no scores, so that a run fails before it starts.

    Raises:
        SelectionError: If the scope is unknown, or not exactly one of count and ratio is given and in range.
    """
    check_scope(scope)
    check_amounts(count, ratio)
    if (count is None) == (ratio is None):
        raise SelectionError(f"count={count}, ratio={ratio}: give exactly one of count and ratio.")
    if count is not None and count < 1:
        raise SelectionError(f"count={count}: count must be at least 1.")
    if ratio is not None and not 0 < ratio < 1:
        raise SelectionError(f"ratio={ratio}: ratio must be in (0, 1), both ends excluded.")


def check_scope(scope: Scope) -> None:
    """Refuse an unknown scope.

    Raises:
        SelectionError: If the scope is not one of ``SCOPES``.
    """
    if scope not in SCOPES:
        raise SelectionError(f"scope={scope!r}: scope must be one of {', '.join(SCOPES)}.")


def check_objective(objective: Objective) -> None:
    """Refuse an unknown objective.

    Raises:
        SelectionError: If the objective is neither ``"importance"`` nor ``"speed"``.
    """
    if objective not in get_args(Objective):
        raise SelectionError(f"objective={objective!r}: objective must be one of {', '.join(get_args(Objective))}.")


def _candidates(scores: Mapping[Sublayer, float], scope: Scope) -> list[tuple[float, tuple[Sublayer, ...]]]:
    """Candidates of the ranking, each an importance and the sublayers that are dropped together."""
    check_scores(scores)
    if scope == "block":
        groups = _block_groups(scores)
    else:
        kinds: tuple[Kind, ...] = KINDS if scope == "joint" else (scope,)
        groups = [(score, (sublayer,)) for sublayer, score in scores.items() if sublayer.kind in kinds]
    for score, group in groups:
        if not math.isfinite(score):
            raise SelectionError(f"The importance of {group[0].name} is {score}. Check the calibration data for NaN.")
    return groups


def _block_groups(scores: Mapping[Sublayer, float]) -> list[tuple[float, tuple[Sublayer, ...]]]:
    blocks = scores.blocks if isinstance(scores, ImportanceScores) else {}
    if not blocks:
        raise SelectionError("scope='block' needs block importances. Pass the result of estimate_importance.")
    members = {block: tuple(sorted(s for s in scores if s.block == block)) for block in blocks}
    return [(score, members[block]) for block, score in blocks.items() if members[block]]


def protected_sublayers(sublayers: Iterable[Sublayer], protect: Iterable[Sublayer | int]) -> set[Sublayer]:
    """Resolve ``protect`` to sublayers.

    Raises:
        SelectionError: If a block index is out of range.
    """
    present = set(sublayers)
    protect = as_protected(protect)
    if not present:
        raise SelectionError("There is no sublayer to choose from: the scores are empty. Measure them first.")
    last = max(sublayer.block for sublayer in present)
    kept: set[Sublayer] = set()
    for item in protect:
        if isinstance(item, Sublayer):
            kept.add(item)
            continue
        index = plain_number(item)
        if isinstance(index, bool) or not isinstance(index, int):
            raise SelectionError(f"protect: {item!r} is neither a block's index nor a Sublayer.")
        block = index if index >= 0 else last + 1 + index
        if not 0 <= block <= last:
            raise SelectionError(f"protect: there is no block {item}; blocks go from 0 to {last}.")
        kept.update(sublayer for sublayer in present if sublayer.block == block)
    return kept
