"""Greedy search: the sublayer that does least damage goes, then the others are measured anew without it.

The damages of single sublayers do not add up: two neighbours that do the same work are both cheap alone, and dear
together. So each round measures the damage of the set. To save passes, a round measures only a shortlist: those whose
damage rose least when they were last measured. Relative: BlockPruner (arXiv 2406.10594), which measures every candidate
in every round.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from layershed.arguments import check_number
from layershed.errors import SelectionError
from layershed.importance.damage import DamageMeter
from layershed.importance.metrics import DamageMetric
from layershed.planning.plan import Drop, DropPlan, Scope, Sublayer
from layershed.planning.selection import check_selection, equal_scores, rank_sublayers
from layershed.progress import track
from layershed.search.state import load_state, save_state
from layershed.stand_ins.linear_map import LinearMap

DEFAULT_SHORTLIST = 8


@dataclass
class Searched:
    """How far a greedy search is.

    Args:
        chosen: Indices of the chosen candidates, in the order of choice.
        damages: The damage of the set after each choice.
        rises: By candidate, by how much the damage rose with it when it was last measured.
        passes: Cost so far, in forward passes over the batches.
    """

    chosen: list[int] = field(default_factory=list)
    damages: list[float] = field(default_factory=list)
    rises: list[float] = field(default_factory=list)
    passes: float = 0.0


def greedy_search(
    model: nn.Module,
    batches: Iterable[Any],
    scope: Scope = "joint",
    *,
    count: int,
    metric: DamageMetric = "kl",
    maps: Mapping[Sublayer, LinearMap] | None = None,
    protect: Collection[Sublayer | int] = (),
    shortlist: int = DEFAULT_SHORTLIST,
    max_batches: int | None = None,
    state: str | Path | None = None,
    name: str | None = None,
) -> DropPlan:
    """Choose a set of sublayers one after the other, each time the one with which the set does least damage.

    The first round measures every candidate, about half as many forward passes over the batches as there are
    candidates. Every later one measures the shortlist. Every beginning of the plan is what a search for fewer gives.
    The model is not changed.

    Args:
        model: A causal language model, or a module that holds one.
        batches: As of :func:`leave_one_out`. A few thousand tokens of mixed text are enough.
        scope: As of :func:`select_sublayers`.
        count: How many to choose: blocks with scope ``"block"``, else sublayers.
        metric: As of :func:`leave_one_out`.
        maps: Linear maps by sublayer: those sublayers get the action ``linear``, and are measured with their maps.
        protect: Sublayers, or indices of blocks, that stay.
        shortlist: How many candidates a round measures.
        max_batches: Stop after that many batches.
        state: A file that keeps finished rounds; an interrupted search goes on from it. None keeps nothing.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Returns:
        The plan in the order of choice. The score of each drop is the damage of the set up to it, in nats per token.

    Raises:
        SelectionError: If there are fewer candidates than ``count``.
        LayershedError: As :func:`leave_one_out`.
    """
    check_selection(scope, count=count, ratio=None)
    check_number(shortlist, "shortlist", SelectionError, whole=True)
    if shortlist < 1:
        raise SelectionError(f"shortlist={shortlist}: it must be at least 1.")
    meter = DamageMeter(model, batches, metric, maps=maps, max_batches=max_batches, name=name)
    ranked = rank_sublayers(equal_scores(meter.running), scope, protect=protect)
    groups = [tuple(drop.sublayer for drop in group) for group in ranked]
    if len(groups) < count:
        raise SelectionError(f"greedy_search(count={count}): there are only {len(groups)} candidates. Choose fewer.")
    about: dict[str, Any] = {
        "search": "greedy",
        "scope": scope,
        "metric": metric,
        "tokens": meter.tokens,
        "shortlist": shortlist,
    }
    about["candidates"] = [[sublayer.name for sublayer in group] for group in groups]
    searched = Searched(**load_state(state, about))
    for _ in track(range(len(searched.chosen), count), "Searching", count - len(searched.chosen)):
        before = meter.passes
        _choose_one(meter, groups, searched, shortlist)
        searched.passes += meter.passes - before
        save_state(state, about, vars(searched))
    return _plan(groups, searched, scope, meter, count)


def _choose_one(meter: DamageMeter, groups: list[tuple[Sublayer, ...]], searched: Searched, shortlist: int) -> None:
    """Choose the candidate with which the set does least damage, and note what was measured."""
    gone = [sublayer for index in searched.chosen for sublayer in groups[index]]
    free = [index for index in range(len(groups)) if index not in searched.chosen]
    if searched.rises:
        free = sorted(free, key=lambda index: (searched.rises[index], index))[:shortlist]
    else:
        searched.rises = [0.0] * len(groups)
    found = dict(zip(free, meter.of([groups[index] for index in free], gone), strict=True))
    now = searched.damages[-1] if searched.damages else 0.0
    for index, damage in found.items():
        searched.rises[index] = damage - now
    best = min(found, key=lambda index: (found[index], index))
    searched.chosen.append(best)
    searched.damages.append(found[best])


def _plan(
    groups: list[tuple[Sublayer, ...]], searched: Searched, scope: Scope, meter: DamageMeter, count: int
) -> DropPlan:
    drops = []
    for index, damage in zip(searched.chosen[:count], searched.damages, strict=False):
        for sublayer in groups[index]:
            linear = meter.maps.get(sublayer)
            drop = Drop(sublayer, damage)
            drops.append(drop if linear is None else replace(drop, action="linear", rank=linear.rank))
    return DropPlan(tuple(drops), scope, meter.metric, meter.record)
