"""Saving a dropped model that is not from Hugging Face, and loading it into an instance of the user's own class.

The folder holds the kept weights (``model.safetensors``), the drop plan, and ``layershed.json``, which names the class
that the SublayerAdapter is registered for. The user builds the dense model; :func:`load_weights` removes from it what
the plan drops.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from layershed.arguments import as_path
from layershed.discovery.find import find_transformer
from layershed.discovery.model_record import check_plan, model_record, recorded
from layershed.discovery.registry import registered_class
from layershed.errors import ExportError, PlanError
from layershed.files.atomic import check_free, replacing
from layershed.files.untrusted import read_mapping
from layershed.map_checks import as_it_runs, empty_maps, map_sizes, map_sizes_from
from layershed.planning.plan import PLAN_FILE, Drop, DropPlan
from layershed.recovery.lora import adapted_modules
from layershed.saving.lora_folder import load_adapter, save_adapter
from layershed.saving.savable import holds_shards, refuse_packed, whole
from layershed.stand_ins.carried import dropped_parameter_names, maps_of
from layershed.stand_ins.install import MARK
from layershed.surgery import bypass, dropped_sublayers, remove

OWN_FILE, WEIGHTS_FILE, LORA_FOLDER = "layershed.json", "model.safetensors", "adapter"


def save_weights(
    model: nn.Module, folder: str | Path, *, plan: DropPlan | None = None, name: str | None = None
) -> Path:
    """Write the kept weights of a dropped model that has a SublayerAdapter, and its plan.

    LoRA that is not merged goes into the subfolder ``adapter``. The model itself is not changed. The folder appears
    whole or not at all.

    Args:
        model: A model whose class has a SublayerAdapter, or a module that holds one.
        folder: Where to write; an existing folder is replaced only if it holds a saved model.
        plan: Its drop plan, with scores; None records what is dropped, without scores.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Returns:
        The folder.

    Raises:
        ExportError: If the folder holds something else, or FSDP2 shards the model.
        PlanError: If the plan differs from what is dropped from the model.
    """
    transformer = check_own_savable(model, name=name)
    folder = as_path(folder, "save_weights: folder", ExportError)
    check_own_folder(folder)
    dropped = dropped_sublayers(transformer)
    if plan is not None:
        check_plan("save_weights", plan, transformer)
    if plan is not None and tuple(sorted(plan)) != dropped:
        raise PlanError(
            f"save_weights: the plan drops {len(plan)} sublayers, but the model lacks {len(dropped)}. Give the plan of "
            "this model, or none."
        )
    if plan is None and dropped:
        plan = DropPlan(tuple(Drop(sublayer) for sublayer in dropped))
    weights, aliases = _weights(transformer)
    noted = {"format": 1, "adapter": _name_of(transformer), "aliases": aliases, "maps": map_sizes(maps_of(transformer))}
    with replacing(folder) as fresh:
        save_file(weights, fresh / WEIGHTS_FILE, metadata={"format": "pt"})
        (fresh / OWN_FILE).write_text(json.dumps(noted, indent=2) + "\n", encoding="utf-8")
        if plan is not None:
            as_it_runs(recorded(plan, transformer), transformer).save(fresh / PLAN_FILE)
        if adapted_modules(transformer):
            save_adapter(transformer, fresh / LORA_FOLDER, plan=plan)
    return folder


def load_weights(model: nn.Module, folder: str | Path, *, name: str | None = None) -> None:
    """Load what :func:`save_weights` wrote into a dense model, newly built: remove what is dropped, then load strictly.

    Args:
        model: An instance of the saved class, built with the same sizes, or a module that holds one. It is changed only
            if its class and its blocks fit.
        folder: The folder.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Raises:
        ExportError: If the folder is not readable, or the model or its weights do not fit.
        PlanError: If the saved plan is for another model.
    """
    transformer, folder = find_transformer(model, name=name), as_path(folder, "load_weights: folder", ExportError)
    try:
        noted = read_mapping(folder / OWN_FILE)
        saved, aliases = noted["adapter"], dict(noted["aliases"])
        sizes = map_sizes_from(noted.get("maps"))
        weights = load_file(folder / WEIGHTS_FILE)
        weights.update({alias: weights[first] for alias, first in aliases.items()})
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ExportError(f"load_weights: {str(folder)!r} holds no model of save_weights ({error}).") from None
    if saved != _name_of(transformer):
        raise ExportError(
            f"load_weights: {str(folder)!r} was saved from a {saved}, but the model is a {_name_of(transformer)}. "
            "Build the saved class."
        )
    path = folder / PLAN_FILE
    plan = DropPlan.load(path) if path.is_file() else DropPlan()
    check_plan("load_weights", plan, transformer, model_record(transformer))
    already = set(dropped_sublayers(transformer))
    if already - set(plan):
        raise ExportError("load_weights: the model lacks sublayers that were saved. Build it anew.")
    own = {key: value for key, value in transformer.state_dict().items() if isinstance(value, Tensor)}
    if wrong := [key for key in weights if key in own and own[key].shape != weights[key].shape]:
        raise ExportError(
            f"load_weights: {wrong[0]} has the shape {tuple(weights[wrong[0]].shape)}, not "
            f"{tuple(own[wrong[0]].shape)}. Build the model with the saved sizes."
        )
    if set(plan) - already:
        if sizes:
            bypass(transformer, plan, maps=empty_maps(sizes, plan, transformer))
        remove(transformer, plan)
    report = transformer.load_state_dict(weights, strict=False)
    missing = [key for key in report.missing_keys if not key.endswith(MARK)]
    if missing or report.unexpected_keys:
        kind, key = ("missing", missing[0]) if missing else ("left over", report.unexpected_keys[0])
        raise ExportError(f"load_weights: {str(folder)!r}: {key} is {kind}. Build the model with the saved sizes.")
    if (folder / LORA_FOLDER).is_dir():
        load_adapter(transformer, folder / LORA_FOLDER)


def check_own_savable(model: nn.Module, *, name: str | None = None) -> nn.Module:
    """Refuse a model that :func:`save_weights` cannot save; call it before anything is computed.

    Returns:
        The transformer.

    Raises:
        ExportError: If it is from Hugging Face, FSDP2 shards it, or it holds something that is no tensor.
    """
    transformer = find_transformer(model, name=name)
    kind = type(transformer).__name__
    if isinstance(transformer, PreTrainedModel):
        raise ExportError(f"save_weights: {kind} is a Hugging Face model. Use layershed.save_pretrained.")
    if holds_shards(transformer):
        raise ExportError(
            f"save_weights: FSDP2 shards the weights of {kind}, which is not supported. Gather them first."
        )
    refuse_packed(transformer, "save_weights")
    return transformer


def check_own_folder(folder: str | Path, *, apart: Path | None = None) -> None:
    """Refuse a place where :func:`save_weights` would destroy something else; call it before anything is computed.

    Args:
        folder: Where it would write.
        apart: A folder that must not lie inside.

    Raises:
        ExportError: If it exists and is neither an empty folder nor a saved model.
    """
    check_free(folder, mark=OWN_FILE, what="saved model", apart=apart)


def _name_of(transformer: nn.Module) -> str:
    """Name of the class that the SublayerAdapter is registered for; without its module, which may move."""
    found = registered_class(transformer)
    if found is None:
        raise ExportError(
            f"{type(transformer).__name__} has no SublayerAdapter. Call layershed.register_adapter first."
        )
    return found.__qualname__


def _weights(transformer: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The kept weights without LoRA, each once, and by name the weight that it shares."""
    gone, adapted = dropped_parameter_names(transformer), tuple(f"{path}." for path in adapted_modules(transformer))
    kept: dict[str, Tensor] = {}
    first: dict[Any, str] = {}
    aliases: dict[str, str] = {}
    for key, tensor in transformer.state_dict().items():
        inside = key.startswith(adapted)
        if key in gone or key.endswith(MARK) or (inside and ".base_layer." not in key):
            continue
        saved = key.replace(".base_layer.", ".") if inside else key
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else saved
        if place in first:
            aliases[saved] = first[place]
        else:
            first[place], kept[saved] = saved, whole(tensor).cpu().clone().contiguous()
    return kept, aliases
