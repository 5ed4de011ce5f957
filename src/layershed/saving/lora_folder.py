"""LoRA on disk, in peft's own format, with the drop plan of its base model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from layershed.arguments import as_path, check_kind
from layershed.discovery.find import find_transformer, predicts_next_token
from layershed.discovery.model_record import check_plan, recorded
from layershed.errors import ExportError, PlanError, RecoveryError
from layershed.files.atomic import check_free, replacing
from layershed.files.untrusted import read_mapping
from layershed.planning.plan import PLAN_FILE, Drop, DropPlan
from layershed.recovery.lora import ADAPTER, adapted_modules, exactly, inject_at, peft_config_of
from layershed.recovery.lora_options import SETTINGS, checked_settings, settings_of
from layershed.saving.savable import holds_shards, whole
from layershed.stand_ins.record import overridden
from layershed.surgery import dropped_sublayers

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_NOT_KNOWN = (
    "alpha_pattern",
    "rank_pattern",
    "bias",
    "modules_to_save",
    "lora_bias",
    "layer_replication",
    "megatron_config",
)
_PREFIX = "base_model.model."  # peft's, for the model inside a PeftModel


def save_adapter(
    model: nn.Module, folder: str | Path, *, plan: DropPlan | None = None, name: str | None = None
) -> Path:
    """Write the LoRA adapters for ``peft.PeftModel.from_pretrained(base, folder)``, with the base's drop plan.

    If FSDP2 shards the model, call it on every rank; the first one writes.

    Args:
        model: A transformer with adapters of :func:`~layershed.recovery.lora.inject_lora`, or a module that holds one.
        folder: Where to write; an existing folder is replaced only if it holds an adapter.
        plan: The drop plan, with its scores; None records what is dropped, without scores.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Returns:
        The folder.

    Raises:
        RecoveryError: If there are no adapters.
        ExportError: If the folder holds something else.
        PlanError: If the plan differs from what is dropped from the model.
    """
    transformer = find_transformer(model, name=name)
    folder = as_path(folder, "save_adapter: folder", ExportError)
    check_adapter_folder(folder)
    if not _running(transformer):
        raise RecoveryError(f"save_adapter: {type(transformer).__name__} carries no LoRA adapters.")
    dropped = dropped_sublayers(transformer)
    if plan is not None:
        check_kind(plan, DropPlan, "save_adapter: plan", PlanError)
        check_plan("save_adapter", plan, transformer)
    if plan is not None and tuple(sorted(plan)) != dropped:
        raise PlanError(f"save_adapter: the plan drops {len(plan)} sublayers, but the model lacks {len(dropped)}.")
    if plan is None and dropped:
        plan = DropPlan(tuple(Drop(sublayer) for sublayer in dropped))
    config: Any = copy.copy(peft_config_of(transformer))
    config.inference_mode = True
    config.task_type = "CAUSAL_LM" if predicts_next_token(transformer) else None
    config.target_modules = exactly(transformer, sorted(_running(transformer)))
    config.base_model_name_or_path = getattr(transformer, "name_or_path", "") or None
    weights = _weights(transformer)
    if holds_shards(transformer) and torch.distributed.get_rank():
        return folder  # all ranks gather, one writes
    with replacing(folder) as fresh:
        config.save_pretrained(str(fresh))
        save_file(weights, fresh / WEIGHTS_FILE, metadata={"format": "pt"})
        if plan is not None:
            recorded(plan, transformer).save(fresh / PLAN_FILE)
    return folder


def load_adapter(model: nn.Module, folder: str | Path, *, name: str | None = None) -> None:
    """Load saved LoRA into the base that it was trained on; the rest of the base is frozen.

    Args:
        model: The dropped transformer, without adapters, or a module that holds it.
        folder: What :func:`save_adapter` wrote.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Raises:
        ExportError: If there is no readable adapter in the folder.
        PlanError: If other sublayers are dropped from the base than when the adapter was trained.
        RecoveryError: If the adapter does not fit the base, or is of a kind that layershed does not know.
    """
    from peft import LoraConfig

    transformer = find_transformer(model, name=name)
    folder = as_path(folder, "load_adapter: folder", ExportError)
    try:
        fields = read_mapping(folder / CONFIG_FILE)
        if fields.get("peft_type") != "LORA":
            raise ValueError(f"its peft_type is {fields.get('peft_type')!r}")
        # not by peft's own loader: it acts on every field, and asks the hub if the folder is missing
        config = LoraConfig(**{name: fields[name] for name in SETTINGS if name in fields})
        if isinstance(config.lora_dropout, int):
            config.lora_dropout = float(config.lora_dropout)
        weights = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ExportError(f"load_adapter: {str(folder)!r} holds no readable LoRA adapter ({error}).") from None
    if adapted_modules(transformer):
        raise RecoveryError("load_adapter: the model carries LoRA adapters already; merge or remove them first.")
    unknown = [name for name in _NOT_KNOWN if fields.get(name) not in (None, "none", {}, [], False)]
    if unknown:
        raise RecoveryError(
            f"load_adapter: the adapter has {unknown[0]}={fields[unknown[0]]!r}, which only peft's own loader "
            "supports. Use peft.PeftModel.from_pretrained(base, folder)."
        )
    path = folder / PLAN_FILE
    plan = DropPlan.load(path) if path.is_file() else DropPlan()
    check_plan("load_adapter", plan, transformer)
    planned = tuple(sorted(plan))
    dropped = dropped_sublayers(transformer)
    if planned != dropped:
        names = [", ".join(sublayer.name for sublayer in sublayers) or "nothing" for sublayers in (planned, dropped)]
        raise PlanError(
            f"load_adapter: the adapter was trained on a base without {names[0]}, but this base lacks {names[1]}. "
            "Load the adapter's own base, or bypass its plan (layershed.load_plan) first."
        )
    targets = {key.removeprefix(_PREFIX).rpartition(".lora_")[0] for key in weights}
    linear = dict(transformer.named_modules())
    strangers = sorted(target for target in targets if target not in linear)
    if strangers or not targets:
        raise RecoveryError(f"load_adapter: the model lacks {(strangers or ['nothing'])[0]!r}.")
    _, settings = checked_settings({"targets": targets, "settings": settings_of(config)})
    wrong = next((key for key in sorted(weights) if ".lora_A." in key and weights[key].shape[0] != settings["r"]), None)
    if wrong is not None:  # refused before so much memory is allocated
        raise RecoveryError(f"load_adapter: {wrong} has the rank {weights[wrong].shape[0]}, not r={settings['r']}.")
    inject_at(transformer, targets, settings)
    _load_weights(transformer, weights)


def check_adapter_folder(folder: str | Path, *, apart: Path | None = None) -> None:
    """Refuse a place where :func:`save_adapter` would destroy something else; call it before anything is computed.

    Args:
        folder: Where it would write.
        apart: A folder that must not lie inside.

    Raises:
        ExportError: If it exists and is neither an empty folder nor a saved adapter.
    """
    check_free(folder, mark=CONFIG_FILE, what="saved adapter", apart=apart)


def _weights(transformer: nn.Module) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    # without embeddings: they are not trained, and peft would ask the hub whether they changed
    state = get_peft_model_state_dict(transformer, adapter_name=ADAPTER, save_embedding_layers=False)
    kept = tuple(f"{path}.lora_" for path in _running(transformer))
    return {
        f"{_PREFIX}{key}": whole(tensor).cpu().contiguous() for key, tensor in state.items() if key.startswith(kept)
    }


def _running(transformer: nn.Module) -> list[str]:
    """Paths of the adapted modules outside dropped sublayers, which are not in the saved base."""
    dropped = {id(inner) for module, _ in overridden(transformer) for inner in module.modules()}
    return [path for path, layer in adapted_modules(transformer).items() if id(layer) not in dropped]


def _load_weights(transformer: nn.Module, weights: dict[str, Tensor]) -> None:
    own = _weights(transformer)
    if own.keys() != weights.keys():
        key = sorted(own.keys() ^ weights.keys())[0]
        raise RecoveryError(f"load_adapter: {key} is in the adapter or in the model, but not in both.")
    wrong = next((key for key in sorted(own) if own[key].shape != weights[key].shape), None)
    if wrong is not None:
        raise RecoveryError(
            f"load_adapter: {wrong} has the shape {tuple(weights[wrong].shape)}, not {tuple(own[wrong].shape)}."
        )
    from peft import set_peft_model_state_dict

    with torch.no_grad():
        set_peft_model_state_dict(
            transformer, {key.removeprefix(_PREFIX): tensor for key, tensor in weights.items()}, adapter_name=ADAPTER
        )
