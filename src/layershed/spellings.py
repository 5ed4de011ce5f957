"""What transformers spells differently from version to version (4.57 to 5.x). Imports only torch and transformers.

| what | spellings |
|---|---|
| the argument and output of the KV cache | ``past_key_values``; ``cache`` from 5.24 on; ``cache_params`` in Mamba |
| the base of all configs | ``PretrainedConfig``; ``PreTrainedConfig`` from 5.0 on |
| the fields of single layers | a plain ``per_layer_config``; a heterogeneous config from 5.14 on |
| a cache slot that stores nothing | ``DummyLayer`` from 5.23 on |
| the collector of extra outputs | ``utils.output_capturing`` from 5.2 on; before, forwards wrapped in each call |
| the length of a static cache | counted from 5.10 on; before, its entries that are not zero |
| recomputing activations | ``gradient_checkpointing_enable``; ``activation_checkpointing_enable`` from 5.23 on |

The text of this file is copied into folders that load without layershed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
import transformers
from transformers import cache_utils, modeling_outputs

try:
    from transformers.utils import output_capturing as _capturing
except ImportError:
    from transformers.utils import generic as _capturing

CACHE_NAMES = ("cache", "past_key_values", "cache_params", "past_key_value", "layer_past")
"""Names of an argument that takes the KV cache: of a model, of a block, or of an attention."""

PreTrainedConfig: Any = getattr(transformers, "PreTrainedConfig", None) or transformers.PretrainedConfig
OutputRecorder: Any = _capturing.OutputRecorder
_COLLECTOR: Any = getattr(_capturing, "_active_collector", None)
DummyLayer: Any = getattr(cache_utils, "DummyLayer", ())
"""Class of a cache slot that stores nothing; empty where transformers has none, so that ``isinstance`` is false."""
_OWN_CACHE_NAME = next(n for n in CACHE_NAMES if n in modeling_outputs.BaseModelOutputWithPast.__dataclass_fields__)


def cache_name(function: Callable[..., Any]) -> str | None:
    """The argument in which a function takes the KV cache; None if it has no argument of a known name.

    A function that hands on any keyword takes it under the name that this version of transformers uses.
    """
    known = signature(function).parameters
    named = next((name for name in CACHE_NAMES if name in known), None)
    hands_on = "use_cache" not in known and any(p.kind is p.VAR_KEYWORD for p in known.values())
    return _OWN_CACHE_NAME if named is None and hands_on else named


def cache_in(values: Any) -> Any:
    """The KV cache in a model's output, or in a mapping of arguments; None without one."""
    # a plain dict: from 5.24 on an output answers to the old names, too, and complains about them
    fields = dict(values.items()) if isinstance(values, Mapping) else {n: getattr(values, n, None) for n in CACHE_NAMES}
    return next((fields[name] for name in CACHE_NAMES if fields.get(name) is not None), None)


def place_in(layer: Any, tokens: int, device: torch.device) -> dict[str, Any] | None:
    """Where a cache slot must store tokens, if it counts its entries that are not zero; None for all other slots."""
    if not isinstance(layer, cache_utils.StaticLayer) or hasattr(layer, "cumulative_length"):
        return None
    return {"cache_position": layer.get_seq_length() + torch.arange(tokens, device=device)}


def layer_overrides(config: Any) -> dict[int, dict[str, Any]]:
    """By block, the fields in which its config differs: ``per_layer_config``, such as ``{1: {"skip": ["mlp"]}}``.

    Raises:
        TypeError: If the field of an untrusted config is no mapping of mappings, or a ``skip`` is no list of names.
        ValueError: If a block is no number.
    """
    if hasattr(type(config), "per_layer_config"):
        spec = getattr(config, "_heterogeneity_spec", None)
        return {} if spec is None else {block: dict(own) for block, own in spec.per_layer_overrides.items()}
    found = {int(block): dict(own) for block, own in dict(vars(config).get("per_layer_config") or {}).items()}
    for own in found.values():
        skip = own.get("skip", [])
        if not isinstance(skip, list | tuple) or not all(isinstance(kind, str) for kind in skip):
            raise TypeError(f"per_layer_config: skip={skip!r} must be a list of names.")
    return {block: own for block, own in found.items() if own != {"skip": []}}


def recompute_activations(model: Any, options: Mapping[str, Any] | None = None) -> None:
    """Make a model recompute its activations in the backward pass.

    Args:
        model: A model of transformers.
        options: Options of ``torch.utils.checkpoint``, such as ``{"use_reentrant": False}``.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(None if options is None else dict(options))


def should_convert(path: str, skipped: Sequence[str]) -> bool:
    """Whether a module is quantized, given the names that are left out; by the rule of transformers from 5.0 on."""
    try:
        from transformers.quantizers.quantizers_utils import should_convert_module
    except ImportError:
        return not any(f"{path}.".startswith(f"{name}.") or path.endswith(name) for name in skipped)
    return bool(should_convert_module(path, list(skipped)))


def recordable_outputs(model: Any) -> Mapping[str, Any]:
    """By name, the extra outputs (attention weights, router logits) that transformers collects from a model's parts."""
    return dict.get(_capturing._CAN_RECORD_REGISTRY, str(type(model))) or {}


def collected_outputs(compiling: bool) -> Any:
    """What the running forward pass collects, by name of the output; None if it collects nothing.

    Args:
        compiling: Whether torch traces the code. It traces no ContextVar; a compiled model sets a plain variable.
    """
    return None if _COLLECTOR is None or (compiling and not _COLLECTOR.compiling) else _COLLECTOR.get()
