r"""Importance of a residual branch, as plain functions of its input and its output.

A sublayer computes :math:`Y = X + b` with :math:`b = f(\mathrm{norm}(X))`. Every function takes X and b, rather than
X and Y, because Y has already rounded away the small b that decides the ranking. Low means redundant.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "none"]


def cosine_importance(x: Tensor, branch: Tensor, mask: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    r"""Importance :math:`S = 1 - \cos(X, X + b)`, averaged over tokens.

    From arXiv 2406.15786, equation 2. Computed as :math:`\frac{|X|^2|b|^2 - (X \cdot b)^2}{|X||Y|(|X||Y| + X \cdot Y)}`
    (Lagrange's identity), which keeps its digits near cos = 1, where ``1 - cosine_similarity`` in float32 loses them.

    Args:
        x: Input of the sublayer, before its norm, shape (..., hidden).
        branch: Output b of the sublayer, before the residual add, shape (..., hidden).
        mask: True where a token counts, shape (...); None counts all.
        reduction: ``"mean"`` over the tokens, or ``"none"``.

    Returns:
        A value in [0, 2]: a scalar, or of shape (...) without reduction. 1 where X or Y is zero.

    Example:
        >>> cosine_importance(torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 1.0]]))
        tensor(1.)
    """
    xx, xb, bb = _dots(x, branch)
    yy = (xx + 2 * xb + bb).clamp_min(0)
    norms, xy = xx.sqrt() * yy.sqrt(), xx + xb
    # |b|^2 less the part of it along X: what turns X
    turning = (bb - xb * (xb / xx)).clamp_min(0)
    small = turning * (xx / (norms * (norms + xy)))
    values = torch.where(xy > 0, small, 1 - xy / norms)
    return _reduce(torch.where(norms > 0, values, torch.ones_like(values)), mask, reduction)


def relative_magnitude(x: Tensor, branch: Tensor, mask: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    r"""Relative magnitude :math:`|b| / |X|`, averaged over tokens.

    A baseline of arXiv 2406.15786 (appendix on importance metrics), there attributed to Samragh et al. 2023. Shapes and
    arguments as in :func:`cosine_importance`; infinite where X is zero and b is not.

    Example:
        >>> relative_magnitude(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor(0.5000)
    """
    xx, _, bb = _dots(x, branch)
    values = torch.where(bb > 0, (bb / xx).sqrt(), torch.zeros_like(bb))
    return _reduce(values, mask, reduction)


def angular(x: Tensor, branch: Tensor, mask: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    r"""Angular distance :math:`\arccos(\cos(X, X + b)) / \pi`, averaged over tokens.

    From Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887), equation 3, here of
    one sublayer. Computed with ``atan2``, which keeps its digits near 0. Shapes and arguments as in
    :func:`cosine_importance`; a value in [0, 1], and 0.5 where X or Y is zero.

    Example:
        >>> angular(torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 1.0]]))
        tensor(0.5000)
    """
    xx, xb, bb = _dots(x, branch)
    turning = (bb - xb * (xb / xx)).clamp_min(0)
    values = torch.atan2((turning * xx).sqrt(), xx + xb) / math.pi
    undefined = (xx <= 0) | (xx + 2 * xb + bb <= 0)
    return _reduce(torch.where(undefined, torch.full_like(values, 0.5), values), mask, reduction)


def _dots(x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """X·X, X·b and b·b per token, in float32 or better: autocast would otherwise run vecdot in half precision."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, branch.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        x, branch = x.to(dtype), branch.to(dtype)
        return torch.linalg.vecdot(x, x), torch.linalg.vecdot(x, branch), torch.linalg.vecdot(branch, branch)


def _reduce(values: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return values
    if mask is None:
        return values.mean()
    mask = mask.to(torch.bool)
    # where, not multiplication: a padded token may hold a NaN
    return torch.where(mask, values, torch.zeros_like(values)).sum() / mask.sum()
