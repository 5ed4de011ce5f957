r"""Importance of a residual branch, as plain functions of its input and its output.

A sublayer computes :math:`Y = X + b` with :math:`b = f(\mathrm{norm}(X))`. Every function takes X and b, rather than
X and Y, because Y has already rounded away the small b that decides the ranking. Low means redundant.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from layershed.arguments import check_kind
from layershed.errors import CalibrationError, UnknownNameError

Reduction = Literal["mean", "none"]


def cosine_importance(x: Tensor, branch: Tensor, mask: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    r"""Importance :math:`S = 1 - \cos(X, X + b)`, averaged over tokens.

    The importance score of arXiv 2406.15786. With Y split into its part along X, :math:`y_\parallel`, and the part
    across, :math:`y_\perp`, which b alone contributes, it is computed as
    :math:`y_\perp^2 / (|Y|(|Y| + y_\parallel))`: that keeps its digits near cos = 1, where
    ``1 - cosine_similarity`` in float32 loses them.

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
    x_norm, along, turning = _parts(x, branch)
    y_along = x_norm + along
    y_norm = torch.hypot(y_along, turning)
    # 1 - cos = |Y|(|Y| - Y along X) / |Y|^2, and |Y|^2 - (Y along X)^2 is what turns
    small = turning * turning / (y_norm * (y_norm + y_along))
    values = torch.where(y_along > 0, small, 1 - y_along / y_norm)
    return _reduce(torch.where(_no_angle(x_norm, y_norm), torch.ones_like(values), values), mask, reduction)


def relative_magnitude(x: Tensor, branch: Tensor, mask: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    r"""Relative magnitude :math:`|b| / |X|`, averaged over tokens.

    A baseline that arXiv 2406.15786 compares with. Shapes and arguments as in :func:`cosine_importance`; infinite where
    X is zero and b is not.

    Example:
        >>> relative_magnitude(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor(0.5000)
    """
    x_norm, along, turning = _parts(x, branch)
    magnitude = torch.hypot(along, turning)
    values = torch.where(magnitude == 0, torch.zeros_like(magnitude), magnitude / x_norm)
    return _reduce(values, mask, reduction)


def angular(x: Tensor, branch: Tensor, mask: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    r"""Angular distance :math:`\arccos(\cos(X, X + b)) / \pi`, averaged over tokens.

    The distance of Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv 2403.17887), here of
    one sublayer. Computed with ``atan2``, which keeps its digits near 0. Shapes and arguments as in
    :func:`cosine_importance`; a value in [0, 1], and 0.5 where X or Y is zero.

    Example:
        >>> angular(torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 1.0]]))
        tensor(0.5000)
    """
    x_norm, along, turning = _parts(x, branch)
    y_along = x_norm + along
    values = torch.atan2(turning, y_along) / math.pi
    undefined = _no_angle(x_norm, torch.hypot(y_along, turning))
    return _reduce(torch.where(undefined, torch.full_like(values, 0.5), values), mask, reduction)


def _parts(x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Per token: :math:`|X|`, the part of b along X (signed) and the length of the part across, which turns X.

    In float32 or better: autocast would otherwise run the product in half precision. The part across is subtracted
    as a vector, since the difference of squares has no digits left where b is parallel to X.
    """
    check_kind(x, Tensor, "x", CalibrationError)
    check_kind(branch, Tensor, "branch", CalibrationError)
    if x.shape != branch.shape:
        raise CalibrationError(
            f"x has the shape {tuple(x.shape)} and branch {tuple(branch.shape)}: both must be equal."
        )
    dtype = torch.promote_types(torch.promote_types(x.dtype, branch.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        x, branch = x.to(dtype), branch.to(dtype)
        x_norm = torch.linalg.vector_norm(x, dim=-1)
        divisor = torch.where(x_norm == 0, torch.ones_like(x_norm), x_norm)
        along = torch.linalg.vecdot(x, branch) / divisor
        across = torch.addcmul(branch, (along / divisor).unsqueeze(-1), x, value=-1)
        return x_norm, along, torch.linalg.vector_norm(across, dim=-1)


def _no_angle(x_norm: Tensor, y_norm: Tensor) -> Tensor:
    """Where X is zero, or Y is, to the rounding of the addition that made it. False for a NaN, which must show."""
    return (x_norm == 0) | (y_norm <= 4 * torch.finfo(x_norm.dtype).eps * x_norm)


def _reduce(values: Tensor, mask: Tensor | None, reduction: Reduction) -> Tensor:
    if reduction not in get_args(Reduction):
        raise UnknownNameError("reduction", reduction, get_args(Reduction))
    if reduction == "none":
        return values
    if mask is None:
        return values.mean()
    check_kind(mask, Tensor, "mask", CalibrationError)
    if mask.shape != values.shape:
        raise CalibrationError(
            f"mask has the shape {tuple(mask.shape)}, but there is one value for each of {tuple(values.shape)} tokens. "
            "Give a mask of this shape."
        )
    if mask.dtype != torch.bool and bool((mask < 0).any()):
        raise CalibrationError("mask holds negative numbers, as an additive mask does. Give true where a token counts.")
    mask = mask.to(torch.bool)
    # where, not multiplication: a padded token may hold a NaN
    return torch.where(mask, values, torch.zeros_like(values)).sum() / mask.sum()
