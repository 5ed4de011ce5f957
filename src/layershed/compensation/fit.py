"""Fits linear maps to sublayers in closed form: from a dense model and its batches to the maps. No weight changes.

Two streams run through the model, block by block: the dense one and the dropped one, in which the maps fitted so far
run. The map of a sublayer reads h in the dropped stream and aims at the dense stream:

    W h + c  ~  b_dense + (X_dense - X_dropped) / scale

So it also makes up for what was lost before it. Tokens count by 1 / |Y|^2, because the norms that read the stream
divide by its length. Neural Block Linearization (arXiv 2505.21077) fits each map to the dense stream alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from layershed.arguments import check_most, check_number
from layershed.batches import TokenIdRange, iterate, model_inputs
from layershed.compensation.normal_equations import DEFAULT_RIDGE, NormalEquations, fitted_map
from layershed.compensation.readings import Reading, Readings
from layershed.discovery.anatomy import Anatomy
from layershed.discovery.branches import Branch, LinearPlace
from layershed.discovery.find import dissect, find_transformer
from layershed.discovery.probe import evaluating
from layershed.errors import CompensationError
from layershed.importance.block_runs import BlockRuns, Outputs, same_outputs
from layershed.importance.taps import body_of
from layershed.planning.plan import DropPlan, Sublayer
from layershed.progress import track
from layershed.stand_ins.carried import weights_like
from layershed.stand_ins.contexts import lifted, standing_in
from layershed.stand_ins.linear_map import LinearMap
from layershed.surgery import bypassed_sublayers, stopped_by

_HELD_OUT = 4  # every fourth sequence checks the map and does not fit it


class LinearMaps(dict[Sublayer, LinearMap]):
    """Linear maps by sublayer.

    Attributes:
        residual: By sublayer, the share of the target's energy that its map misses, on sequences that it was not fitted
            to; with a single sequence, on that one. The maps themselves are fitted to all sequences.
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
    max_batches: int | None = None,
    name: str | None = None,
) -> LinearMaps:
    """Fit a linear map ``b = W norm(X) + c`` to each of some sublayers, for :func:`bypass`. The model is not changed.

    What is dropped already stays so in the dropped stream. Two passes over the batches, and one of each block with a
    map. Memory: one block's hidden states of all batches, twice, and ``2 width**2`` numbers of float64.

    Args:
        model: A transformer, or a module that holds one.
        batches: As of :func:`estimate_importance`. In a distributed run the sums are those of all ranks.
        sublayers: A drop plan or sublayers. Of a plan with actions, those with the action ``linear`` get maps, and the
            others are bypassed in the dropped stream.
        rank: Rank of W, which costs ``2 rank width`` numbers; None for a full matrix.
        ridge: Strength of the ridge, as a share of the mean variance of h. 1e-3 to 1e-1 make little difference.
        max_batches: Stop after that many batches; None takes all.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Returns:
        The maps in the dtype and on the device of the weights that they replace.

    Raises:
        CompensationError: If a sublayer cannot be replaced by a map, no token is seen, or values are not finite.
    """
    check_most(max_batches, "max_batches", CompensationError)
    check_number(ridge, "ridge", CompensationError)
    if rank is not None:
        check_number(rank, "rank", CompensationError, whole=True)
    if ridge <= 0 or (rank is not None and rank < 1):
        raise CompensationError(f"ridge={ridge}, rank={rank}: both must be positive.")
    transformer = find_transformer(model, name=name)
    anatomy = dissect(transformer)
    replaced, deleted = _actions(sublayers, anatomy, set(bypassed_sublayers(transformer)))
    ids = TokenIdRange(transformer)
    inputs = [model_inputs(batch, transformer, ids) for batch in iterate(batches, max_batches)]
    if not inputs:
        raise CompensationError("fit_linear_maps: there is no batch. A generator can be read only once.")
    with evaluating(transformer), torch.no_grad():
        return _Fit(transformer, anatomy, inputs, rank, ridge).run(replaced, deleted)


def _actions(
    sublayers: Iterable[Sublayer], anatomy: Anatomy, gone: set[Sublayer]
) -> tuple[list[Branch], set[Sublayer]]:
    """The branches that get maps, in forward order, and the sublayers that are deleted beside them."""
    linear = {drop.sublayer for drop in sublayers.drops if drop.action == "linear"} if _has_actions(sublayers) else None
    wanted = set(sublayers)
    replaced = wanted if linear is None else linear
    known = {branch.sublayer: branch for branch in anatomy.branches}
    if not replaced:
        raise CompensationError("fit_linear_maps: no sublayer was given. Give a drop plan, or at least one sublayer.")
    for sublayer in sorted(replaced):
        if sublayer not in known or sublayer in gone:
            why = "is dropped already" if sublayer in gone else "is not in the model"
            raise CompensationError(
                f"fit_linear_maps: {sublayer.name} {why}. A map is fitted to a sublayer that runs. Restore it, or "
                "leave it out."
            )
        if known[sublayer].linear is None:
            raise CompensationError(
                f"fit_linear_maps: {sublayer.name} cannot be replaced by a linear map: no place was proven where a map "
                "of its norm's output gives what it adds to the stream. Drop it without a map."
            )
    return [branch for branch in anatomy.branches if branch.sublayer in replaced], wanted - replaced - gone


def _has_actions(sublayers: Iterable[Sublayer]) -> bool:
    return isinstance(sublayers, DropPlan) and any(drop.action == "linear" for drop in sublayers.drops)


class _Stream:
    """One stream: what the blocks before a place returned, for every batch."""

    def __init__(self, runs: BlockRuns, body: nn.Module, inputs: Sequence[dict[str, Any]]) -> None:
        self._runs, self._body, self._inputs = runs, body, inputs
        self._outputs: list[Outputs] = [{} for _ in inputs]
        self._done = 0
        self.reuses = True

    def advance(self, place: int) -> None:
        """Run the blocks before a place."""
        if place > self._done:
            keep = [p for p in self._runs.needed_before(place) if p >= self._done]
            for batch, before in enumerate(self._outputs):
                with self._running(batch, place - 1, keep) as kept:
                    self._body(**self._inputs[batch])
                both = {**before, **kept}
                self._outputs[batch] = {p: both[p] for p in self._runs.needed_before(place)}
            self._done = place

    def run(self, batch: int, place: int) -> None:
        """Run the block at a place, on one batch."""
        with self._running(batch, place, []):
            self._body(**self._inputs[batch])

    def _running(self, batch: int, last: int, keep: Sequence[int]) -> Any:
        first = self._done if self.reuses else 0
        return self._runs.running(self._outputs[batch], first, last, keep)

    def check(self, place: int) -> bool:
        """Whether a pass that takes earlier blocks' outputs gives what a whole pass gives, on the first batch."""
        if not self._done:
            return True
        with self._running(0, place, [place]) as short:
            self._body(**self._inputs[0])
        with self._runs.running({}, 0, None, [place]) as whole:
            self._body(**self._inputs[0])
        return same_outputs(short[place], whole[place])


class _Fit:
    def __init__(
        self,
        transformer: nn.Module,
        anatomy: Anatomy,
        inputs: Sequence[dict[str, Any]],
        rank: int | None,
        ridge: float,
    ) -> None:
        self.transformer, self.anatomy, self.rank, self.ridge = transformer, anatomy, rank, ridge
        self.runs, self.readings = BlockRuns(transformer, anatomy.paths), Readings(transformer, anatomy)
        body = body_of(transformer)
        self.dense, self.dropped = (_Stream(self.runs, body, inputs) for _ in range(2))
        self.batches = range(len(inputs))
        self.maps = LinearMaps()

    def run(self, replaced: list[Branch], deleted: set[Sublayer]) -> LinearMaps:
        by_place: dict[int, list[Branch]] = {}
        for branch in replaced:
            by_place.setdefault(self.runs.place_of(branch.sublayer.path), []).append(branch)
        with ExitStack() as stack:
            if deleted:
                stack.enter_context(self._standing(deleted, {}))
            for place in track(sorted(by_place), "Fitting linear maps", len(by_place)):
                with lifted(self.transformer):
                    self.dense.advance(place)
                    if not self.maps and not self.dense.check(place):
                        self.dense.reuses = self.dropped.reuses = False
                    targets = self._read(self.dense, place, [*by_place[place], *self._deleted_at(place, deleted)])
                self.dropped.advance(place)
                for branch in by_place[place]:
                    self._fit(branch, place, targets, deleted)
                    stack.enter_context(self._standing({branch.sublayer}, self.maps))
        return self.maps

    def _standing(self, sublayers: set[Sublayer], maps: LinearMaps | dict[Sublayer, LinearMap]) -> Any:
        return standing_in(self.transformer, dict(stopped_by(self.anatomy.branches, sublayers, maps)))

    def _deleted_at(self, place: int, deleted: set[Sublayer]) -> list[Branch]:
        """The deleted sublayers of a block, which a map before them in the block can make up for."""
        return [
            branch
            for branch in self.anatomy.branches
            if branch.sublayer in deleted
            and branch.linear is not None
            and self.runs.place_of(branch.sublayer.path) == place
        ]

    def _read(self, stream: _Stream, place: int, branches: list[Branch]) -> list[dict[Sublayer, Reading]]:
        """The readings of some branches of a block, by batch."""
        found = []
        with self.readings.of(branches) as readings:
            for batch in self.batches:
                stream.run(batch, place)
                found.append(dict(readings))
        return found

    def _fit(self, branch: Branch, place: int, dense: list[dict[Sublayer, Reading]], deleted: set[Sublayer]) -> None:
        sublayer, where = branch.sublayer, branch.linear
        assert where is not None
        width = where.width
        device = dense[0][sublayer].x.device
        fitted, checking = (NormalEquations(width, width, device) for _ in range(2))
        sequences = 0
        with self.readings.of([branch]) as readings:
            for batch in self.batches:
                self.dropped.run(batch, place)
                now, then = readings[sublayer], dense[batch]
                target = _target(now, then, branch, where, self._deleted_at(place, deleted))
                sums = checking if sequences % _HELD_OUT == _HELD_OUT - 1 else fitted
                sequences += 1
                sums.add(now.h, target, _weights(then[sublayer], where.scale, now.counts))
        for sums in (fitted, checking):
            sums.reduce()
        checked = bool(checking.total > 0)
        trial = fitted_map(fitted, self.ridge, self.rank)
        judge = checking if checked else fitted
        self.maps.residual[sublayer] = judge.residual(_matrix(trial).to(judge.hh), trial.up.bias.to(judge.hh))
        final = fitted_map(fitted + checking, self.ridge, self.rank) if checked else trial
        like = weights_like(self.transformer.get_submodule(sublayer.path), self.transformer)
        self.maps[sublayer] = final.to(**like)


def _matrix(linear_map: LinearMap) -> Tensor:
    up = linear_map.up.weight.detach()
    return up if linear_map.down is None else up @ linear_map.down.weight.detach()


def _target(
    now: Reading, then: dict[Sublayer, Reading], branch: Branch, place: LinearPlace, deleted: list[Branch]
) -> Tensor:
    """What the map is to give: the way from the dropped X to the dense Y, and what later deleted sublayers gave."""
    own = then[branch.sublayer]
    gap = own.x.double() - now.x.double()
    for other in deleted:
        if other.linear is not None and branch.sublayer < other.sublayer and not _post_norm(other):
            gap = gap + other.linear.scale * then[other.sublayer].b.double()
    target: Tensor = own.b.double() + gap / place.scale
    return target


def _post_norm(branch: Branch) -> bool:
    """Whether a norm in the stream lies before or after the branch, so that branches do not just add up."""
    return branch.exit.key is None and branch.scale is None


def _weights(reading: Reading, scale: float, counts: Tensor) -> Tensor:
    """1 / |Y|^2 for tokens that count, and 0 for the others."""
    y = reading.x.double() + scale * reading.b.double()
    energy = y.square().sum(-1)
    return torch.where(counts & (energy > 0), 1 / energy, 0)
