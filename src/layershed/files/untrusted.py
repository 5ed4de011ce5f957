"""Checks of a model folder before any library acts on it: it may be damaged or untrusted."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from layershed.errors import ExportError, ModelError

MOST_BLOCKS = 10_000  # a list of them is built before anything is compared with the weights
_BLOCKS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_SIZES = (*_BLOCKS, "hidden_size", "n_embd", "d_model", "vocab_size", "num_attention_heads", "num_key_value_heads")
_KERNELS = ("attn_implementation", "experts_implementation")


def vet_folder(source: str | Path) -> None:
    """Refuse a local model folder that names files outside it, or describes a model that cannot be built.

    Args:
        source: A folder; any other name is left to the hub.

    Raises:
        ExportError: If the folder does.
    """
    folder = Path(source)
    if not (folder / "config.json").is_file():
        return
    fields = read_mapping(folder / "config.json")
    if (problem := problem_of(fields)) is not None:
        raise ExportError(f"The config.json in {str(source)!r} is not valid ({problem}).")
    if (folder / "adapter_config.json").is_file():
        # transformers would load the adapter unasked, and import any module that its file names
        raise ExportError(
            f"{str(source)!r} holds a model and an adapter of peft in one; merge the adapter (merge_and_unload()), or "
            "move it out."
        )
    for index in sorted(folder.glob("*.index.json")):
        names = read_mapping(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ExportError(f"{str(index)!r} is not valid: its weight_map must name a file for every weight.")
        if strangers := sorted(name for name in names.values() if re.search(r"[/\\\0]|^\.\.?$", name)):
            raise ExportError(f"{str(index)!r} names {strangers[0]!r}, which is not a file of its own folder.")


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping.

    Raises:
        ExportError: If it does not.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise TypeError(f"it must hold a mapping, not {type(fields).__name__}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        where = f"The {path.name} in {str(path.parent)!r}"
        raise ExportError(f"{where} is not valid JSON for a model ({error}).") from None
    return fields


def problem_of(fields: Mapping[str, Any]) -> str | None:
    """Why no model can be built from the fields of a config, or None; transformers checks the other fields."""
    for inner in _mappings(fields):
        for name in _SIZES:
            value = inner.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                return f"{name}={value}: it must be at least 1"
            if name in _BLOCKS and isinstance(value, int) and value > MOST_BLOCKS:
                return f"{name}={value}: more than {MOST_BLOCKS:,} blocks cannot be meant"
        if not isinstance(inner.get("per_layer_config") or {}, dict):
            return "per_layer_config must hold a mapping"
        heads, shared = inner.get("num_attention_heads"), inner.get("num_key_value_heads")
        if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
            return f"num_attention_heads={heads} is not a multiple of num_key_value_heads={shared}"
        for name, value in inner.items():
            if name.strip("_").removesuffix("_internal") in _KERNELS and "/" in str(value):
                return f"{name}={value!r} would run code from the hub"
    return None


def refuse_unfitting(report: Mapping[str, Any], own: Iterable[str], source: str) -> None:
    """Refuse weights that do not fit their model: transformers would fill missing ones with random numbers.

    Args:
        report: The loading report of transformers.
        own: Names of the model's weights.
        source: Where the weights came from.

    Raises:
        ModelError: If weights are missing, have other shapes, or belong to further blocks. Other surplus weights, such
            as the head of another task, do no harm.
    """
    blocks = {re.sub(r"\d+", "*", name) for name in own}
    left_over = [key for key in report["unexpected_keys"] if re.search(r"\.\d+\.", key)]
    extra = [key for key in left_over if re.sub(r"\d+", "*", key) in blocks]
    for what, found in (
        ("weights are missing", report["missing_keys"]),
        ("weights have another shape than the config says", [key for key, *_ in report["mismatched_keys"]]),
        ("there are weights of more blocks than the config says", extra),
    ):
        if found:
            names = ", ".join(sorted(map(str, found))[:3])
            more = ", ..." if len(found) > 3 else ""
            raise ModelError(f"pretrained={source!r}: {what}: {names}{more}.")


def _mappings(fields: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield fields
    for value in fields.values():
        if isinstance(value, dict):
            yield from _mappings(value)
