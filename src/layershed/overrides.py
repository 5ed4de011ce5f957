"""Forward overrides on single module instances: how a bypassed sublayer costs nothing and keeps its weights.

An override is an attribute ``forward`` of the instance, so that state-dict keys, the block's own forward and its
gradient-checkpointing wrapper stay as they are. All state of a bypass lives in it, on the model itself: deepcopy and
pickle carry it along, and nothing has to be kept elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from layershed.plan import Sublayer


@dataclass
class ZeroBranch:
    """Stands in for a sublayer's module: its branch contributes zero.

    Args:
        sublayer: What is bypassed.
        outputs: Length of the tuple that the module returns, or 0 where it returns a tensor.
        layer_idx: The module's slot in the KV cache, or None.
        materialize: Return zeros with memory of their own, for blocks that add to them in place.
        frozen: Names of the module's parameters that were trainable before.
        own: Attributes of the instance that the override hides, such as a forward that accelerate put there.
    """

    sublayer: Sublayer
    outputs: int
    layer_idx: int | None
    materialize: bool
    frozen: tuple[str, ...] = ()
    own: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros of the shape of the hidden states, in the form that the module returns; advances the KV cache."""
        hidden = first_tensor(args, kwargs)
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        if cache is not None and self.layer_idx is not None:
            advance_cache(cache, self.layer_idx, hidden)
        zeros = hidden.new_zeros(hidden.shape) if self.materialize else hidden.new_zeros(()).expand(hidden.shape)
        return (zeros, *[None] * (self.outputs - 1)) if self.outputs else zeros


@dataclass
class PassThrough:
    """Stands in for a norm or dropout that only a bypassed sublayer uses: returns its input.

    Args:
        sublayer: The bypassed sublayer.
        frozen: Names of the module's parameters that were trainable before.
        own: Attributes of the instance that the override hides.
    """

    sublayer: Sublayer
    frozen: tuple[str, ...] = ()
    own: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The hidden states that came in."""
        return first_tensor(args, kwargs)


@dataclass
class _Note:
    """Replaces ``extra_repr``, so that ``print(model)`` shows what happened."""

    text: str

    def __call__(self) -> str:
        return self.text


Override = ZeroBranch | PassThrough
_HIDDEN = ("forward", "extra_repr")


class RemovedModule(nn.Module):
    """What stands where a removed module stood: no parameters, the same call.

    Args:
        override: What it does when it is called.
    """

    def __init__(self, override: Override) -> None:
        super().__init__()
        self.override = override
        self.layer_idx = getattr(override, "layer_idx", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Contribute nothing to the residual stream."""
        return self.override(*args, **kwargs)

    def extra_repr(self) -> str:
        """Which sublayer was removed."""
        return f"{self.override.sublayer.name}, removed"


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a module was called with: its first positional tensor, else its first by keyword."""
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def advance_cache(cache: Any, layer_idx: int, hidden: Tensor) -> None:
    """Tell the KV cache that its layer saw the tokens of ``hidden``, shape (batch, tokens, hidden), storing no keys.

    A model reads its position from the cache's first layer: if that attention is bypassed and stays silent, cached
    decoding goes wrong without an error. The placeholder has one head of size 1, or the shape that a cache allocated
    in advance (static) demands.
    """
    layers = getattr(cache, "layers", ())
    keys = getattr(layers[layer_idx], "keys", None) if layer_idx < len(layers) else None
    heads, size = (keys.shape[1], keys.shape[3]) if keys is not None and keys.ndim == 4 else (1, 1)
    placeholder = hidden.new_zeros(()).expand(hidden.shape[0], heads, hidden.shape[1], size)
    cache.update(placeholder, placeholder, layer_idx)
    layer = cache.layers[layer_idx]
    if type(layer) is DynamicLayer:
        # the length is all that is asked for: one element of memory behind it, however many tokens pass
        layer.keys = layer.values = hidden.new_zeros(()).expand(layer.keys.shape)


def install(module: nn.Module, override: Override) -> None:
    """Bypass one module: override its forward, freeze its parameters and forget their gradients."""
    frozen = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            frozen.append(name)
            # False first: a frozen parameter must not be moved by the next optimizer step
            parameter.requires_grad_(False)
        parameter.grad = None
    override.frozen = tuple(frozen)
    _set(module, override)


def uninstall(module: nn.Module) -> None:
    """Undo :func:`install`, exactly."""
    override = override_of(module)
    if override is None:
        return
    _clear(module, override)
    for name in override.frozen:
        module.get_parameter(name).requires_grad_(True)


def override_of(module: nn.Module) -> Override | None:
    """The override that a module carries, or None."""
    override = module.__dict__.get("forward")
    return override if isinstance(override, ZeroBranch | PassThrough) else None


def overridden(model: nn.Module) -> Iterator[tuple[nn.Module, Override]]:
    """Every overridden module of a model, with its override."""
    for module in model.modules():
        override = override_of(module)
        if override is not None:
            yield module, override


@contextmanager
def lifted(model: nn.Module) -> Iterator[None]:
    """Within the context every forward is the original one; what was trainable is not changed."""
    carried = list(overridden(model))
    for module, override in carried:
        _clear(module, override)
    try:
        yield
    finally:
        for module, override in carried:
            _set(module, override)


def _set(module: nn.Module, override: Override) -> None:
    # through __dict__: nn.Module's own __setattr__ is slow, and mypy rightly forbids assigning a method
    override.own = {name: module.__dict__[name] for name in _HIDDEN if name in module.__dict__}
    module.__dict__["forward"] = override
    module.__dict__["extra_repr"] = _Note("bypassed")


def _clear(module: nn.Module, override: Override) -> None:
    for name in _HIDDEN:
        del module.__dict__[name]
    module.__dict__.update(override.own)
