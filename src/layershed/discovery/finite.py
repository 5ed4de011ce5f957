"""Refusing weights with NaN or infinite values, which make every comparison of a proof fail."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from layershed.discovery.branch_kinds import is_symbolic
from layershed.errors import UnprovenStructureError


def refuse_not_finite(transformer: nn.Module, streams: Iterable[Tensor]) -> None:
    """Refuse numbers that compare with nothing: what was left alone, or was not, may be so for no other reason."""
    if all(is_symbolic(stream) or _is_finite(stream) for stream in streams):
        return
    weights = transformer.named_parameters()
    found = [name for name, weight in weights if weight.is_floating_point() and not _is_finite(weight)]
    if not found:
        raise UnprovenStructureError(
            f"{type(transformer).__name__} gives NaN or infinite values, and its parameters hold none; load it in a "
            "wider precision (bfloat16, float32), or look at its buffers."
        )
    more = f" and {len(found) - 1} more" if found[1:] else ""
    raise UnprovenStructureError(
        f"The weights of {type(transformer).__name__} hold NaN or infinite values, in {found[0]}{more}; load some that "
        "are finite, such as a checkpoint from before its loss became NaN."
    )


def _is_finite(values: Tensor) -> bool:
    if str(values.dtype).startswith("torch.float4"):  # has no other numbers, and an older torch does not have it
        return True
    # of 8 bits torch tells it only for some formats; bfloat16 has the range of all of them
    return bool((values.bfloat16() if values.dtype.itemsize == 1 else values).isfinite().all())
