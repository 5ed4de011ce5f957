"""How a transformer that is not from Hugging Face says the little that cannot be seen: what to feed it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from layershed.errors import AdapterError


@dataclass(frozen=True)
class SublayerAdapter:
    """What discovery needs to know of a module class that is not a Hugging Face model.

    Its sublayers are found, and their residual identity is proven, as those of any other model: from one forward pass.

    Args:
        inputs: Given a model, the keyword arguments of a small forward pass: one sequence of four tokens, say.
        blocks: Paths of the lists that hold its blocks; empty to look for them.

    Example:
        >>> class GPT(nn.Module): ...
        >>> register_adapter(GPT, SublayerAdapter(lambda model: {"idx": torch.arange(4)[None]}))
    """

    inputs: Callable[[Any], Mapping[str, Any]]
    blocks: tuple[str, ...] = ()


_ADAPTERS: dict[type[nn.Module], SublayerAdapter] = {}


def register_adapter(module_class: type[nn.Module], adapter: SublayerAdapter) -> None:
    """Let layershed see instances of a class, and of its subclasses, as transformers; the last adapter counts.

    Args:
        module_class: The class of the whole transformer, not of a block.
        adapter: What there is to say about it.

    Raises:
        AdapterError: If that is no class of modules.
    """
    if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
        raise AdapterError(f"register_adapter({module_class!r}): give the class of the model, a subclass of nn.Module.")
    _ADAPTERS[module_class] = adapter


def adapter_of(module: nn.Module) -> SublayerAdapter | None:
    """The adapter registered for a module's class, or for the nearest of its bases."""
    return next((_ADAPTERS[base] for base in type(module).__mro__ if base in _ADAPTERS), None)
