"""The linear map that runs in place of a sublayer, as a module with parameters. It imports torch alone.

The text of this file is copied into folders that load without layershed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class LinearMap(nn.Module):
    """``b = W h + c``: what a sublayer adds to the residual stream, from the output h of its own norm.

    With a rank, W is a product of two matrices, ``W = U V``, which costs ``2 rank width`` numbers instead of
    ``width**2``. Neural Block Linearization (arXiv 2505.21077) replaces attention in this way.

    Args:
        width: Size of h and of b.
        rank: Rank of W; None for a full matrix.
        factory: ``device`` and ``dtype`` of the parameters.

    Shapes:
        h: (..., width). The result has the same shape.

    Example:
        >>> import torch
        >>> LinearMap(4, rank=1)(torch.zeros(2, 3, 4)).shape
        torch.Size([2, 3, 4])
    """

    def __init__(self, width: int, rank: int | None = None, **factory: Any) -> None:
        super().__init__()
        self.width, self.rank = width, rank
        self.down = None if rank is None else nn.Linear(width, rank, bias=False, **factory)
        self.up = nn.Linear(width if rank is None else rank, width, **factory)

    def forward(self, h: Tensor) -> Tensor:
        """Return ``W h + c``."""
        result: Tensor = self.up(h if self.down is None else self.down(h))
        return result

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor) -> LinearMap:
        """The map with a full matrix.

        Args:
            weight: W, shape (width, width).
            bias: c, shape (width,).
        """
        return cls._filled(None, weight, bias)

    @classmethod
    def of_factors(cls, up: Tensor, down: Tensor, bias: Tensor) -> LinearMap:
        """The map with ``W = up @ down``.

        Args:
            up: U, shape (width, rank).
            down: V, shape (rank, width).
            bias: c, shape (width,).
        """
        return cls._filled(down, up, bias)

    @classmethod
    def _filled(cls, down: Tensor | None, up: Tensor, bias: Tensor) -> LinearMap:
        found = cls(up.shape[0], None if down is None else down.shape[0], device="meta", dtype=up.dtype)
        found.up.weight, found.up.bias = _parameter(up), _parameter(bias)
        if down is not None and found.down is not None:
            found.down.weight = _parameter(down)
        return found

    def extra_repr(self) -> str:
        """Its size."""
        return f"width={self.width}" if self.rank is None else f"width={self.width}, rank={self.rank}"


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().contiguous())
