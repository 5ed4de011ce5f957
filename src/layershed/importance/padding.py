"""Which tokens of a forward pass count: the masks that the model was given, fitted to the tokens of each branch."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from layershed.errors import CalibrationError


class Padding:
    """The padding masks of the running forward pass.

    Args:
        transformer: The transformer.
        tokens_first: Whether its hidden states have the shape (tokens, batch, hidden).
    """

    def __init__(self, transformer: nn.Module, tokens_first: bool) -> None:
        self._tokens_first = tokens_first
        self._decoder = _decoder_paths(transformer)
        self._masks: dict[str, Tensor] = {}
        self._cached = False

    def begin_pass(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Take the masks from the arguments of a forward pass."""
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        given = {**bound, **bound.get("kwargs", {})}
        self._cached = given.get("past_key_values") is not None
        masks = {name: given.get(name) for name in ("attention_mask", "decoder_attention_mask")}
        if "src_key_padding_mask" in given:  # torch's own encoder: true where there is padding
            masks["attention_mask"] = ~given["src_key_padding_mask"].bool()
        self._masks = {name: m.bool() for name, m in masks.items() if isinstance(m, Tensor) and m.ndim == 2}

    def forget(self) -> None:
        """Drop the references to the masks."""
        self._masks = {}

    def align(self, x: Tensor, branch: Tensor, path: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """X, its branch, and the mask of their tokens, in shapes that fit each other.

        Args:
            x: Input of the branch as the model holds it, shape (batch, tokens, hidden), (tokens, batch, hidden),
                (batch * tokens, hidden) or (batch, tokens, streams, hidden).
            branch: Of the same shape.
            path: Path of the module that the branch belongs to.

        Returns:
            X and the branch, shape (batch, tokens, hidden), and the mask, shape (batch, tokens); None without one.

        Raises:
            CalibrationError: If the mask has another number of tokens.
        """
        if self._tokens_first:
            x, branch = x.transpose(0, 1), branch.transpose(0, 1)
        mask = self._masks.get("decoder_attention_mask" if path.startswith(self._decoder) else "attention_mask")
        if mask is not None:
            if x.ndim == 2:
                x, branch = x.view(*mask.shape, -1), branch.view(*mask.shape, -1)  # OPT flattens its tokens
            mask = self._fitted(mask, x, path)
        if x.ndim == 4:  # several streams side by side, as with hyper-connections
            mask = None if mask is None else mask.repeat_interleave(x.shape[2], 1)
            x, branch = x.flatten(1, 2), branch.flatten(1, 2)
        return x, branch, mask

    def _fitted(self, mask: Tensor, x: Tensor, path: str) -> Tensor:
        """The padding mask of the tokens of x, both of shape (batch, tokens, ...)."""
        places, tokens = mask.shape[1], x.shape[1]
        if self._cached and places > tokens:
            return mask[:, -tokens:]  # decoding from a cache: the mask covers the past, too
        if mask.shape[0] != x.shape[0] or places % tokens:
            raise CalibrationError(
                f"Cannot apply the padding mask at {path}: it has the shape {tuple(mask.shape)}, but the tokens have "
                f"the shape {tuple(x.shape[:2])}. Leave the mask out, or score batches without padding."
            )
        return mask[:, :: places // tokens]  # a speech model takes several frames for a token


def _decoder_paths(transformer: nn.Module) -> tuple[str, ...]:
    """The prefix of the paths of a decoder's modules, in a model that has an encoder, too."""
    if not isinstance(transformer, PreTrainedModel) or not transformer.config.is_encoder_decoder:
        return ()
    decoder = transformer.get_decoder()
    return tuple(f"{path}." for path, module in transformer.named_modules() if module is decoder)
