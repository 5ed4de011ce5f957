"""The drops in the config of a saved folder, and models without them, built before any weight is allocated.

A config of ours describes every stand-in (``dropped_modules``). A config that has only upstream's field,
``per_layer_config[i].skip``, says block and kind, and the rest is found in the model.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from layershed.arguments import as_path
from layershed.discovery.find import find_sublayers
from layershed.dropped_config import resolved, stand_in_from
from layershed.errors import ExportError
from layershed.files.untrusted import vet_folder
from layershed.map_checks import empty_maps, map_sizes
from layershed.planning.plan import Sublayer
from layershed.spellings import PreTrainedConfig, layer_overrides
from layershed.stand_ins.contexts import DROPPED_MODULES
from layershed.stand_ins.stand_in import RemovedModule, StandIn
from layershed.stand_ins.watching import watch
from layershed.surgery import bypass, remove


def load_skeleton(source: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model of a folder from its config alone, on the default device; dropped sublayers are bypassed.

    Args:
        source: The folder, or a hub id.
        dtype: Dtype of the weights. They are random, or without memory on the meta device.

    Raises:
        ExportError: If the config is missing, or drops a sublayer that does not exist.
    """
    config = load_config(source)
    model: PreTrainedModel = model_class_of(config)._from_config(config, dtype=dtype)
    maps = {}
    if getattr(config, DROPPED_MODULES, None):
        cores = [stand_in for stand_in in _stand_ins_in(config).values() if stand_in.core]
        gone = {stand_in.sublayer for stand_in in cores}
        sizes = map_sizes({stand_in.sublayer: stand_in.map for stand_in in cores if stand_in.map is not None})
        maps = empty_maps(sizes, gone, model)
    else:
        gone = set(_skipped_sublayers(model, config))
    if gone:
        bypass(model, gone, maps=maps)
    return model.eval()


def as_source(source: str | Path) -> str | Path:
    """The folder of a model, with the home folder for a ``~``; or a hub id as it is.

    Raises:
        ExportError: If it is neither.
    """
    path = as_path(source, "The folder of a model", ExportError)
    return path if path != Path(source) else source


def load_config(source: str | Path) -> PreTrainedConfig:
    """Read the config of a folder or a hub id.

    Raises:
        ExportError: If it is missing or not valid.
    """
    source = as_source(source)
    vet_folder(source)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        _skipped_in(config)  # transformers before 5.20 does not check this field
    except Exception as error:  # transformers and its dataclasses raise errors of many kinds for wrong fields
        if (Path(source) / "config.json").is_file():
            raise ExportError(f"The config.json in {str(source)!r} is not valid ({first_line(error)}).") from None
        raise ExportError(
            f"{str(source)!r} is neither a folder with a config.json nor an accessible model of the hub "
            f"({first_line(error)})."
        ) from None
    return config


def lacks_sublayers(config: PreTrainedConfig) -> bool:
    """Whether a config says that sublayers were dropped."""
    return bool(getattr(config, DROPPED_MODULES, None) or _skipped_in(config))


def skips_sublayers(config: PreTrainedConfig) -> bool:
    """Whether upstream's field says that sublayers were removed."""
    return bool(_skipped_in(config))


def _skipped_in(config: PreTrainedConfig) -> set[tuple[int, str]]:
    """The (block, kind) pairs that upstream's field skips."""
    overrides = layer_overrides(config.get_text_config())
    return {(block, kind) for block, own in overrides.items() for kind in own.get("skip", ())}


def model_class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of transformers that a config names.

    Raises:
        ExportError: If it names none.
    """
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


def skipping(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A subclass whose instances lack what their config skips before upstream allocates or loads a weight."""

    def __init__(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, config, *args, **kwargs)
        if getattr(config, DROPPED_MODULES, None):
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
            f"load_pretrained: dropped_modules in the config is not valid ({first_line(error)})."
        ) from None


def _remove_modules(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Put the stand-ins that the config describes into a skeleton."""
    stand_ins = _stand_ins_in(config)
    said = {(s.sublayer.block, s.sublayer.kind) for s in stand_ins.values() if s.core}
    skipped = _skipped_in(config)
    if skipped and skipped != said:
        (block, kind), *_ = sorted(skipped ^ said)
        raise ExportError(
            f"load_pretrained: the config contradicts itself: only one of per_layer_config and dropped_modules "
            f"drops {kind!r} of block {block}."
        )
    stand_ins = {
        resolved(model, path): replace(s, sublayer=replace(s.sublayer, path=resolved(model, s.sublayer.path)))
        for path, s in stand_ins.items()
    }
    for path, stand_in in stand_ins.items():
        module = dict(model.named_modules()).get(path)
        if module is None or module is model:
            raise ExportError(f"load_pretrained: the config drops {path!r}, but there is no such module.")
        model.set_submodule(path, RemovedModule(stand_in, module))
    watch(model, stand_ins)


def _remove_skipped(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Remove from a skeleton the sublayers that upstream's field skips."""
    remove(model, _skipped_sublayers(model, config))


def _skipped_sublayers(model: PreTrainedModel, config: PreTrainedConfig) -> list[Sublayer]:
    """The sublayers that upstream's field skips; it gives only block and kind."""
    found: dict[tuple[int, str], Sublayer] = {(s.block, s.kind): s for s in find_sublayers(model)}
    wanted = sorted(_skipped_in(config))
    for block, kind in wanted:
        if (block, kind) not in found:
            raise ExportError(f"load_pretrained: the config skips {kind!r} of block {block}, which does not exist.")
    return [found[key] for key in wanted]


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    first, *more = str(error).splitlines() or [type(error).__name__]
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first.rstrip(".")
