"""Registered SublayerAdapters: the inputs of transformers that are not from Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from layershed.errors import AdapterError


@dataclass(frozen=True)
class SublayerAdapter:
    """The inputs of a module class that is not a Hugging Face model.

    Its sublayers are found and proven from one forward pass, as those of any other model.

    Args:
        inputs: A function of the model that returns the keyword arguments of a small forward pass, such as one
            sequence of four tokens.
        blocks: Paths of the lists that hold its blocks; empty to search for them.

    Example:
        >>> class GPT(nn.Module): ...
        >>> register_adapter(GPT, SublayerAdapter(lambda model: {"idx": torch.arange(4)[None]}))
    """

    inputs: Callable[[Any], Mapping[str, Any]]
    blocks: tuple[str, ...] = ()


_REGISTERED: dict[type[nn.Module], SublayerAdapter] = {}


def register_adapter(module_class: type[nn.Module], adapter: SublayerAdapter) -> None:
    """Make layershed treat instances of a class and of its subclasses as transformers.

    A later call for the same class replaces the SublayerAdapter.

    Args:
        module_class: The class of the whole transformer, not of a block.
        adapter: Its SublayerAdapter.

    Raises:
        AdapterError: If ``module_class`` is not a subclass of ``nn.Module``.
    """
    if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
        raise AdapterError(
            f"register_adapter({module_class!r}): not a subclass of nn.Module. Give the class of the model."
        )
    _REGISTERED[module_class] = adapter


def registered_adapter(module: nn.Module) -> SublayerAdapter | None:
    """The SublayerAdapter registered for a module's class, or for the nearest of its bases."""
    found = registered_class(module)
    return None if found is None else _REGISTERED[found]


def registered_class(module: nn.Module) -> type[nn.Module] | None:
    """The class, of a module or the nearest of its bases, for which a SublayerAdapter is registered."""
    return next((base for base in type(module).__mro__ if base in _REGISTERED), None)
