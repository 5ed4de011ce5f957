"""The structure of a model in a Lightning checkpoint: what is dropped, quantized and adapted by LoRA."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layershed.arguments import as_path
from layershed.discovery.find import check_module, find_transformer
from layershed.discovery.model_record import check_plan, model_record, recorded
from layershed.errors import AmbiguousModelError, CheckpointError, LayershedError, PlanError
from layershed.files.checkpoint_file import read_checkpoint
from layershed.files.checkpoint_shards import keys_of, mend, read_notes, read_shards
from layershed.map_checks import empty_maps, map_sizes, map_sizes_from
from layershed.planning.plan import Drop, DropPlan
from layershed.quantization import Quantized, dequantize, quantization_of, quantize_as
from layershed.recovery.lora import inject_at, lora_settings, remove_lora
from layershed.recovery.lora_options import checked_settings
from layershed.saving.prefix import misfit, prefix_of
from layershed.stand_ins.carried import maps_of
from layershed.stand_ins.contexts import withheld
from layershed.stand_ins.install import MARK, WITHHELD
from layershed.surgery import bypass, bypassed_sublayers, restore

CHECKPOINT_KEY = "layershed"
_PARTS = {"dropped", "quantized", "adapters"}
_LINEAR = "linear"  # width and rank of linear maps, by sublayer; only where there are some
_MARK = "layershed: "


def load_checkpoint(module: nn.Module, path: str | Path, *, name: str | None = None) -> None:
    """Bring a module to the state of a Lightning checkpoint: drops, quantization, LoRA and all weights.

    For a LightningModule that knows nothing of layershed, or any other module with the same names inside, or for its
    transformer alone, if the checkpoint holds one module whose names fit after a prefix, such as ``net.``. Its
    ``configure_model`` hook is called first, as Lightning's ``load_from_checkpoint`` does it. Not needed
    with CausalLM, or with a Trainer that has SublayerDrop among its callbacks: they do it by themselves.

    Args:
        module: The module that was trained, newly built. If loading fails, it may be half loaded.
        path: A checkpoint file, also one of the weights alone, or a folder of shards that FSDP2 wrote. Nothing in it is
            executed.
        name: Path of the transformer inside ``module``, needed where it holds more than one.

    Raises:
        CheckpointError: If the checkpoint is missing, or does not fit the module.
        AmbiguousModelError: If the module holds several transformers and none is named.
    """
    path = as_path(path, "load_checkpoint: path", CheckpointError)
    mend(path)
    check_module(module)
    _configure(module)
    checkpoint = dict(read_notes(path)) if path.is_dir() else _read(path)
    try:
        apply_structure(checkpoint, module, name=name)
    except AmbiguousModelError:
        raise
    except LayershedError as error:
        raise CheckpointError(f"{str(path)!r}: {error}") from error
    # as Lightning does; a plain module has no such hook
    getattr(module, "on_load_checkpoint", _nothing)(checkpoint)
    if path.is_dir():
        with withheld(module):
            _load_shards(module, path)
        return
    weights, what = checkpoint["state_dict"], type(module).__name__
    own = [key for key in module.state_dict() if not key.endswith(f".{MARK}")]
    prefix = _prefix(path, weights.keys(), own, what)
    named = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    try:
        module.load_state_dict(named if prefix else weights)
    except RuntimeError as error:
        raise CheckpointError(f"{str(path)!r}: {misfit(weights.keys(), own, what)}") from error


def _load_shards(module: nn.Module, path: Path) -> None:
    own = {key: value for key, value in module.state_dict().items() if not key.endswith(f".{MARK}")}
    prefix = _prefix(path, keys_of(path, "state_dict"), own.keys(), type(module).__name__)
    weights = {prefix + key: value for key, value in own.items()}
    read_sharded_weights(path, weights, strict=not prefix, alone=True)
    module.load_state_dict({key.removeprefix(prefix): value for key, value in weights.items()})


def _prefix(path: Path, keys: Collection[str], own: Collection[str], what: str) -> str:
    try:
        return prefix_of({key for key in keys if not key.startswith(_MARK)}, own, what)
    except CheckpointError as error:
        raise CheckpointError(f"{str(path)!r}: {error}") from None


def read_sharded_weights(path: Path, weights: dict[str, Any], *, strict: bool = True, alone: bool = False) -> None:
    """Fill a module's state dict, within :func:`withheld`, from a folder of shards.

    Args:
        path: The folder.
        weights: What is filled.
        strict: Whether the folder must hold nothing else; torch by itself does not check that.
        alone: As of :func:`read_shards`.

    Raises:
        CheckpointError: If the weights do not fit.
    """
    unknown = {key for key in keys_of(path, "state_dict") - weights.keys() if not key.startswith(_MARK)}
    if strict and unknown:
        raise CheckpointError(
            f"{str(path)!r}: it holds {len(unknown)} weights that this module lacks, such as "
            f"{min(unknown)!r}. Build the module from the config that it was trained with."
        )
    read_shards(path, {"state_dict": weights}, alone=alone)


def write_structure(
    checkpoint: dict[str, Any], model: nn.Module, *, name: str | None = None, callback: str | None = None
) -> None:
    """Record in a Lightning checkpoint what is bypassed, quantized and adapted, as plain primitives.

    It also adds a mark to the weights, a key whose name says what to do. A strict load that ignores the record fails on
    this key, instead of giving the dense model in silence.

    Args:
        checkpoint: The checkpoint that is being written.
        model: The module that holds the transformer.
        name: Path of the transformer inside it, needed where it holds more than one.
        callback: The callback that the mark advises; None for the one that makes such changes.
    """
    drops = tuple(Drop(sublayer) for sublayer in bypassed_sublayers(model))
    transformer = transformer_or_none(model, name)
    quantized = None if transformer is None else quantization_of(transformer)
    noted: dict[str, Any] = {
        "dropped": _plan_of(drops, transformer).to_dict() if drops else None,
        "quantized": None if quantized is None else quantized.to_dict(),
        "adapters": None if transformer is None else lora_settings(transformer),
    }
    if transformer is not None and (maps := maps_of(transformer)):
        noted[_LINEAR] = {name: list(size) for name, size in map_sizes(maps).items()}
    if any(noted.values()):
        checkpoint[CHECKPOINT_KEY] = noted
        if "state_dict" in checkpoint:
            weights = checkpoint["state_dict"]
            _take_marks(weights)  # a module of ours has written its own before its callbacks do
            weights[_mark(drops, quantized, noted["adapters"], callback)] = torch.zeros(0)


def apply_structure(checkpoint: Mapping[str, Any], model: nn.Module, *, name: str | None = None) -> None:
    """Bring the model to the structure that a checkpoint records, so that its weights fit strictly.

    Args:
        checkpoint: A checkpoint with or without a record of :func:`write_structure`. The mark is removed from its
            weights, and weights that FSDP2 withheld get their own names back.
        model: The module that holds the transformer.
        name: Path of the transformer inside it, needed where it holds more than one.

    Raises:
        CheckpointError: If this model cannot get the recorded structure.
    """
    noted = checkpoint.get(CHECKPOINT_KEY) or dict.fromkeys(_PARTS)
    if not isinstance(noted, Mapping) or noted.keys() - {_LINEAR} != _PARTS:
        raise CheckpointError("What the checkpoint says under 'layershed' is of another version; train anew.")
    if not any(noted.values()) and not has_structure(model, name=name):
        return
    transformer: Any = find_transformer(model, name=name)
    adapters = noted["adapters"]
    try:
        wanted = DropPlan.from_dict(noted["dropped"]) if noted["dropped"] else DropPlan()
        quantized = None if noted["quantized"] is None else Quantized.from_dict(noted["quantized"])
        wanted_adapters = None if adapters is None else checked_settings(adapters)
        present = lora_settings(transformer)
        if present is not None and (present != adapters or quantized != quantization_of(transformer)):
            remove_lora(transformer)
        _quantize_as(transformer, quantized)
        _drop(transformer, wanted, map_sizes_from(noted.get(_LINEAR)))
        if wanted_adapters is not None:
            inject_at(transformer, *wanted_adapters)
    except PlanError as error:
        raise CheckpointError(f"The checkpoint's dropped sublayers do not fit this model: {error}") from None
    except (LayershedError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"The checkpoint's structure does not fit this model: {error}") from error
    if any(noted.values()):  # if the record is lost, the mark stays, and a strict load fails on it
        weights = checkpoint.get("state_dict", {})
        _take_marks(weights)
        for key in [key for key in weights if any(key.endswith(f"{gone.path}.{MARK}") for gone in wanted)]:
            del weights[key]
        for key in [key for key in weights if WITHHELD in key]:
            weights[key.replace(WITHHELD, "")] = weights.pop(key)


def has_structure(model: nn.Module, *, name: str | None = None) -> bool:
    """Whether anything of a model is bypassed, quantized or adapted."""
    noted: dict[str, Any] = {}
    write_structure(noted, model, name=name)
    return bool(noted)


def _take_marks(weights: dict[str, Any]) -> None:
    for mark in [key for key in weights if key.startswith(_MARK)]:
        del weights[mark]


def _mark(drops: tuple[Drop, ...], quantized: Quantized | None, adapters: object, advised: str | None) -> str:
    """The key that a strict load reports as unexpected if it ignores the structure."""
    parts, callback = [], "LoRARecovery"
    if adapters is not None:
        parts.append("adapters are added")
    if quantized is not None:
        parts, callback = [f"weights are quantized ({quantized.mode})", *parts], "Quantization"
    if drops:
        names = ", ".join(drop.sublayer.name for drop in drops)
        parts, callback = [f"{names} {'is' if len(drops) == 1 else 'are'} dropped", *parts], "SublayerDrop"
    return (
        f"{_MARK}{', '.join(parts)}; load with layershed.load_checkpoint(module, path), or put {advised or callback} "
        "among the callbacks"
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{str(path)!r}: there is no such file.")
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise CheckpointError(f"{str(path)!r}: it is not a checkpoint that Lightning wrote.")
    return checkpoint


def _configure(module: nn.Module) -> None:
    """Call the hook ``configure_model``, if there is one.

    Raises:
        CheckpointError: If it fails, for example because it reads the Trainer.
    """
    if hasattr(module, "configure_model"):
        try:
            module.configure_model()  # type: ignore[operator]
        except Exception as error:
            raise CheckpointError(
                f"load_checkpoint: configure_model() of {type(module).__name__} failed without a Trainer ({error}). "
                "Build the transformer in the module yourself, then call load_checkpoint."
            ) from error


def _nothing(_checkpoint: object) -> None:
    """The hook of a module that has none."""


def transformer_or_none(model: nn.Module, name: str | None) -> Any:
    """The transformer, or None if there is none, or several and no name: nothing can have been changed then."""
    try:
        return find_transformer(model, name=name)
    except LayershedError:
        return None


def _quantize_as(transformer: Any, wanted: Quantized | None) -> None:
    current = quantization_of(transformer)
    if current == wanted:
        return
    if current is not None:
        dequantize(transformer)
    if wanted is not None:
        quantize_as(transformer, wanted)


def _plan_of(drops: tuple[Drop, ...], transformer: nn.Module | None) -> DropPlan:
    return DropPlan(drops) if transformer is None else recorded(DropPlan(drops), transformer)


def _drop(transformer: nn.Module, wanted: DropPlan, sizes: Mapping[str, tuple[int, int | None]]) -> None:
    present = set(bypassed_sublayers(transformer))
    running = map_sizes(maps_of(transformer))
    other = {sublayer for sublayer in present if running.get(sublayer.name) != sizes.get(sublayer.name)}
    if gone := (present - set(wanted)) | other:
        restore(transformer, gone)
    missing = set(wanted) - (present - other)
    if missing:
        check_plan("checkpoint", wanted, transformer, model_record(transformer))
        bypass(transformer, missing, maps=empty_maps(sizes, missing, transformer))
