"""Importance metrics as torchmetrics: running sums over many sublayers, synchronised across ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric

from layershed.arguments import check_number
from layershed.errors import CalibrationError, UnknownNameError
from layershed.importance.functional import angular, cosine_importance, relative_magnitude


class ImportanceMetric(Metric):
    """Mean importance per token of several residual branches.

    Keeps two numbers per branch, however many tokens it sees. A subclass says which function it averages.

    Args:
        num_branches: Number of branches that are measured side by side.
        kwargs: As of :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    function: ClassVar[Callable[..., Tensor]]
    total: Tensor
    tokens: Tensor

    def __init__(self, num_branches: int = 1, **kwargs: Any) -> None:
        check_number(num_branches, "num_branches", CalibrationError, whole=True)
        if num_branches < 0:
            raise CalibrationError(f"num_branches={num_branches}: it must not be negative.")
        super().__init__(**kwargs)
        # float64: millions of tokens of 1e-6 each would be lost in a float32 sum
        self.add_state("total", torch.zeros(num_branches, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros(num_branches, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x: Tensor, branch: Tensor, mask: Tensor | None = None, index: int = 0) -> None:
        """Add the tokens of one forward pass.

        Args:
            x: Input X of the sublayer, shape (..., hidden).
            branch: Its output b in Y = X + b, shape (..., hidden).
            mask: True where a token counts, with as many elements as there are tokens; None counts all.
            index: Which of the branches this is.
        """
        values = type(self).function(x, branch, reduction="none").to(self.total.device).double()
        if mask is None:
            self.total[index] += values.sum()
            self.tokens[index] += values.numel()
        else:
            counts = mask.to(values.device, torch.bool).reshape(values.shape)
            self.total[index] += torch.where(counts, values, torch.zeros_like(values)).sum()
            self.tokens[index] += counts.sum()

    def compute(self) -> Tensor:
        """Mean importance per branch, shape (num_branches,), or a scalar for one; NaN where no token was seen."""
        return self.total / self.tokens


class CosineImportance(ImportanceMetric):
    r"""Importance :math:`S = 1 - \cos(X, Y)` of arXiv 2406.15786.

    See :func:`~layershed.importance.functional.cosine_importance`.

    Example:
        >>> metric = CosineImportance()
        >>> metric.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 1.0]]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    function = staticmethod(cosine_importance)


class RelativeMagnitude(ImportanceMetric):
    r"""Relative magnitude :math:`|b| / |X|`; see :func:`~layershed.importance.functional.relative_magnitude`."""

    function = staticmethod(relative_magnitude)


class Angular(ImportanceMetric):
    r"""Angular distance :math:`\arccos(\cos(X, Y)) / \pi`; see :func:`~layershed.importance.functional.angular`."""

    function = staticmethod(angular)


METRICS: dict[str, type[ImportanceMetric]] = {
    "cosine": CosineImportance,
    "relative_magnitude": RelativeMagnitude,
    "angular": Angular,
}
"""Importance metrics by name; add your own subclass of :class:`ImportanceMetric` here."""

DamageMetric = Literal["kl", "loss"]
DAMAGE_METRICS: tuple[DamageMetric, ...] = get_args(DamageMetric)
"""Metrics that are measured on the model without a sublayer: see :func:`~layershed.importance.damage.leave_one_out`."""


def get_metric(name: str) -> type[ImportanceMetric]:
    """The importance metric of a name, measured while the model runs.

    Raises:
        UnknownNameError: If there is none; suggests the nearest name.
        CalibrationError: If it is a damage metric, which takes passes of its own.
    """
    check_metric(name)
    if name in DAMAGE_METRICS:
        raise CalibrationError(
            f"metric={name!r} takes forward passes without each sublayer, so it cannot be measured in the passes of a "
            f"training step. Choose one of {', '.join(METRICS)}, or calibrate_on='val' in SublayerDrop."
        )
    return METRICS[name]


def check_metric(name: str) -> None:
    """Refuse a name that is neither an importance metric nor a damage metric.

    Raises:
        UnknownNameError: If it is neither; suggests the nearest name.
    """
    if not isinstance(name, str) or name not in (*METRICS, *DAMAGE_METRICS):
        raise UnknownNameError("importance metric", name, (*METRICS, *DAMAGE_METRICS))
