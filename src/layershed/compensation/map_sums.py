"""The sums from which the linear map of one sublayer is solved."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from layershed.compensation.normal_equations import NormalEquations, fitted_map
from layershed.compensation.readings import Reading
from layershed.discovery.branches import Branch, LinearPlace
from layershed.errors import CompensationError
from layershed.planning.plan import Sublayer
from layershed.stand_ins.linear_map import LinearMap


class MapSums:
    """The sums for one map.

    Args:
        branch: The sublayer that it replaces.
        beside: Bypassed sublayers after it in its block that it makes up for.
    """

    def __init__(self, branch: Branch, beside: Iterable[Branch]) -> None:
        assert branch.linear is not None
        self.branch, self.beside = branch, tuple(beside)
        self._place: LinearPlace = branch.linear
        self._sums: dict[bool, NormalEquations] = {}

    def add(
        self, dense: Mapping[Sublayer, Reading], dropped: Mapping[Sublayer, Reading] | None, *, held_out: bool
    ) -> None:
        """Add one batch; a sublayer that did not run in it adds nothing.

        Args:
            dense: Readings of the dense model.
            dropped: Readings of h in the dropped model; None to fit to the h of the dense one.
            held_out: Whether the batch checks the map before the map is fitted to it.
        """
        own = dense.get(self.branch.sublayer)
        source = own if dropped is None else dropped.get(self.branch.sublayer)
        if own is None or source is None:
            return
        x, target = own.x, own.b
        assert x is not None
        assert target is not None
        y = x.float() + self._place.scale * target.float()
        for branch in self.beside:
            other = dense.get(branch.sublayer)
            if branch.linear is not None and other is not None and other.b is not None:
                target = target + branch.linear.scale / self._place.scale * other.b
        if held_out not in self._sums:
            self._sums[held_out] = NormalEquations(self._place.width, self._place.width, x.device)
        self._sums[held_out].add(source.h, target, _weights(y, own.counts))

    def solve(self, ridge: float, rank: int | None, device: torch.device) -> tuple[LinearMap, float]:
        """The map, in float32, and the share of the energy of its targets that it misses.

        Args:
            ridge: As of :func:`fit_linear_maps`.
            rank: As of :func:`fit_linear_maps`.
            device: Where the model is.

        Raises:
            CompensationError: If the sublayer ran in no batch.
        """
        width = self._place.width
        fitted, checking = (
            self._sums.setdefault(held_out, NormalEquations(width, width, device)) for held_out in (False, True)
        )
        for sums in (fitted, checking):
            sums.reduce()  # on every rank, also where the sublayer did not run
        if not fitted.total > 0:
            raise CompensationError(
                f"No linear map can be fitted to {self.branch.sublayer.name}: it ran in no batch, or every token is "
                "padding. Check the data."
            )
        found = fitted_map(fitted, ridge, rank)
        judge = checking if checking.total > 0 else fitted
        missed = judge.residual(_matrix(found).to(judge.hh), found.up.bias.detach().to(judge.hh))
        return (found if judge is fitted else fitted_map(fitted + checking, ridge, rank)), missed


def sums_for(
    branches: Iterable[Branch], replaced: Collection[Sublayer], dropped: Collection[Sublayer]
) -> list[MapSums]:
    """Empty sums for every sublayer that gets a map.

    Args:
        branches: The model's sublayers, in forward order.
        replaced: Those that get a map.
        dropped: Those, and all that are bypassed.
    """
    chosen = [branch for branch in branches if branch.sublayer in dropped]
    return [MapSums(b, _made_up_for(b, chosen, replaced)) for b in chosen if b.sublayer in replaced]


def _made_up_for(branch: Branch, chosen: list[Branch], replaced: Collection[Sublayer]) -> list[Branch]:
    """The bypassed sublayers after a map in its block, up to the next map; only where branches just add up."""
    found: list[Branch] = []
    later = (b for b in chosen if b.sublayer.block == branch.sublayer.block and b.sublayer > branch.sublayer)
    for other in later:
        if other.sublayer in replaced or other.linear is None or other.linear.in_post_norm:
            break
        found.append(other)
    return [] if branch.linear is None or branch.linear.in_post_norm else found


def _matrix(linear_map: LinearMap) -> Tensor:
    up = linear_map.up.weight.detach()
    return up if linear_map.down is None else up @ linear_map.down.weight.detach()


def _weights(y: Tensor, counts: Tensor) -> Tensor:
    """1 / |Y|^2 for tokens that count, and 0 for the others."""
    energy = y.square().sum(-1)
    return torch.where(counts & (energy > 0), 1 / energy, 0)
