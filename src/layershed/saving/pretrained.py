"""Saving a dropped model as a Hugging Face folder, and loading it without its dropped weights.

The folder holds only the kept weights and says what is missing in upstream's own field,
``config.per_layer_config[i].skip``. transformers itself does not read that field yet (huggingface/transformers#45332):
it would fill the gaps with random weights, which is why :func:`load_pretrained` exists, and ``standalone=True`` for
those who do not have this package.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from layershed.discovery.find import find_sublayers, find_transformer, refuse_strangers, secure_quantized
from layershed.errors import ExportError, NoSublayersFoundError, PlanError, UnprovenStructureError
from layershed.files.atomic import check_free, replacing
from layershed.files.untrusted import vet_folder
from layershed.planning.plan import DropPlan, Sublayer
from layershed.recovery.lora import ADAPTER, adapted_modules
from layershed.saving.lora_folder import PLAN_FILE, holds_shards, load_adapter, save_adapter, whole
from layershed.saving.standalone import add_modelling_file
from layershed.stand_ins.stand_in import RemovedModule, StandIn
from layershed.surgery import (
    bypass,
    dropped_parameter_names,
    dropped_sublayers,
    mark_dropped,
    remove,
    removed_sublayers,
    stand_in_from,
    stand_ins_of,
)

ADAPTER_FOLDER = "adapter"


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    plan: DropPlan | None = None,
    tokenizer: Any = None,
    standalone: bool = False,
    name: str | None = None,
) -> Path:
    """Write a dropped model as a Hugging Face folder: kept weights as safetensors, and a config that says what is gone.

    Recovery adapters that are not merged go into a subfolder of their own, ``adapter``, in peft's format.

    The model itself is not changed. The folder appears whole or not at all: everything is written beside it first. Of
    a model that FSDP2 shards, call it on every rank; the first one writes.

    Args:
        model: A transformer with bypassed or removed sublayers (or none), or a module that holds one.
        folder: Where to write; an existing folder is replaced only if it holds a saved model.
        plan: Its drop plan, saved beside the weights as ``drop_plan.json``.
        tokenizer: Saved into the same folder, if given.
        standalone: Add a small modelling file, so that ``AutoModelForCausalLM.from_pretrained(folder,
            trust_remote_code=True)`` gives the same model where layershed is not installed.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Returns:
        The folder.

    Raises:
        ExportError: If the folder holds something else, or it is no Hugging Face model.
        PlanError: If the plan is not what is dropped from the model.
    """
    transformer = find_transformer(model, name=name)
    if not isinstance(transformer, PreTrainedModel):
        raise ExportError(
            f"save_pretrained: {type(transformer).__name__} is no Hugging Face model; layershed.remove(model) takes "
            "out what is bypassed, and then it can be saved as any other of its kind."
        )
    refuse_strangers(transformer)
    _refuse_adapters(transformer, standalone)
    dropped = dropped_sublayers(transformer)
    if plan is not None and tuple(sorted(plan)) != dropped:
        raise PlanError(
            f"save_pretrained: the plan drops {len(plan)} sublayers and the model lacks {len(dropped)} "
            f"({', '.join(s.name for s in dropped) or 'none'}); they must be the same."
        )
    folder = Path(folder)
    check_folder(folder)
    weights = _weights(transformer)
    if holds_shards(transformer) and torch.distributed.get_rank():
        if adapted_modules(transformer):
            save_adapter(transformer, folder / ADAPTER_FOLDER, plan=plan)
        return folder  # gathering takes all ranks, writing one
    with replacing(folder) as fresh:
        _write(transformer, weights, fresh, standalone)
        if plan is not None:
            plan.save(fresh / PLAN_FILE)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        if adapted_modules(transformer):
            save_adapter(transformer, fresh / ADAPTER_FOLDER, plan=plan)
    return folder


def load_pretrained(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load what :func:`save_pretrained` wrote: the same logits, bit for bit, quantized and adapted as it was.

    The skeleton is built without memory (on the meta device), its dropped sublayers are removed, and only then do the
    weights come, strictly: nothing is made up at random and nothing is left over. The residual identity of what is
    left is proven anew.

    Args:
        folder: The folder, or a hub id; a model without dropped sublayers loads as well.
        kwargs: As of ``PreTrainedModel.from_pretrained``, such as ``dtype``, ``device_map`` or ``attn_implementation``.
            The dtype is the saved one unless given.

    Returns:
        The model in eval mode; ``dropped_sublayers(model)`` tells what it lacks.

    Raises:
        ExportError: If there is no such folder, a weight is missing or left over, or a skipped one does not exist.
    """
    config = load_config(folder)
    model_class = _model_class(config)
    # mismatched shapes are reported then, and refused below
    options = {"dtype": "auto", **kwargs, "ignore_mismatched_sizes": True}
    try:
        model, report = _skipping(model_class).from_pretrained(
            folder, config=config, output_loading_info=True, use_safetensors=True, **options
        )
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"load_pretrained: {folder} has no readable safetensors weights ({_first_line(error)})."
        ) from None
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report.get(problem):
            found = sorted(map(str, report[problem]))
            raise ExportError(f"load_pretrained: {folder} has {problem.replace('_', ' ')}: {', '.join(found[:3])}.")
    model.__class__ = model_class
    secure_quantized(model)
    try:
        find_sublayers(model)
    except NoSublayersFoundError as error:
        if not removed_sublayers(model):
            raise ExportError(f"load_pretrained: {folder}: {error}") from None
    except UnprovenStructureError as error:
        raise ExportError(f"load_pretrained: {folder}: {error}") from None
    if (Path(folder) / ADAPTER_FOLDER).is_dir():
        load_adapter(model, Path(folder) / ADAPTER_FOLDER)
    return model


def load_skeleton(source: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model that a folder holds, from its config alone and on the default device: what it lacks is bypassed.

    Args:
        source: The folder, or a hub id.
        dtype: Of the weights, which are random, or none on the meta device.

    Raises:
        ExportError: If there is no such config, or it drops what does not exist.
    """
    config = load_config(source)
    model: PreTrainedModel = _model_class(config)._from_config(config, dtype=dtype)
    if getattr(config, "dropped_modules", None):
        gone = {stand_in.sublayer for stand_in in _stand_ins_in(config).values() if stand_in.core}
    else:
        gone = set(_skipped_sublayers(model, config))
    if gone:
        bypass(model, gone)
    return model.eval()


def load_config(source: str | Path) -> PreTrainedConfig:
    """The config of a folder or a hub id.

    Raises:
        ExportError: If there is none.
    """
    vet_folder(source)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # whatever transformers and its dataclasses raise for fields that mean nothing to them
        if (Path(source) / "config.json").is_file():
            raise ExportError(f"The config.json in {str(source)!r} is not valid ({_first_line(error)}).") from None
        raise ExportError(
            f"{str(source)!r} is neither a folder with a config.json nor a model that the hub gives out "
            f"({_first_line(error)})."
        ) from None


def lacks_sublayers(config: PreTrainedConfig) -> bool:
    """Whether a config says that sublayers were dropped."""
    return bool(getattr(config, "dropped_modules", None) or _skipped_in(config))


def _skipped_in(config: PreTrainedConfig) -> set[tuple[int, str]]:
    """What upstream's field says is skipped: (block, kind)."""
    text_config = config.get_text_config()
    if not text_config.is_heterogeneous:
        return set()
    layers = range(getattr(text_config, "num_hidden_layers", 0))
    return {(i, kind) for i in layers for kind in getattr(text_config.per_layer_config[i], "skip", None) or ()}


def load_plan(folder: str | Path) -> DropPlan | None:
    """The drop plan saved beside a model's weights, or None."""
    path = Path(folder) / PLAN_FILE
    return DropPlan.load(path) if path.is_file() else None


def check_folder(folder: str | Path, *, apart: Path | None = None) -> None:
    """Refuse, before anything is computed, a place where :func:`save_pretrained` would destroy something else.

    Args:
        folder: Where it would write.
        apart: A folder that must not lie inside.

    Raises:
        ExportError: If it exists and is neither an empty folder nor a saved model.
    """
    check_free(folder, mark="config.json", what="saved model", apart=apart)


def _first_line(error: Exception) -> str:
    first, *more = str(error).splitlines() or [type(error).__name__]
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first.rstrip(".")


def _weights(transformer: PreTrainedModel) -> dict[str, Tensor]:
    """What is saved: neither what is dropped nor adapters, and every tensor whole."""
    left_out = dropped_parameter_names(transformer)
    # a wrapper of peft keeps the weights of its module under another name, beside its own
    adapted = tuple(f"{path}." for path in adapted_modules(transformer))
    return {
        name.replace(".base_layer.", ".") if name.startswith(adapted) else name: whole(tensor)
        for name, tensor in transformer.state_dict().items()
        if name not in left_out and not (name.startswith(adapted) and ".base_layer." not in name)
    }


def _write(transformer: PreTrainedModel, weights: dict[str, Tensor], folder: Path, standalone: bool) -> None:
    stand_ins = stand_ins_of(transformer)
    config = copy.deepcopy(transformer.config)
    if stand_ins:
        mark_dropped(config, stand_ins)
    # upstream writes the weights it is given, in shards and with tied ones once, and the config that it sees; but of a
    # model with a quantizer all that it has
    own = {name: value for name, value in vars(transformer).items() if name in ("config", "hf_quantizer")}
    transformer.__dict__.update(config=config, hf_quantizer=None)
    try:
        transformer.save_pretrained(folder, state_dict=weights)
    finally:
        del transformer.__dict__["hf_quantizer"]
        transformer.__dict__.update(own)
    if standalone:
        add_modelling_file(folder, transformer)


def _refuse_adapters(transformer: PreTrainedModel, standalone: bool) -> None:
    others = set(getattr(transformer, "peft_config", ())) - {ADAPTER}
    if others or any(".base_layer." in key for key in transformer.state_dict()) > bool(adapted_modules(transformer)):
        raise ExportError(
            "save_pretrained: the model carries adapters of peft; merge them first (merge_and_unload()), or save them "
            "by peft's own save_pretrained."
        )
    if standalone and adapted_modules(transformer):
        raise ExportError(
            "save_pretrained: standalone=True takes no adapters; merge them first (layershed.merge_lora)."
        )


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    found: Any
    names = config.architectures or []
    if names:
        # a standalone folder's own class is one of transformers' with another name
        found = getattr(transformers, names[0], None) or getattr(transformers, names[0].removeprefix("Dropped"), None)
    else:
        found = AutoModelForCausalLM._model_mapping.get(type(config), None)
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    if not is_model or not isinstance(config, getattr(found, "config_class", ())):
        raise ExportError(f"load_pretrained: the config names no model that transformers has (architectures: {names}).")
    return found


def _skipping(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass whose instances lack what their config skips before upstream allocates or loads a weight."""

    def __init__(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        if getattr(config, "dropped_modules", None):
            _remove_modules(self, config)
        elif _skipped_in(config):
            _remove_skipped(self, config)

    return type(model_class.__name__, (model_class,), {"__init__": __init__, "__module__": model_class.__module__})


def _stand_ins_in(config: PreTrainedConfig) -> dict[str, StandIn]:
    """The stand-ins that a config describes."""
    try:
        return {path: stand_in_from(fields) for path, fields in config.dropped_modules.items()}
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise ExportError(
            f"load_pretrained: dropped_modules in the config is not valid ({_first_line(error)})."
        ) from None


def _remove_modules(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Put the stand-ins that the config describes into a skeleton."""
    stand_ins = _stand_ins_in(config)
    said = {(s.sublayer.block, s.sublayer.kind) for s in stand_ins.values() if s.core}
    skipped = _skipped_in(config)
    if skipped and skipped != said:
        (block, kind), *_ = sorted(skipped ^ said)
        raise ExportError(
            f"load_pretrained: the config contradicts itself about {kind!r} of block {block}, which only one of "
            "per_layer_config and dropped_modules drops."
        )
    for path, stand_in in stand_ins.items():
        module = dict(model.named_modules()).get(path)
        if module is None or module is model:
            raise ExportError(f"load_pretrained: the config drops {path!r}, and there is no such module.")
        model.set_submodule(path, RemovedModule(stand_in, module))


def _remove_skipped(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Remove from a skeleton what upstream's field skips."""
    remove(model, _skipped_sublayers(model, config))


def _skipped_sublayers(model: PreTrainedModel, config: PreTrainedConfig) -> list[Sublayer]:
    """What upstream's field skips, of which it says no more than block and kind."""
    found: dict[tuple[int, str], Sublayer] = {(s.block, s.kind): s for s in find_sublayers(model)}
    wanted = sorted(_skipped_in(config))
    for block, kind in wanted:
        if (block, kind) not in found:
            raise ExportError(f"load_pretrained: the config skips {kind!r} of block {block}, which does not exist.")
    return [found[key] for key in wanted]
