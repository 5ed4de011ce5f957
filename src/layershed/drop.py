"""Score, select and bypass in one call, without training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from layershed.discovery.find import find_sublayers, find_transformer
from layershed.discovery.uneven import explaining_empty_scope
from layershed.importance.tracker import check_scoring, estimate_importance
from layershed.planning.arguments import as_protected
from layershed.planning.plan import DropPlan, Scope, Sublayer
from layershed.planning.selection import check_selection, equal_scores, select_sublayers
from layershed.surgery import bypass, bypassed_sublayers


def drop_sublayers(
    model: nn.Module,
    batches: Iterable[Any],
    scope: Scope = "joint",
    *,
    count: int | None = None,
    ratio: float | None = None,
    metric: str = "cosine",
    protect: Iterable[Sublayer | int] = (),
    max_batches: int | None = None,
    name: str | None = None,
) -> DropPlan:
    """Measure importance on the batches, choose the least important sublayers and bypass them.

    Args:
        model: A transformer, or a module that holds one.
        batches: As of :func:`~layershed.importance.tracker.estimate_importance`.
        scope: As of :func:`~layershed.planning.selection.select_sublayers`, and so are count, ratio and protect.
        count: How many to drop. Give count or ratio.
        ratio: Share of the candidates to drop, in (0, 1).
        metric: Name of the importance metric.
        protect: Sublayers, or indices of blocks, that are not dropped.
        max_batches: Stop scoring after that many batches.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Returns:
        The plan that was carried out; ``restore(model)`` undoes it.

    Raises:
        LayershedError: As the functions that it calls; the model is then unchanged.
    """
    check_selection(scope, count=count, ratio=ratio)
    check_scoring(metric, max_batches)
    protect = as_protected(protect)
    gone = bypassed_sublayers(find_transformer(model, name=name))
    running = [sublayer for sublayer in find_sublayers(model, name=name) if sublayer not in gone]
    if running:  # a count that cannot be met is refused before any batch is read
        with explaining_empty_scope(model, scope, name=name):
            select_sublayers(equal_scores(running), scope, count=count, ratio=ratio, protect=protect)
    scores = estimate_importance(model, batches, metric, max_batches=max_batches, name=name)
    plan = select_sublayers(scores, scope, count=count, ratio=ratio, protect=protect)
    bypass(model, plan, name=name)
    return plan
