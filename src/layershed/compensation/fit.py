"""Fits linear maps to sublayers in closed form, from one pass of the dense model. No weight changes.

The map of a sublayer reads h, the output of its own norm, and aims at what it adds to the stream:

    W h + c  ~  b

Tokens count by 1 / |Y|^2, because the norms that read the stream divide by its length: what counts is the error
relative to the stream. Relative: Neural Block Linearization (arXiv 2505.21077), which replaces attention and keeps activations
on disk; here sums of ``2 width**2`` numbers are kept for each map.

Maps fitted to the stream of the dropped model, so that each makes up for what was lost before it, were tried and gave a
higher loss on text that they were not fitted to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
from layershed.importance.taps import body_of
from layershed.planning.plan import DropPlan, Sublayer
from layershed.progress import least, track
from layershed.stand_ins.carried import weights_like
from layershed.stand_ins.contexts import lifted
from layershed.stand_ins.linear_map import LinearMap
from layershed.surgery import bypassed_sublayers

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
    max_batches: int | None = None,
    name: str | None = None,
) -> LinearMaps:
    """Fit a linear map ``b = W norm(X) + c`` to each of some sublayers, for :func:`bypass`. The model is not changed.

    One pass of the dense model over the batches, also if some of its sublayers are bypassed.

    Args:
        model: A transformer, or a module that holds one.
        batches: As of :func:`estimate_importance`: mixed text, some 20 tokens for each channel of the model or more. In
            a distributed run the sums are those of all ranks.
        sublayers: A drop plan or sublayers. Of a plan with actions, those with the action ``linear`` get maps; a map
            also makes up for the sublayers with the action ``bypass`` that come after it in its block. So an attention
            with a map, and its MLP bypassed, are a map in place of the whole block.
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
    fits = _fits(sublayers, anatomy)
    readings, body, ids = Readings(transformer, anatomy), body_of(transformer), TokenIdRange(transformer)
    read = {branch.sublayer: branch for fit in fits for branch in (fit.branch, *fit.beside)}
    with evaluating(transformer), torch.no_grad(), lifted(transformer), readings.of(read.values()) as found:
        for number, batch in enumerate(
            track(iterate(batches, max_batches), "Fitting linear maps", least(batches, max_batches))
        ):
            body(**model_inputs(batch, transformer, ids))
            for fit in fits:
                fit.add(found, held_out=number % _HELD_OUT == _HELD_OUT - 1)
    ids.read()
    maps = LinearMaps()
    for fit in track(fits, "Solving linear maps", len(fits)):
        maps[fit.sublayer], maps.residual[fit.sublayer] = fit.solve(ridge, rank, transformer)
    return maps


def mappable(model: nn.Module, *, name: str | None = None) -> tuple[Sublayer, ...]:
    """The sublayers that still run and that a linear map can replace, in forward order."""
    transformer = find_transformer(model, name=name)
    gone = set(bypassed_sublayers(transformer))
    branches = dissect(transformer).branches
    return tuple(b.sublayer for b in branches if b.linear is not None and b.sublayer not in gone)


def check_mappable(sublayers: Iterable[Sublayer], anatomy: Anatomy) -> None:
    """Refuse sublayers that no linear map can replace.

    Raises:
        CompensationError: If there is one.
    """
    known = {branch.sublayer: branch for branch in anatomy.branches}
    for sublayer in sorted(sublayers):
        if sublayer not in known:
            raise CompensationError(f"There is no sublayer {sublayer.name} with weights in the model, so none to fit.")
        if known[sublayer].linear is None:
            raise CompensationError(
                f"{sublayer.name} cannot be replaced by a linear map: no place was proven where a map of its norm's "
                "output gives what it adds to the stream. Drop it without a map."
            )


class _Fit:
    """The sums for one map.

    Args:
        branch: The sublayer that it replaces.
        beside: Sublayers after it in its block that it makes up for.
    """

    def __init__(self, branch: Branch, beside: list[Branch]) -> None:
        assert branch.linear is not None
        self.branch, self.beside, self.sublayer = branch, beside, branch.sublayer
        self._place: LinearPlace = branch.linear
        self._sums: dict[bool, NormalEquations] = {}

    def add(self, found: Mapping[Sublayer, Reading], *, held_out: bool) -> None:
        """Add one pass; a sublayer that did not run in it adds nothing."""
        own = found.get(self.sublayer)
        if own is None:
            return
        target = own.b
        for branch in self.beside:
            if branch.linear is not None and branch.sublayer in found:
                target = target + branch.linear.scale / self._place.scale * found[branch.sublayer].b
        if held_out not in self._sums:
            self._sums[held_out] = NormalEquations(self._place.width, self._place.width, own.x.device)
        y = own.x.float() + self._place.scale * own.b.float()
        self._sums[held_out].add(own.h, target, _weights(y, own.counts))

    def solve(self, ridge: float, rank: int | None, transformer: nn.Module) -> tuple[LinearMap, float]:
        """The map, and the share of the energy that it misses."""
        if False not in self._sums:
            raise CompensationError(f"No linear map can be fitted to {self.sublayer.name}: it ran in no batch.")
        fitted = self._sums[False]
        checking = self._sums.setdefault(True, NormalEquations(*fitted.ht.shape, device=fitted.hh.device))
        for sums in (fitted, checking):
            sums.reduce()
        found, judge = fitted_map(fitted, ridge, rank), fitted
        if checking.total > 0:
            judge = checking
        missed = judge.residual(_matrix(found).to(judge.hh), found.up.bias.detach().to(judge.hh))
        if judge is checking:
            found = fitted_map(fitted + checking, ridge, rank)
        return found.to(**weights_like(transformer.get_submodule(self.sublayer.path), transformer)), missed


def _fits(sublayers: Iterable[Sublayer], anatomy: Anatomy) -> list[_Fit]:
    wanted = set(sublayers)
    linear = {d.sublayer for d in sublayers.drops if d.action == "linear"} if isinstance(sublayers, DropPlan) else set()
    replaced = linear or wanted
    if not replaced:
        raise CompensationError("fit_linear_maps: no sublayer was given. Give a drop plan, or at least one sublayer.")
    check_mappable(replaced, anatomy)
    chosen = [branch for branch in anatomy.branches if branch.sublayer in wanted]
    return [_Fit(b, _made_up_for(b, chosen, replaced)) for b in chosen if b.sublayer in replaced]


def _made_up_for(branch: Branch, chosen: list[Branch], replaced: set[Sublayer]) -> list[Branch]:
    """The bypassed sublayers after a map in its block, up to the next map; only where branches just add up."""
    found: list[Branch] = []
    for other in chosen:
        if other.sublayer.block != branch.sublayer.block or other.sublayer <= branch.sublayer:
            continue
        if other.sublayer in replaced or other.linear is None or other.linear.in_post_norm:
            break
        found.append(other)
    return [] if branch.linear is None or branch.linear.in_post_norm else found


def _matrix(linear_map: LinearMap) -> Tensor:
    up = linear_map.up.weight.detach()
    return up if linear_map.down is None else up @ linear_map.down.weight.detach()


def _weights(y: Tensor, counts: Tensor) -> Tensor:
    """1 / |Y|^2 for tokens that count, and 0 for the others."""
    energy = y.double().square().sum(-1) if y.device.type != "mps" else y.square().sum(-1)
    return torch.where(counts & (energy > 0), 1 / energy, 0)
