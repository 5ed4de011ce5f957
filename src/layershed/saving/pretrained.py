"""Saving a dropped model as a Hugging Face folder, and loading it without its dropped weights.

The folder holds only the kept weights. Its config says what is missing in upstream's own field,
``config.per_layer_config[i].skip``. transformers does not read that field yet (huggingface/transformers#45332) and
would fill the gaps with random weights. So load the folder with :func:`load_pretrained`, or save it with
``standalone=True`` for users without layershed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from layershed.arguments import as_path, check_kind, shown
from layershed.discovery.find import find_sublayers, secure_quantized
from layershed.discovery.model_record import check_plan, recorded
from layershed.dropped_config import mark_dropped, note_dropped, noted_sublayers
from layershed.errors import ExportError, NoSublayersFoundError, PlanError, UnprovenStructureError
from layershed.files.atomic import check_free, replacing
from layershed.map_checks import as_it_runs
from layershed.planning.plan import PLAN_FILE, DropPlan
from layershed.recovery.lora import adapted_modules
from layershed.saving.lora_folder import load_adapter, save_adapter
from layershed.saving.model_card import add_card
from layershed.saving.savable import check_savable, holds_shards, whole
from layershed.saving.skeleton import as_source, first_line, load_config, model_class_of, skipping, skips_sublayers
from layershed.saving.standalone import add_modelling_file
from layershed.stand_ins.carried import dropped_parameter_names, stand_ins_of
from layershed.stand_ins.install import MARK
from layershed.surgery import dropped_sublayers, removed_sublayers

LORA_FOLDER = "adapter"


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    plan: DropPlan | None = None,
    tokenizer: Any = None,
    standalone: bool = False,
    figures: Mapping[str, str] | None = None,
    name: str | None = None,
) -> Path:
    """Write a dropped model as a Hugging Face folder: kept weights as safetensors, and a config that names the dropped.

    LoRA that is not merged goes into the subfolder ``adapter``, in peft's format. A dropped model gets a model card,
    ``README.md``; a card that the user wrote into the folder is kept. The model itself is not changed. The
    folder appears whole or not at all: everything is written beside it first. If FSDP2 shards the model, call it on
    every rank; the first one writes.

    Args:
        model: A transformer with bypassed or removed sublayers (or none), or a module that holds one.
        folder: Where to write; an existing folder is replaced only if it holds a saved model.
        plan: Its drop plan, saved beside the weights as ``drop_plan.json``.
        tokenizer: Saved into the same folder, if given.
        standalone: Add a small modelling file, so that ``AutoModelForCausalLM.from_pretrained(folder,
            trust_remote_code=True)`` gives the same model where layershed is not installed.
        figures: What the run measured, as texts by label, for the model card.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Returns:
        The folder.

    Raises:
        ExportError: If the folder holds something else, or the model is not from Hugging Face.
        PlanError: If the plan differs from what is dropped from the model.
    """
    transformer = check_savable(model, standalone=standalone, name=name)
    folder = as_path(folder, "save_pretrained: folder", ExportError)
    if tokenizer is not None and (isinstance(tokenizer, type) or not hasattr(tokenizer, "save_pretrained")):
        raise ExportError(f"save_pretrained: tokenizer must have save_pretrained, got {shown(tokenizer)}.")
    if plan is not None:
        check_kind(plan, DropPlan, "save_pretrained: plan", PlanError)
    _refuse_meta(transformer)
    dropped = dropped_sublayers(transformer)
    if plan is not None:
        check_plan("save_pretrained", plan, transformer)
    if plan is not None and tuple(sorted(plan)) != dropped:
        raise PlanError(
            f"save_pretrained: the plan drops {len(plan)} sublayers, but the model lacks {len(dropped)} "
            f"({', '.join(s.name for s in dropped) or 'none'}). Give the plan of this model, or none."
        )
    check_folder(folder)
    weights = _weights(transformer)
    if holds_shards(transformer) and torch.distributed.get_rank():
        if adapted_modules(transformer):
            save_adapter(transformer, folder / LORA_FOLDER, plan=plan)
        return folder  # all ranks gather, one writes
    with replacing(folder) as fresh:
        _write(transformer, weights, fresh, standalone)
        if plan is not None:
            as_it_runs(recorded(plan, transformer), transformer).save(fresh / PLAN_FILE)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        if adapted_modules(transformer):
            save_adapter(transformer, fresh / LORA_FOLDER, plan=plan)
        add_card(fresh, transformer, plan, figures, former=folder)
    return folder


def load_pretrained(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load what :func:`save_pretrained` wrote: the same logits, bit for bit, with its quantization and LoRA.

    The skeleton is built on the meta device, without memory. Its dropped sublayers are removed before the weights are
    loaded. Loading is strict: no weight is random and none is left over. The residual identity of the remaining
    sublayers is proven anew.

    Args:
        folder: The folder, or a hub id; a model without dropped sublayers loads as well.
        kwargs: As of ``PreTrainedModel.from_pretrained``, such as ``dtype``, ``device_map`` or ``attn_implementation``.
            The dtype is the saved one unless given.

    Returns:
        The model in eval mode; ``dropped_sublayers(model)`` lists what it lacks.

    Raises:
        ExportError: If the folder or a skipped sublayer does not exist, or a weight is missing or left over.
    """
    folder = as_source(folder)
    config = load_config(folder)
    model, problems = _read(folder, config, kwargs)
    if problems and _may_be_dense(config, model, problems):
        raise ExportError(
            f"load_pretrained: the config of {folder} says that sublayers were dropped, but their weights are there "
            "without a mark. To load the dense model, delete dropped_modules from config.json. If another tool saved "
            "the dropped model, delete it, too, load the model, then call layershed.bypass(model, plan)."
        )
    for flipped in _constructor_options(type(model)):
        if not problems.keys() & {"missing_keys", "unexpected_keys"}:
            break
        other, others = _read(folder, config, {**kwargs, **flipped})
        if not others.keys() & {"missing_keys", "unexpected_keys"}:
            model, problems = other, others
    for problem, keys in problems.items():
        raise ExportError(f"load_pretrained: {folder} {_described(problem, keys)}")
    note_dropped(model.config, stand_ins_of(model), model)
    secure_quantized(model)
    try:
        find_sublayers(model)
    except NoSublayersFoundError as error:
        if not removed_sublayers(model):
            raise ExportError(f"load_pretrained: {folder}: {error}") from None
    except UnprovenStructureError as error:
        raise ExportError(f"load_pretrained: {folder}: {error}") from None
    if (Path(folder) / LORA_FOLDER).is_dir():
        load_adapter(model, Path(folder) / LORA_FOLDER)
    return model


def _read(folder: str | Path, config: Any, kwargs: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, list[str]]]:
    """The model that a config describes with the weights of a folder, and by problem the keys that do not fit."""
    model_class = model_class_of(config)
    # so mismatched shapes are reported
    options = {"dtype": "auto", **kwargs, "ignore_mismatched_sizes": True}
    try:
        model, report = skipping(model_class).from_pretrained(
            folder, config=config, output_loading_info=True, use_safetensors=True, **options
        )
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"load_pretrained: {folder} has no readable safetensors weights ({first_line(error)})."
        ) from None
    except NotImplementedError as error:  # transformers compares tied weights, one of which does not fit
        raise ExportError(
            f"load_pretrained: {folder}: a weight does not fit the model of its config ({first_line(error):.150}). "
            "Save the model before its layers are replaced."
        ) from None
    model.__class__ = model_class
    report["unexpected_keys"] = _left_over(report["unexpected_keys"], stand_ins_of(model))
    names = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    return model, {name: sorted(map(str, report[name])) for name in names if report.get(name)}


def _constructor_options(model_class: type[PreTrainedModel]) -> Iterator[dict[str, bool]]:
    """Other values of a constructor's yes-or-no options, such as ``add_pooling_layer``: no config records them."""
    parameters = inspect.signature(model_class.__init__).parameters.values()
    options = [parameter for parameter in parameters if isinstance(parameter.default, bool)]
    for number in range(1, len(options) + 1):
        for chosen in combinations(options, number):
            yield {option.name: not option.default for option in chosen}


def _may_be_dense(config: Any, model: PreTrainedModel, problems: dict[str, list[str]]) -> bool:
    """Whether a folder has unmarked weights of every dropped sublayer, and nothing else that does not fit.

    Then perhaps the dense model was saved, and its config object is that of a dropped one; transformers would have
    marked a dropped one, other tools perhaps not.
    """
    keys = problems.get("unexpected_keys", [])
    dropped = [f"{path}." for path, stand_in in stand_ins_of(model).items() if stand_in.core]
    return (
        problems.keys() == {"unexpected_keys"}
        and bool(noted_sublayers(config))
        and not skips_sublayers(config)
        and not any(key.endswith(MARK) for key in keys)
        and all(any(key.startswith(path) for key in keys) for path in dropped)
    )


def _left_over(keys: Collection[str], dropped: Iterable[str]) -> set[str]:
    """Keys of a folder that belong to nothing.

    Others save a bypassed model whole: with the weights of what is dropped, and marked.
    """
    below = tuple(f"{path}." for path in dropped) if any(key.endswith(MARK) for key in keys) else ()
    return {key for key in keys if not key.startswith(below)}


def _described(problem: str, keys: list[str]) -> str:
    """What is wrong with the keys of a folder, as the end of a sentence."""
    shown = f"has {problem.replace('_', ' ')}: {', '.join(keys[:3])}."
    if any(".base_layer." in key for key in keys) or any("lora_" in key for key in keys):
        return f"{shown} It holds LoRA adapters inside the model: save with layershed.save_pretrained, or merge first."
    if any(key.endswith(MARK) for key in keys):
        return (
            f"{shown} Sublayers were dropped when it was saved, and its config does not say which. Save the model with "
            "its config."
        )
    return shown


def load_plan(folder: str | Path) -> DropPlan | None:
    """The drop plan saved beside a model's weights, or None."""
    path = as_path(folder, "load_plan: folder", PlanError) / PLAN_FILE
    return DropPlan.load(path) if path.is_file() else None


def check_folder(folder: str | Path, *, apart: Path | None = None) -> None:
    """Refuse a place where :func:`save_pretrained` would destroy something else; call it before anything is computed.

    Args:
        folder: Where it would write.
        apart: A folder that must not lie inside.

    Raises:
        ExportError: If it exists and is neither an empty folder nor a saved model.
    """
    check_free(folder, mark="config.json", what="saved model", apart=apart)


def _refuse_meta(transformer: PreTrainedModel) -> None:
    # with a device map, transformers itself fetches the weights
    if getattr(transformer, "hf_device_map", None) is None and any(p.is_meta for p in transformer.parameters()):
        raise ExportError(
            f"save_pretrained: weights of {type(transformer).__name__} are on the meta device: it is a skeleton, or "
            "offloaded. Undo an offload first: accelerate.hooks.remove_hook_from_submodules(model)."
        )


def _weights(transformer: PreTrainedModel) -> dict[str, Tensor]:
    """The weights to save, every tensor whole: without those of dropped sublayers and of LoRA."""
    left_out = dropped_parameter_names(transformer)
    # peft's wrapper keeps the weights of its module under another name, beside its own
    adapted = tuple(f"{path}." for path in adapted_modules(transformer))
    return {
        name.replace(".base_layer.", ".") if name.startswith(adapted) else name: whole(tensor)
        for name, tensor in transformer.state_dict().items()
        if name not in left_out and not (name.startswith(adapted) and ".base_layer." not in name)
    }


def _write(transformer: PreTrainedModel, weights: dict[str, Tensor], folder: Path, standalone: bool) -> None:
    stand_ins = stand_ins_of(transformer)
    config = copy.deepcopy(transformer.config)
    note_dropped(config, {})  # it may be about another model with the same config object
    if stand_ins:
        mark_dropped(config, stand_ins)
    # Upstream writes the weights it is given (in shards, tied ones once) and the model's config. If the model has a
    # quantizer, it writes all weights instead.
    own = {name: value for name, value in vars(transformer).items() if name in ("config", "hf_quantizer")}
    transformer.__dict__.update(config=config, hf_quantizer=None)
    try:
        transformer.save_pretrained(folder, state_dict=weights)
    finally:
        del transformer.__dict__["hf_quantizer"]
        transformer.__dict__.update(own)
    if standalone:
        add_modelling_file(folder, transformer)
