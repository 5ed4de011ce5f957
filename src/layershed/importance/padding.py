"""Which tokens of a forward pass count: the masks that the model was given, fitted to the tokens of each branch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from layershed.errors import CalibrationError
from layershed.importance.masks import UnreadableMasks, tokens_that_count, tokens_with_a_place
from layershed.importance.passes import holds
from layershed.spellings import cache_in

# arguments with the mask of a module's own tokens; torch's own are true where there is padding
_OWN = {"attention_mask": False, "src_key_padding_mask": True, "tgt_key_padding_mask": True}
_OF_ENCODER = {"attention_mask": False, "src_key_padding_mask": True}
_OF_DECODER = {"decoder_attention_mask": False, "tgt_key_padding_mask": True}


@dataclass(frozen=True)
class _Given:
    """The padding that the caller of a module gave.

    Args:
        counts: True where a token counts, shape (batch, tokens); None without a mask.
        error: Why the mask cannot be read.
    """

    counts: Tensor | None = None
    error: CalibrationError | None = None


class Padding:
    """The padding masks of the running forward pass.

    The outermost module that takes a mask says what is padding. Masks of the modules in it are read where that does not
    fit the tokens, as in a speech model, which takes several frames for a token.

    Args:
        transformer: The transformer.
        tokens_first: Whether its hidden states have the shape (tokens, batch, hidden).

    Attributes:
        unreadable: Masks on an accelerator that may be unreadable; to be read after the passes.
    """

    def __init__(self, transformer: nn.Module, tokens_first: bool) -> None:
        self._tokens_first = tokens_first
        self._decoder = _decoder_paths(transformer)
        self._given: dict[tuple[str, bool], _Given] = {}  # by path, and whether it is that of the decoder's tokens
        self._outermost = ""
        self.unreadable = UnreadableMasks()
        self._cached = False

    def forget(self) -> None:
        """Drop the references to the masks."""
        self._given = {}

    def enter(self, path: str, module: nn.Module, args: Any, kwargs: Any, outermost: bool) -> None:
        """Take the masks from the arguments of a module.

        Args:
            path: Path of the module that begins to run.
            module: The module.
            args: Its positional arguments.
            kwargs: Its other arguments.
            outermost: Whether no module around it is running.
        """
        parameters = list(inspect.signature(module.forward).parameters)
        given = {**dict.fromkeys(parameters), **dict(zip(parameters, args, strict=False)), **kwargs}
        if outermost:
            self._outermost = path
            self._given = {key: own for key, own in self._given.items() if not _meet(key[0], path)}
            self._cached = cache_in(given) is not None
        if any(holds(path, decoder) for decoder in self._decoder):
            self._note(path, False, given, _OF_ENCODER)
            self._note(path, True, given, _OF_DECODER)
        else:
            self._note(path, self._in_decoder(path), given, _OWN)

    def _note(self, path: str, decoder: bool, given: Mapping[str, Any], names: Mapping[str, bool]) -> None:
        known = [name for name in names if name in given]
        if not known:
            return
        name = next((name for name in known if given[name] is not None), known[0])
        mask = given[name]
        if mask is None and path == self._outermost and names is _OWN:
            self._given[path, decoder] = _Given(tokens_with_a_place(given.get("position_ids")))
            return
        if names[name] and isinstance(mask, Tensor):
            mask = ~mask.bool()
        if path != self._outermost and not (isinstance(mask, Tensor) and mask.ndim == 2):
            return  # the model made it
        try:
            self._given[path, decoder] = _Given(tokens_that_count(mask, self.unreadable))
        except CalibrationError as error:
            self._given[path, decoder] = _Given(error=error)

    def _in_decoder(self, path: str) -> bool:
        return any(decoder == path or holds(decoder, path) for decoder in self._decoder)

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
            CalibrationError: If the mask cannot be read, or has another number of tokens.
        """
        if self._tokens_first:
            x, branch = x.transpose(0, 1), branch.transpose(0, 1)
        given, inner = self._masks_at(path)
        first = next(iter([*given, *inner]), None)
        if first is not None and x.ndim == 2:  # OPT flattens its tokens
            rows = first.shape[0] if first.shape[0] > 1 else max(1, x.shape[0] // first.shape[1])
            if x.shape[0] % rows:
                raise _misfit(first, x, path)
            x, branch = x.view(rows, -1, x.shape[-1]), branch.view(rows, -1, x.shape[-1])
        mask = self._fitted(given, inner, x, path)
        if x.ndim == 4:  # several streams side by side, as with hyper-connections
            mask = None if mask is None else mask.repeat_interleave(x.shape[2], 1)
            x, branch = x.flatten(1, 2), branch.flatten(1, 2)
        return x, branch, mask

    def _masks_at(self, path: str) -> tuple[list[Tensor], list[Tensor]]:
        """The mask that the caller gave, if any, and those that the model made of it, from outermost to innermost.

        Raises:
            CalibrationError: If the caller's mask cannot be read.
        """
        parts, decoder = f"{path}.".split("."), self._in_decoder(path)
        around = [".".join(parts[:end]) for end in range(len(parts))]
        found = [self._given[outer, decoder] for outer in around if (outer, decoder) in self._given]
        for given in found:
            if given.error is not None:
                raise given.error
        masks = [given.counts for given in found if given.counts is not None]
        own = 1 if masks and found[0].counts is not None else 0
        return masks[:own], masks[own:]

    def _fitted(self, given: list[Tensor], inner: list[Tensor], x: Tensor, path: str) -> Tensor | None:
        """The padding mask of the tokens of x, both of shape (batch, tokens, ...); None without one."""
        rows, tokens = x.shape[:2]
        for mask in (*given, *inner):
            if mask.shape[0] in (1, rows) and mask.shape[1] == tokens:
                return mask.expand(rows, -1)
        if not given:
            return None
        mask, places = given[0], given[0].shape[1]
        if mask.shape[0] not in (1, rows):
            raise _misfit(mask, x, path)
        if self._cached and places > tokens:
            return mask.expand(rows, -1)[:, -tokens:]  # decoding from a cache: the mask covers the past, too
        if places % tokens:
            raise _misfit(mask, x, path)
        return mask.expand(rows, -1)[:, :: places // tokens]  # a speech model takes several frames for a token


def _misfit(mask: Tensor, x: Tensor, path: str) -> CalibrationError:
    return CalibrationError(
        f"Cannot apply the padding mask at {path}: it has the shape {tuple(mask.shape)}, but the tokens have "
        f"the shape {tuple(x.shape[:-1])}. Leave the mask out, or score batches without padding."
    )


def _meet(one: str, other: str) -> bool:
    """Whether two paths are the same, or one module holds the other."""
    return one == other or holds(one, other) or holds(other, one)


def _decoder_paths(transformer: nn.Module) -> tuple[str, ...]:
    """The paths of a decoder, in a model that has an encoder, too."""
    if not isinstance(transformer, PreTrainedModel):
        return tuple(path for path, module in transformer.named_modules() if isinstance(module, nn.TransformerDecoder))
    if not transformer.config.is_encoder_decoder:
        return ()
    decoder = transformer.get_decoder()
    return tuple(path for path, module in transformer.named_modules() if module is decoder)
