"""Reading padding from an attention mask of any shape.

A mask of two dimensions says which tokens are padding. A mask of three or four says which query attends to which key;
there a token is padding if no other token attends to it where it could.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from layershed.errors import CalibrationError

# of an additive mask: biases by position stay above it, and what blocks a key is -1e4, the smallest float or -inf
_BLOCKED = -9e3


class UnreadableMasks:
    """What makes masks on an accelerator unreadable, read once: the host would wait for the device at every mask."""

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}

    def raise_or_note(self, unclear: Tensor, reason: str) -> Tensor | None:
        """Raise at once for a mask of the CPU, else note it.

        Args:
            unclear: Whether the mask cannot be read, a scalar.
            reason: Why not.

        Returns:
            The scalar, if it was noted.

        Raises:
            CalibrationError: If it is true and on the CPU.
        """
        if unclear.device.type == "cpu":
            if bool(unclear):
                raise CalibrationError(reason)
            return None
        known = self._found.get(reason)
        self._found[reason] = unclear if known is None else known.to(unclear.device) | unclear
        return unclear

    def read(self) -> CalibrationError | None:
        """Wait for the device, forget the reasons, and return the first one that came true."""
        found, self._found = self._found, {}
        if not found:
            return None
        home = next(iter(found.values())).device
        true = torch.stack([flag.to(home) for flag in found.values()]).tolist()
        return next((CalibrationError(reason) for reason, flag in zip(found, true, strict=True) if flag), None)


def tokens_that_count(mask: Any, unreadable: UnreadableMasks | None = None) -> Tensor | None:
    """The tokens that are not padding.

    - Two dimensions: true, or above 0, where a token counts; or, with negative values, additive.
    - Four dimensions, or three without heads: boolean, or integers of 0 and 1, where a query attends to a key; or
      floats that are added to the attention's logits.
    - A key that no query attends to is padding. Queries that attend to every key, although others do not, are left
      out: a padded query attends to all keys to keep its softmax finite.
    - Where every key is attended to, tokens at either end that attend to themselves alone are padding.
    - Packed sequences are not padding.

    Args:
        mask: Shape (batch, keys), (batch, queries, keys) or (batch, heads, queries, keys); or such masks by the type of
            the layers.
        unreadable: Where to note what makes a mask on an accelerator unreadable; None raises at once.

    Returns:
        Shape (batch, keys), true where a token counts; None if there is no mask. No token of an unreadable mask counts.

    Raises:
        CalibrationError: If the mask does not say what is padding.
    """
    if isinstance(mask, Mapping):
        mask = mask["full_attention"] if "full_attention" in mask else next(iter(mask.values()), None)
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim not in (2, 3, 4):
        what = f"a tensor of {mask.ndim} dimensions" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise CalibrationError(f"Cannot read padding from the attention mask: it is {what}. {_ADVICE}")
    if mask.ndim == 2:
        return _of_tokens(mask)
    later = UnreadableMasks() if unreadable is None else unreadable
    attends = _of_pairs(mask, later)
    counts = _attended(attends.any(1) if attends.ndim == 4 else attends, later)
    if unreadable is None and (error := later.read()) is not None:
        raise error
    return counts


def tokens_with_a_place(position_ids: Any) -> Tensor | None:
    """The tokens that are not padding, by the positions of packed sequences without an attention mask.

    Positions begin again at 0 with each sequence. The zeros at the end of a row are padding, unless the row holds no
    other number: a sequence of one token predicts nothing.

    Args:
        position_ids: Shape (batch, tokens); anything else says nothing.

    Returns:
        Shape (batch, tokens), true where a token counts; None if the positions say nothing.
    """
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 2:
        return None
    zeros_at_the_end = (position_ids == 0).flip(-1).cumprod(-1).flip(-1).bool()
    return ~zeros_at_the_end | zeros_at_the_end.all(-1, keepdim=True)


_ADVICE = "Pass a mask of shape (batch, tokens), or batches without padding."


def _of_tokens(mask: Tensor) -> Tensor:
    """Which tokens a mask of shape (batch, keys) lets count."""
    if mask.dtype == torch.bool or not mask.numel():
        return mask.bool()
    additive = (mask.min() < 0) | (mask.max() > 1)
    return torch.where(additive, mask > _BLOCKED, mask != 0)


def _of_pairs(mask: Tensor, unreadable: UnreadableMasks) -> Tensor:
    """Which query attends to which key, by a mask of at least three dimensions."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        return torch.where(mask.min() < 0, mask > _BLOCKED, mask != 0)
    unclear = unreadable.raise_or_note(
        (mask.min() == 0) & (mask.max() == 1),
        "Cannot read padding from the attention mask: it holds floats of 0 and 1, which may be added to the "
        f"attention's logits or not. Pass it as booleans. {_ADVICE}",
    )
    return mask > _BLOCKED if unclear is None else (mask > _BLOCKED) & ~unclear


def _attended(attends: Tensor, unreadable: UnreadableMasks) -> Tensor:
    """The keys that count.

    Args:
        attends: Shape (batch, queries, keys), true where a query attends to a key.
        unreadable: As in :func:`tokens_that_count`.

    Returns:
        Shape (batch, keys).
    """
    queries, keys = attends.shape[1:]
    everything = attends.all(-1)  # (batch, queries)
    void = everything & ~everything.all(-1, keepdim=True)
    if queries > 1:  # in a causal mask, the last one attends to all keys, and that before it to all but one
        void[:, -1] &= void[:, -2] | ~attends[:, -2, :-1].all(-1)
    attends = attends & ~void.unsqueeze(-1)
    attended = attends.any(1)
    return attended if queries != keys else attended & ~_alone(attends, attended, unreadable)


def _alone(attends: Tensor, attended: Tensor, unreadable: UnreadableMasks) -> Tensor:
    """The tokens, shape (batch, keys), that attend to themselves only so that their softmax is finite.

    Raises:
        CalibrationError: If several tokens in a row are attended by themselves alone, but attend to the same others.
    """
    keys = attends.shape[-1]
    others = attends & ~torch.eye(keys, dtype=torch.bool, device=attends.device)  # (batch, queries, keys)
    attending = others.any(2)
    unseen = attended & ~others.any(1)
    same = (others[:, 1:] == others[:, :-1]).all(-1)  # (batch, keys - 1): a token and the one before it
    unclear = unreadable.raise_or_note(
        (same & attending[:, 1:] & unseen[:, 1:] & unseen[:, :-1]).any(),
        "Cannot read padding from the attention mask: several tokens in a row attend to the same tokens, and only to "
        f"themselves beside these. They may be padding or sequences that share a beginning. {_ADVICE}",
    )
    alone = unseen & ~attending
    # not if the mask blocks padding, and not if all tokens are alone
    alone = alone & attended.all(-1, keepdim=True) & ~alone.all(-1, keepdim=True)
    # a sequence of one token, among other packed ones, looks like a single padded token
    near = torch.diagonal(others, 1, 1, 2) | torch.diagonal(others, -1, 1, 2)  # (batch, keys - 1)
    packed = (~near & attended[:, 1:] & attended[:, :-1] & ~alone[:, 1:] & ~alone[:, :-1]).any(-1, keepdim=True)
    ends = _at_an_end(alone, packed) | _at_an_end(alone.flip(-1), packed).flip(-1)
    return ends if unclear is None else ends | unclear


def _at_an_end(alone: Tensor, packed: Tensor) -> Tensor:
    """The first tokens of each row that are alone, unless it is a single one in a row of packed sequences."""
    first = alone.cumprod(-1).bool()
    return first & ~(packed & (first.sum(-1, keepdim=True) == 1))
