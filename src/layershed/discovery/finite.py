"""Refusing weights with NaN or infinite values, which make every comparison of a proof fail."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from layershed.discovery.branch_kinds import is_symbolic
from layershed.errors import UnprovenStructureError


def refuse_not_finite(transformer: nn.Module, streams: Iterable[Tensor]) -> None:
    """Refuse streams with NaN or infinite values: with them the trials of a proof have arbitrary results.

    Args:
        transformer: The model.
        streams: The outputs of its blocks.

    Raises:
        UnprovenStructureError: If a stream holds such values; names the first parameter that does.
    """
    if all(is_symbolic(stream) or _is_finite(stream) for stream in streams):
        return
    weights = [(name, weight) for name, weight in transformer.named_parameters() if weight.is_floating_point()]
    found = [name for name, weight in weights if not weight.is_meta and not _is_finite(weight)]
    if not found and any(weight.is_meta for _, weight in weights):
        raise UnprovenStructureError(
            f"{type(transformer).__name__} gives NaN or infinite values. Its weights are offloaded, so that the "
            "parameter that holds them is unknown. Load finite weights, or call find_sublayers before the offload."
        )
    if not found:
        raise UnprovenStructureError(
            f"{type(transformer).__name__} gives NaN or infinite values, though its parameters hold none. Load it in a "
            "wider precision (bfloat16, float32), or check its buffers."
        )
    more = f" and {len(found) - 1} more" if found[1:] else ""
    raise UnprovenStructureError(
        f"The weights of {type(transformer).__name__} hold NaN or infinite values, in {found[0]}{more}. Load finite "
        "weights, such as a checkpoint from before the loss became NaN."
    )


def _is_finite(values: Tensor) -> bool:
    if str(values.dtype).startswith("torch.float4"):  # all its values are finite; older torch lacks this dtype
        return True
    # torch's isfinite takes only some 8-bit formats; bfloat16 has the range of all of them
    return bool((values.bfloat16() if values.dtype.itemsize == 1 else values).isfinite().all())
