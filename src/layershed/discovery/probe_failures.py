"""What to do about a probe that fails, and what is done beforehand so that it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from layershed.batches import is_offloaded
from layershed.discovery.registry import registered_adapter

_FLEX = "flex_attention"


@contextmanager
def without_flex(transformer: nn.Module) -> Iterator[None]:
    """Within the context sdpa, or eager attention, runs instead of flex attention.

    Flex attention is one compiled operation that no recording sees. It computes the same function.
    """
    with with_attention(transformer, _unflexed):
        yield


def _unflexed(model: PreTrainedModel) -> str:
    before: str = model.config._attn_implementation
    return before if before != _FLEX else "sdpa" if model._supports_sdpa else "eager"


@contextmanager
def with_attention(transformer: nn.Module, wanted: Callable[[PreTrainedModel], str]) -> Iterator[None]:
    """Within the context each model inside computes attention by the implementation that is wanted for it."""
    models = [module for module in transformer.modules() if isinstance(module, PreTrainedModel)]
    configs = {id(model.config): (model.config, wanted(model)) for model in reversed(models)}
    before = [(config, config._attn_implementation) for config, _ in configs.values()]
    for config, name in configs.values():
        if name != config._attn_implementation:
            config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config, name in before:
            if name != config._attn_implementation:
                config._attn_implementation_internal = name


def advice(transformer: nn.Module, error: Exception) -> str:
    """What to do after a forward pass failed, as a sentence."""
    name, said = type(transformer).__name__, str(error)
    attention = getattr(getattr(transformer, "config", None), "_attn_implementation", None)
    if isinstance(error, torch.OutOfMemoryError) or ("alloc" in said and "memory" in said):
        whole = (
            " The weights are offloaded, but a proof holds all of them at once." if is_offloaded(transformer) else ""
        )
        return f"Memory is short.{whole} Find the sublayers on the CPU, or before the offload."
    if is_offloaded(transformer):
        return (
            "Its weights are offloaded by accelerate. Call find_sublayers, select and bypass before the offload, or "
            "undo it with accelerate.hooks.remove_hook_from_submodules(model)."
        )
    if any(hasattr(parameter, "ds_id") for parameter in transformer.parameters()):
        return "DeepSpeed holds its weights in parts. Find the sublayers before DeepSpeed takes the model."
    if len({parameter.device for parameter in transformer.parameters()}) > 1 and "device" in said:
        return "Its weights are on several devices. Move it to one, or let accelerate.dispatch_model place them."
    if attention not in (None, "eager", "sdpa") and ("attention" in said.lower() or "flash" in said.lower()):
        return f'It uses {attention}. Call model.set_attn_implementation("sdpa") first.'
    if "not implemented for" in said:
        return "This device has no such operation for the dtype of the weights. Convert them: model.to(torch.float32)."
    if registered_adapter(transformer) is not None:
        return f"The inputs come from the SublayerAdapter of {name}. Check them by calling the model with them."
    return (
        f"If it takes other inputs, register them: layershed.register_adapter({name}, "
        "layershed.SublayerAdapter(lambda model: {...}))."
    )
