"""The stand-in that runs instead of a dropped module. It imports torch, transformers, our spellings and one error.

It returns what a branch of zeros would give, or, if it has a linear map, what the map gives.

The text of this file is copied into folders that load without layershed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

from layershed.errors import StandInError
from layershed.spellings import DummyLayer, cache_in, collected_outputs, place_in
from layershed.stand_ins.linear_map import LinearMap

UNKNOWN_SLOT = -1

Capture = tuple[str, int, int]
"""An entry of an extra output: the output's name, and number of dimensions and last size of the entry, 0 if unknown."""


@dataclass
class StandIn:
    """Runs instead of a module. Returns the hidden states that it is given, or zeros of their shape.

    Args:
        sublayer: The sublayer that is dropped.
        zero: Whether it returns zeros; otherwise it returns the hidden states.
        core: Whether it replaces the sublayer's own module; otherwise it replaces a module around it, such as its norm.
        argument: Position or name of the hidden states in the call.
        echoes: None if the module returns a tensor. If it returns a tuple: for each further place, the argument that it
            returns there unchanged, or None.
        given: Positions and names of the tensors in the call when the structure was proven. Another tensor of the shape
            of the hidden states, such as XLNet's second stream, is an error.
        layer_idx: Its slot in the KV cache, which must still count the tokens, or None without a cache;
            ``UNKNOWN_SLOT`` if the slot could not be determined.
        stride: Its number of hidden states per token in the cache; above 1 in models that predict several tokens ahead
            (ProphetNet).
        materialize: Return zeros with memory of their own, for blocks that add to them in place.
        as_list: Whether the module returns a list and not a tuple.
        aliases: Paths of further modules of the block that return what the module returns, unchanged.
        captures: The entries of extra outputs (attention weights, router logits) that transformers would collect from
            the module and its parts. They are None instead.
        asked_by: Position or name of the argument that asks the module for attention weights, or None without one.
        asked: The places at which it then returns them, with their number of dimensions. They are empty tensors
            instead, because some models compute with them.
        frozen: Names of the module's parameters that were trainable before.
        own: Attributes of the instance that the stand-in hides, such as a forward that accelerate put there.
        original: The forward to call instead, while the module runs and another library still wraps this stand-in.
        map: The linear map that computes the branch; None for a branch of zeros.
        source: Position or name of the argument that the map reads; None for the hidden states.
    """

    sublayer: Any
    zero: bool
    core: bool = True
    argument: int | str = 0
    echoes: tuple[int | str | None, ...] | None = None
    given: tuple[int | str, ...] = ()
    layer_idx: int | None = None
    stride: int = 1
    materialize: bool = False
    as_list: bool = False
    aliases: tuple[str, ...] = ()
    captures: tuple[Capture, ...] = ()
    asked_by: int | str | None = None
    asked: tuple[tuple[int, int], ...] = ()
    frozen: tuple[str, ...] = ()
    own: dict[str, Any] = field(default_factory=dict)
    original: Callable[..., Any] | None = None
    map: LinearMap | None = None
    source: int | str | None = None

    @property
    def label(self) -> str:
        """Short name of the sublayer."""
        return str(getattr(self.sublayer, "name", self.sublayer))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module would return if its branch were zeros, or the map's; advance the KV cache."""
        if self.original is not None:
            return self.original(*args, **kwargs)
        hidden = _argument(self.argument, args, kwargs)
        if not isinstance(hidden, Tensor):
            hidden = first_tensor(args, kwargs)
        if self.given:
            self._refuse_strangers(hidden, args, kwargs)
        if self.layer_idx is not None:
            cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
            if self.layer_idx == UNKNOWN_SLOT and (cache is not None or cache_in(kwargs) is not None):
                raise StandInError(
                    f"Cannot advance the KV cache past dropped {self.label}: its slot is unknown. Use use_cache=False."
                )
            if cache is not None:
                advance_cache(cache, self.layer_idx, hidden, hidden.shape[1] // self.stride)
        if self.captures:
            self._hold_places()
        hidden = self._result(hidden, args, kwargs)
        asked = self.asked_by is not None and bool(_argument(self.asked_by, args, kwargs))
        if self.echoes is None and not asked:
            return hidden
        echoed = (None if key is None else _argument(key, args, kwargs) for key in self.echoes or ())
        returned = [hidden, *echoed]
        for place, ndim in self.asked if asked else ():
            returned += [None] * (place + 1 - len(returned))
            returned[place] = hidden.new_empty((0,) * ndim)
        return returned if self.as_list else tuple(returned)

    def _result(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if self.map is not None:
            read = hidden if self.source is None else _argument(self.source, args, kwargs)
            branch = self.map(read).view(hidden.shape)
            return branch if self.zero else hidden + branch
        listening = torch_module._global_forward_hooks or torch_module._global_backward_hooks
        if listening:  # torch's global hooks run before those of a module
            return zeros_after(hidden) if self.zero else hidden.clone()
        if not self.zero:
            return hidden
        return hidden.new_zeros(hidden.shape) if self.materialize else hidden.new_zeros(()).expand(hidden.shape)

    def _hold_places(self) -> None:
        """Collect a None for each entry that would be collected, if transformers is asked for its output."""
        collected = collected_outputs(torch.compiler.is_compiling())
        for key, *_ in self.captures:
            if collected is not None and key in collected:
                collected[key].append(None)

    def _refuse_strangers(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # cheap tests first and no dict of all arguments: this runs in every decoding step
        for key, value in chain(enumerate(args), kwargs.items()):
            if not isinstance(value, Tensor) or key in self.given:
                continue
            if value.shape == hidden.shape and value.is_floating_point():
                raise StandInError(
                    f"{self.label} is dropped, but its module gets a second stream of hidden states ({key!r}), which "
                    f"was absent when the model's structure was proven. Restore {self.label} to use this stream."
                )


LINEAR_MAP = "linear_stand_in"
"""Name of the map below the module that it replaces, and so a part of its parameters' names."""


class RemovedModule(nn.Module):
    """Takes the place of a removed module: its linear map if it has one, the same call, the same plain attributes.

    Args:
        stand_in: Runs when it is called.
        module: The module that it replaces. Its plain attributes and the dtype of its weights stay readable, because
            blocks read them.
    """

    def __init__(self, stand_in: StandIn, module: nn.Module | None = None) -> None:
        super().__init__()
        self.stand_in = stand_in
        if stand_in.map is not None:
            self.add_module(LINEAR_MAP, stand_in.map.train(module is None or module.training))
        self._stubs: dict[str, Tensor] = {}
        for name, value in vars(module).items() if module is not None else ():
            if isinstance(value, bool | int | float | str) and name != "training":
                setattr(self, name, value)
        for name, parameter in module.named_parameters(recurse=False) if module is not None else ():
            self._stubs[name] = torch.empty(0, dtype=parameter.dtype, device="cpu")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Contribute nothing to the residual stream, or what the map gives."""
        return self.stand_in(*args, **kwargs)

    def extra_repr(self) -> str:
        """Which sublayer was removed."""
        return f"{self.stand_in.label}, removed{'' if self.stand_in.map is None else ', linear'}"

    def __getattr__(self, name: str) -> Any:
        stubs = self.__dict__.get("_stubs", {})
        return stubs[name] if name in stubs else super().__getattr__(name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RemovedModule:
        self._stubs = {name: fn(stub) for name, stub in self._stubs.items()}
        return super()._apply(fn, recurse)


def removed_in(model: nn.Module) -> set[Any]:
    """The sublayers that were removed from a model."""
    removed = (module.stand_in for module in model.modules() if isinstance(module, RemovedModule))
    return {stand_in.sublayer for stand_in in removed if stand_in.core}


def _argument(key: int | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if isinstance(key, int):
        return args[key] if key < len(args) else None
    return kwargs.get(key)


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a module was called with: its first positional tensor, else its first by keyword."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def advance_cache(cache: Cache, layer_idx: int, hidden: Tensor, tokens: int) -> None:
    """Make a layer of the KV cache count tokens of ``hidden``, (batch, tokens, hidden), without storing keys.

    A model reads its position from the cache's first layer. If that attention is dropped and counts no tokens, cached
    decoding is wrong without an error. The placeholder has one head of size 1, or the shape that a cache allocated in
    advance (static) requires.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    layer: Any = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if isinstance(layer, DummyLayer):  # it reads the keys of another layer and stores none
        return
    stored = getattr(layer, "keys", None)
    if type(layer) is not DynamicLayer or stored is None or stored.ndim != 4 or getattr(cache, "offloading", False):
        keys, values = (_placeholder(hidden, tokens, getattr(layer, name, None)) for name in ("keys", "values"))
        place = place_in(layer, tokens, hidden.device)
        if place is None:
            cache.update(keys, values, layer_idx)
        else:
            cache.update(torch.ones_like(keys), values, layer_idx, place)
        layer = cache.layers[layer_idx]
        if type(layer) is not DynamicLayer:
            return
        stored, tokens = layer.keys, 0
    # only the length is read: one element of memory for any number of tokens
    batch, heads, seen, size = stored.shape
    layer.keys = layer.values = hidden.new_zeros(()).expand(batch, heads, seen + tokens, size)


def _placeholder(hidden: Tensor, tokens: int, stored: Tensor | None) -> Tensor:
    heads, size = (stored.shape[1], stored.shape[3]) if stored is not None and stored.ndim == 4 else (1, 1)
    return hidden.new_zeros(()).expand(hidden.shape[0], heads, tokens, size)


def zeros_after(hidden: Tensor) -> Tensor:
    """Zeros with memory of their own, with a gradient of zero for ``hidden``, so that hooks get a gradient."""
    return hidden.masked_fill(torch.ones((), dtype=torch.bool, device=hidden.device), 0)
