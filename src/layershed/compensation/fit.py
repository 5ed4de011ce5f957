"""Fits linear maps to sublayers in closed form. No weight of the model changes.

The map of a sublayer reads h, the output of its own norm, and aims at what it adds to the stream:

    W h + c  ~  b

Tokens count by 1 / |Y|^2, because the norms that read the stream divide by its length: what counts is the error
relative to the stream. A relative is Neural Block Linearization (arXiv 2505.21077), which replaces attention and keeps
activations on disk; here sums of ``2 width**2`` numbers are kept for each map.

A refit reads h in the dropped model, in which the maps of the fit before run, and aims at the same b: each map then
gets the inputs that it will get. Maps that aim at the dense stream itself, to make up for what was lost before them,
were tried, too: their loss is higher on text that they were not fitted to (docs/quality.md).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from layershed.arguments import check_most, check_number
from layershed.batches import TokenIdRange, device_of, iterate, model_inputs
from layershed.compensation.map_sums import MapSums, sums_for
from layershed.compensation.normal_equations import DEFAULT_RIDGE
from layershed.compensation.readings import Readings
from layershed.discovery.anatomy import Anatomy
from layershed.discovery.find import dissect, find_transformer
from layershed.discovery.probe import evaluating
from layershed.errors import CompensationError
from layershed.importance.taps import body_of
from layershed.planning.plan import DropPlan, Sublayer
from layershed.progress import least, track
from layershed.stand_ins.carried import weights_like
from layershed.stand_ins.contexts import lifted, standing_in
from layershed.stand_ins.linear_map import LinearMap
from layershed.surgery import bypassed_sublayers, stopped_by

_HELD_OUT = 4  # every fourth batch checks the maps before they are fitted to it, too


class LinearMaps(dict[Sublayer, LinearMap]):
    """Linear maps by sublayer.

    Attributes:
        residual: By sublayer, the share of the energy of b about its mean that its map misses, tokens counted by
            1 / |Y|^2. It is measured on every fourth batch by a map that was fitted to the others; with fewer than four
            batches, on those that it was fitted to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.residual: dict[Sublayer, float] = {}


def fit_linear_maps(
    model: nn.Module,
    batches: Iterable[Any],
    sublayers: Iterable[Sublayer],
    *,
    rank: int | None = None,
    ridge: float = DEFAULT_RIDGE,
    refits: int = 1,
    max_batches: int | None = None,
    name: str | None = None,
) -> LinearMaps:
    """Fit a linear map ``b = W norm(X) + c`` to each of some sublayers, for :func:`bypass`. The model is not changed.

    One pass of the dense model over the batches, also if some of its sublayers are bypassed. Each refit takes one pass
    of the dense and one of the dropped model.

    Args:
        model: A transformer, or a module that holds one.
        batches: As of :func:`estimate_importance`: mixed text, some 20 tokens for each channel of the model or more. In
            a distributed run the sums are those of all ranks.
        sublayers: A drop plan or sublayers. Of a plan with actions, those with the action ``linear`` get maps; a map
            also makes up for the sublayers with the action ``bypass`` that come after it in its block. So an attention
            with a map, and its MLP bypassed, are a map in place of the whole block.
        rank: Rank of W, which costs ``2 rank width`` numbers; None for a full matrix.
        ridge: Strength of the ridge, as a share of the mean variance of h. 1e-3 to 1e-1 make little difference.
        refits: How often the maps are fitted again, to the h of the model in which they run. 0 for candidates of a
            search, of which only some will run.
        max_batches: Stop after that many batches; None takes all.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Returns:
        The maps in the dtype and on the device of the weights that they replace.

    Raises:
        CompensationError: If a sublayer cannot be replaced by a map, no token is seen, or values are not finite.
    """
    check_fit(rank, ridge, refits)
    check_most(max_batches, "max_batches", CompensationError)
    transformer = find_transformer(model, name=name)
    fit = _Fit(transformer, dissect(transformer), sublayers, rank, ridge)
    given = list(iterate(batches, max_batches)) if refits else iterate(batches, max_batches)
    with evaluating(transformer), torch.no_grad():
        maps = fit.run(given, LinearMaps(), least(batches, max_batches))
        for _ in range(refits):
            maps = fit.run(given, maps, least(given, None))
    return maps


def check_fit(rank: int | None, ridge: float = DEFAULT_RIDGE, refits: int = 0) -> None:
    """Refuse arguments of :func:`fit_linear_maps` that fit no model.

    Raises:
        CompensationError: If one is out of range.
    """
    check_number(ridge, "ridge", CompensationError)
    check_number(refits, "refits", CompensationError, whole=True)
    if rank is not None:
        check_number(rank, "rank", CompensationError, whole=True)
    if ridge <= 0 or (rank is not None and rank < 1):
        raise CompensationError(f"ridge={ridge}, rank={rank}: both must be positive.")
    if refits < 0:
        raise CompensationError(f"refits={refits}: it must be at least 0.")


def mappable(model: nn.Module, *, name: str | None = None) -> tuple[Sublayer, ...]:
    """The sublayers that still run and that a linear map can replace, in forward order."""
    transformer = find_transformer(model, name=name)
    gone = set(bypassed_sublayers(transformer))
    branches = dissect(transformer).branches
    return tuple(b.sublayer for b in branches if b.linear is not None and b.sublayer not in gone)


@dataclass
class _Fit:
    """Fits the maps of some sublayers of one model."""

    transformer: nn.Module
    anatomy: Anatomy
    sublayers: Iterable[Sublayer]
    rank: int | None
    ridge: float

    def __post_init__(self) -> None:
        drops = self.sublayers.drops if isinstance(self.sublayers, DropPlan) else ()
        self.dropped = set(self.sublayers)
        self.replaced = {drop.sublayer for drop in drops if drop.action == "linear"} or self.dropped
        if not self.replaced:
            raise CompensationError(
                "fit_linear_maps: no sublayer is given. Give a drop plan, or at least one sublayer."
            )
        _check_places(self.replaced, self.anatomy)
        self.readings = Readings(self.transformer, self.anatomy)
        self.body = body_of(self.transformer)

    def run(self, batches: Iterable[Any], maps: LinearMaps, number: int | None) -> LinearMaps:
        """One fit: to the h of the dense model, or with maps to the h of the model in which they run."""
        sums = sums_for(self.anatomy.branches, self.replaced, self.dropped)
        ids = TokenIdRange(self.transformer)
        for place, batch in enumerate(track(batches, "Refitting maps" if maps else "Fitting maps", number)):
            self._add(sums, model_inputs(batch, self.transformer, ids), maps, place % _HELD_OUT == _HELD_OUT - 1)
        ids.read()
        found = LinearMaps()
        for each in track(sums, "Solving maps", len(sums)):
            sublayer = each.branch.sublayer
            linear_map, found.residual[sublayer] = each.solve(self.ridge, self.rank, device_of(self.transformer))
            like = weights_like(self.transformer.get_submodule(sublayer.path), self.transformer)
            found[sublayer] = linear_map.to(**like)
        return found

    def _add(self, sums: list[MapSums], inputs: dict[str, Any], maps: LinearMaps, held_out: bool) -> None:
        read = {branch.sublayer: branch for each in sums for branch in (each.branch, *each.beside)}
        with lifted(self.transformer), self.readings.of(read.values()) as dense:
            self.body(**inputs)
        if not maps:
            dropped = None
        else:
            branches = [each.branch for each in sums]
            with self._standing(maps), self.readings.of(branches, only_h=True) as dropped:
                self.body(**inputs)
        for each in sums:
            each.add(dense, dropped, held_out=held_out)

    def _standing(self, maps: LinearMaps) -> ExitStack:
        """Within the context the maps run, and what is bypassed beside them does not."""
        stack = ExitStack()
        now = set(bypassed_sublayers(self.transformer))
        before = dict(stopped_by(self.anatomy.branches, now - self.dropped))
        if now & self.dropped:
            stack.enter_context(lifted(self.transformer))
            before = {}
        out = dict(stopped_by(self.anatomy.branches, now | self.dropped, maps))
        stack.enter_context(standing_in(self.transformer, {p: s for p, s in out.items() if p not in before}))
        return stack


def _check_places(sublayers: Collection[Sublayer], anatomy: Anatomy) -> None:
    """Refuse sublayers that no linear map can replace."""
    known = {branch.sublayer: branch for branch in anatomy.branches}
    for sublayer in sorted(sublayers):
        if sublayer not in known:
            raise CompensationError(f"No map can be fitted to {sublayer.name}: the model has no such sublayer to run.")
        if known[sublayer].linear is None:
            raise CompensationError(
                f"{sublayer.name} cannot be replaced by a linear map: no place was proven where a map of its norm's "
                "output gives what it adds to the stream. Drop it without a map."
            )
