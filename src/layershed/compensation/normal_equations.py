r"""Ridge regression from running sums: the best linear map from many tokens, in memory that does not grow with them.

For tokens with inputs h, targets t and weights w, all sums in float64,

.. math::

    (W, c) = \arg\min \sum w \, |W h + c - t|^2 + \lambda \, |W|^2, \qquad
    W^\top = (C_{hh} + \lambda I)^{-1} C_{ht}, \qquad c = \bar t - W \bar h,

with C the weighted covariances and lambda a share of the mean diagonal of C_hh. For rank r, W is replaced by
``P W``, where P projects on the r directions in which the fitted targets vary most (reduced-rank regression).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layershed.errors import CompensationError
from layershed.stand_ins.linear_map import LinearMap

DEFAULT_RIDGE = 1e-2


class NormalEquations:
    """The sums of a weighted linear regression.

    Args:
        inputs: Size of h.
        outputs: Size of t.
        device: Where the sums are kept.

    Attributes:
        total: Sum of the weights.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        # Apple's GPUs have no float64
        options: dict[str, Any] = {"device": device, "dtype": torch.float32 if device.type == "mps" else torch.float64}
        self.hh, self.ht = torch.zeros(inputs, inputs, **options), torch.zeros(inputs, outputs, **options)
        self.tt = torch.zeros(outputs, **options)
        self.h, self.t = torch.zeros(inputs, **options), torch.zeros(outputs, **options)
        self.total = torch.zeros((), **options)

    def add(self, h: Tensor, t: Tensor, weights: Tensor) -> None:
        """Add tokens.

        Args:
            h: Inputs, shape (tokens, inputs).
            t: Targets, shape (tokens, outputs).
            weights: Shape (tokens,); tokens of weight 0 do not count, whatever they hold.
        """
        weights = weights.to(self.hh)
        counts = (weights > 0).unsqueeze(-1)
        h, t = (torch.where(counts, values.to(self.hh), 0) for values in (h, t))
        weighted = h * weights.unsqueeze(-1)
        self.hh += weighted.mT @ h
        self.ht += weighted.mT @ t
        self.tt += (t * t * weights.unsqueeze(-1)).sum(0)
        self.h += weighted.sum(0)
        self.t += (t * weights.unsqueeze(-1)).sum(0)
        self.total += weights.sum()

    def __add__(self, other: NormalEquations) -> NormalEquations:
        """The sums over the tokens of both."""
        found = NormalEquations(self.ht.shape[0], self.ht.shape[1], self.hh.device)
        for name in vars(found):
            setattr(found, name, getattr(self, name) + getattr(other, name))
        return found

    def reduce(self) -> None:
        """Add up the sums of all ranks of a distributed run, in place."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for sums in vars(self).values():
                torch.distributed.all_reduce(sums)

    def solve(self, ridge: float = DEFAULT_RIDGE) -> tuple[Tensor, Tensor]:
        """The best map.

        Args:
            ridge: lambda as a share of the mean diagonal of C_hh.

        Returns:
            W, shape (outputs, inputs), and c, shape (outputs,), in float64.

        Raises:
            CompensationError: If no token counts, or a sum is not finite.
        """
        hh, ht, _ = self._covariances()
        if not (torch.isfinite(hh).all() and torch.isfinite(ht).all()):
            raise CompensationError("No linear map can be fitted: a hidden state is NaN or infinite. Check the model.")
        identity = torch.eye(len(hh), dtype=hh.dtype, device=hh.device)
        # a constant h gives a covariance of zero, and the best W is zero
        strength = (ridge * hh.diagonal().mean()).clamp(min=torch.finfo(hh.dtype).tiny ** 0.5)
        weight = torch.linalg.solve(hh + strength * identity, ht).mT
        return weight, (self.t - weight @ self.h) / self.total

    def change(self, ridge: float) -> Tensor:
        """The best W without c: a change of a matrix whose bias stays, shape (outputs, inputs)."""
        hh, ht = self.hh / self.total, self.ht / self.total
        strength = (ridge * hh.diagonal().mean()).clamp(min=torch.finfo(hh.dtype).tiny ** 0.5)
        identity = torch.eye(len(hh), dtype=hh.dtype, device=hh.device)
        found: Tensor = torch.linalg.solve(hh + strength * identity, ht).mT
        return found

    def missed(self, weight: Tensor) -> float:
        """Mean of ``|W h - t|^2`` per weight."""
        error = self.tt.sum() - 2 * (weight * self.ht.mT).sum() + (weight @ self.hh * weight).sum()
        return float(error.clamp(min=0) / self.total)

    def factors(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """W of a lower rank, as ``U V`` with U of shape (outputs, rank) and V of shape (rank, inputs).

        The best one for the fitted targets W h: U holds the leading eigenvectors of their covariance.
        """
        hh, _, _ = self._covariances()
        fitted = weight @ hh @ weight.mT
        leading = torch.linalg.eigh(fitted).eigenvectors[:, -rank:].flip(-1)
        return leading, leading.mT @ weight

    def offset(self, weight: Tensor) -> Tensor:
        """The best c for a given W."""
        return (self.t - weight @ self.h) / self.total

    def residual(self, weight: Tensor, bias: Tensor) -> float:
        """Share of the targets' energy about their mean that a map misses, at least 0; 0 if they are constant."""
        hh, ht, tt = self._covariances()
        energy = tt.sum()
        missed = energy - 2 * (weight * ht.mT).sum() + (weight @ hh * weight).sum()
        shift = self.t / self.total - weight @ (self.h / self.total) - bias
        missed = (missed + shift @ shift).clamp(min=0)
        return 0.0 if energy <= 0 else float(missed / energy)

    def _covariances(self) -> tuple[Tensor, Tensor, Tensor]:
        """C_hh, C_ht and the diagonal of C_tt, divided by the sum of the weights.

        Raises:
            CompensationError: If no token counts.
        """
        if not self.total > 0:
            raise CompensationError("No token was seen in the batches, so no linear map can be fitted. Check the data.")
        h, t = self.h / self.total, self.t / self.total
        return (
            self.hh / self.total - torch.outer(h, h),
            self.ht / self.total - torch.outer(h, t),
            self.tt / self.total - t * t,
        )


def fitted_map(sums: NormalEquations, ridge: float, rank: int | None) -> LinearMap:
    """The map that the sums give, in float32."""
    weight, bias = sums.solve(ridge)
    if rank is None or rank >= min(weight.shape):
        return LinearMap.of(weight.float(), bias.float())
    up, down = sums.factors(weight, rank)
    return LinearMap.of_factors(up.float(), down.float(), sums.offset(up @ down).float())
