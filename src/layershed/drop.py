"""One call: choose sublayers, fit what runs in their place, and bypass them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor, nn

from layershed.batches import as_inputs, iterate
from layershed.compensation.fit import LinearMaps, check_fit, fit_linear_maps, mappable
from layershed.compensation.fold import compensate
from layershed.discovery.find import find_sublayers, find_transformer
from layershed.discovery.uneven import explaining_empty_scope
from layershed.errors import SelectionError, UnknownNameError
from layershed.importance.metrics import DAMAGE_METRICS
from layershed.importance.tracker import check_scoring, estimate_importance
from layershed.planning.arguments import as_protected
from layershed.planning.plan import DropPlan, Scope, Sublayer
from layershed.planning.selection import check_selection, equal_scores, select_sublayers
from layershed.search.greedy import greedy_search
from layershed.surgery import bypass, bypassed_sublayers

Search = Literal["one-shot", "greedy"]
SEARCHES: tuple[Search, ...] = get_args(Search)
Replacement = Literal["linear", "fold"]
REPLACEMENTS: tuple[Replacement, ...] = get_args(Replacement)
_FEW, _TOKENS = 8, 2048  # batches, and tokens of all of them, on which damage is measured


@dataclass(frozen=True)
class DropMethod:
    """How sublayers are chosen, and what runs in their place.

    Args:
        metric: Name of the importance metric.
        search: ``"one-shot"``: those of least importance, measured once (the paper's). ``"greedy"``: one after the
            other, by the damage of the set (:func:`greedy_search`); the metric is then ``kl`` or ``loss``.
        replace: What makes up for a sublayer: None for nothing (the paper's); ``"linear"`` for a linear map of its
            norm's output in its place (:func:`fit_linear_maps`); ``"fold"`` for changed weights of the sublayers behind
            it (:func:`compensate`), which every engine runs.
        rank: Rank of the maps; None for full matrices.

    Raises:
        LayershedError: If an argument is unknown, or contradicts another one.
    """

    metric: str = "cosine"
    search: Search = "one-shot"
    replace: Replacement | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        check_scoring(self.metric, None)
        if self.search not in SEARCHES:
            raise UnknownNameError("search", self.search, SEARCHES)
        if self.replace not in (None, *REPLACEMENTS):
            raise UnknownNameError("replacement", str(self.replace), REPLACEMENTS)
        if self.search == "greedy" and self.metric not in DAMAGE_METRICS:
            raise SelectionError(
                f"search='greedy', metric={self.metric!r}: a search measures sets of sublayers, and this one measures "
                f"single sublayers. Choose {' or '.join(DAMAGE_METRICS)}."
            )
        if self.rank is not None and self.replace != "linear":
            raise SelectionError(f"rank={self.rank}: it is that of linear maps. Set replace='linear', or leave it out.")
        check_fit(self.rank)


MethodName = Literal["paper", "best"]
METHODS: dict[MethodName, DropMethod] = {
    "paper": DropMethod(),
    "best": DropMethod(metric="kl", search="greedy", replace="linear"),
}
"""Methods by name. ``paper``: that of arXiv 2406.15786. ``best``: the best one without training that we know
(docs/quality.md)."""


def method_of(
    name: MethodName | None, metric: str, search: Search, replace: Replacement | None, rank: int | None
) -> DropMethod:
    """The method of a name, or of its parts.

    Raises:
        LayershedError: If the name is unknown, it contradicts one of the parts, or they contradict each other.
    """
    if name is None:
        return DropMethod(metric, search, replace, rank)
    if name not in METHODS:
        raise UnknownNameError("method", name, METHODS)
    default, named = DropMethod(), METHODS[name]
    for what, value in (("metric", metric), ("search", search), ("replace", replace)):
        if value not in (getattr(default, what), getattr(named, what)):
            raise SelectionError(
                f"method={name!r}, {what}={value!r}: the method sets {what} itself. Leave one of them out."
            )
    return DropMethod(named.metric, named.search, named.replace, rank)


def drop_sublayers(
    model: nn.Module,
    batches: Iterable[Any],
    scope: Scope = "joint",
    *,
    count: int | None = None,
    ratio: float | None = None,
    metric: str = "cosine",
    search: Search = "one-shot",
    replace: Replacement | None = None,
    rank: int | None = None,
    protect: Iterable[Sublayer | int] = (),
    max_batches: int | None = None,
    name: str | None = None,
) -> DropPlan:
    """Choose sublayers on the batches, and bypass them: nothing, or a linear map, runs in their place.

    Args:
        model: A transformer, or a module that holds one.
        batches: As of :func:`~layershed.importance.tracker.estimate_importance`.
        scope: As of :func:`~layershed.planning.selection.select_sublayers`, and so are count, ratio and protect.
        count: How many to drop. Give count or ratio.
        ratio: Share of the candidates to drop, in (0, 1).
        metric: Name of the importance metric.
        search: As of :class:`DropMethod`, and so are replace and rank.
        replace: ``"linear"`` for linear maps, ``"fold"`` for changed weights behind, both fitted to the batches; None
            for neither.
        rank: Rank of the maps.
        protect: Sublayers, or indices of blocks, that are not dropped.
        max_batches: Stop scoring and fitting after that many batches.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Returns:
        The plan that was carried out; ``restore(model)`` undoes it.

    Raises:
        LayershedError: As the functions that it calls; the model is then unchanged.
    """
    method = DropMethod(metric, search, replace, rank)
    check_selection(scope, count=count, ratio=ratio)
    check_scoring(metric, max_batches)
    protect = as_protected(protect)
    gone = bypassed_sublayers(find_transformer(model, name=name))
    running = [sublayer for sublayer in find_sublayers(model, name=name) if sublayer not in gone]
    if running:  # a count that cannot be met is refused before any batch is read
        with explaining_empty_scope(model, scope, name=name):
            select_sublayers(equal_scores(running), scope, count=count, ratio=ratio, protect=protect)
    if method == DropMethod(metric):
        scores = estimate_importance(model, batches, metric, max_batches=max_batches, name=name)
        plan, maps = select_sublayers(scores, scope, count=count, ratio=ratio, protect=protect), LinearMaps()
        given = []
    else:
        given = list(iterate(batches, max_batches))
        plan, maps = choose(model, given, method, scope, count=count, ratio=ratio, protect=protect, name=name)
    bypass(model, plan, maps=maps, name=name)
    if method.replace == "fold":
        compensate(model, given, name=name)
    return plan


def choose(
    model: nn.Module,
    batches: list[Any],
    method: DropMethod,
    scope: Scope,
    *,
    count: int | None = None,
    ratio: float | None = None,
    protect: Iterable[Sublayer | int] = (),
    name: str | None = None,
) -> tuple[DropPlan, LinearMaps]:
    """The plan of a method, and the maps that it needs. The model is not changed. Arguments: :func:`drop_sublayers`."""
    amounts: dict[str, Any] = {"count": count, "ratio": ratio, "protect": protect}
    candidates = LinearMaps()
    if method.replace == "linear" and method.metric in DAMAGE_METRICS:  # the score must match what will be done
        places = [s for s in mappable(model, name=name) if scope in ("joint", "block", s.kind)]
        if places:
            candidates = fit_linear_maps(model, batches, places, rank=method.rank, refits=0, name=name)
    if method.search == "greedy":
        gone = bypassed_sublayers(find_transformer(model, name=name))
        running = equal_scores([s for s in find_sublayers(model, name=name) if s not in gone])
        number = select_sublayers(running, scope, **amounts)
        plan = greedy_search(
            model,
            few(batches),
            scope,
            count=len({s.block for s in number}) if scope == "block" else len(number),
            metric=method.metric,  # type: ignore[arg-type]
            maps=candidates,
            protect=tuple(protect),
            name=name,
        )
    else:
        damage: dict[str, Any] = {"maps": candidates} if candidates else {}
        measured = few(batches) if method.metric in DAMAGE_METRICS else batches
        scores = estimate_importance(model, measured, method.metric, name=name, **damage)
        plan = select_sublayers(scores, scope, **amounts)
    return _with_maps(model, batches, plan, method, name)


def few(batches: list[Any]) -> list[Any]:
    """Some 2,048 tokens spread over the batches: enough to measure damage, which takes many passes."""
    spread = batches[:: max(1, len(batches) // _FEW)][:_FEW]
    return [_first_rows(batch, _TOKENS // len(spread)) for batch in spread]


def _first_rows(batch: Any, tokens: int) -> Any:
    """The first sequences of a batch, at least one."""
    inputs = as_inputs(batch)
    if inputs is None or not isinstance(inputs["input_ids"], Tensor):
        return batch
    ids = inputs["input_ids"]
    rows = max(1, tokens // max(1, ids.shape[1]))
    same = {name: isinstance(value, Tensor) and value.shape[:1] == ids.shape[:1] for name, value in inputs.items()}
    return {name: value[:rows] if same[name] else value for name, value in inputs.items()}


def _with_maps(
    model: nn.Module, batches: list[Any], plan: DropPlan, method: DropMethod, name: str | None
) -> tuple[DropPlan, LinearMaps]:
    """The plan with its actions, and the maps fitted for exactly this plan."""
    if method.replace != "linear":
        return plan, LinearMaps()
    places = set(mappable(model, name=name))
    plan = plan.with_action("linear", [s for s in plan if s in places], rank=method.rank)
    if not places & set(plan):
        return plan, LinearMaps()
    return plan, fit_linear_maps(model, batches, plan, rank=method.rank, name=name)
