"""The model as it was before its drop and its adapters, for code that asks for its parameters by name and number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from layershed.recovery.lora import adapted_modules, trainable_before


@contextmanager
def as_before(model: nn.Module, transformer: nn.Module) -> Iterator[None]:
    """Within the context the parameters have their first names, and what was trainable then is trainable.

    The adapters are taken out. Run no forward pass within the context.

    Args:
        model: The module that holds the transformer.
        transformer: The transformer in it.
    """
    trainable = [p for p in trainable_before(transformer) if not p.requires_grad]
    places = []
    for path, layer in adapted_modules(model).items():
        parent, _, name = path.rpartition(".")
        places.append((model.get_submodule(parent)._modules, name, layer))
    for modules, name, layer in places:
        modules[name] = layer.base_layer
    for parameter in trainable:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(False)
        for modules, name, layer in places:
            modules[name] = layer
