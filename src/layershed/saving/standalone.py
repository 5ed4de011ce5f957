"""A modelling file for users without layershed: the stand-ins, and the modules that they replace."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from jinja2 import Environment, PackageLoader, StrictUndefined
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from layershed import spellings
from layershed.errors import ExportError, LayershedError, StandInError
from layershed.stand_ins import linear_map, stand_in, watching

MODULE = "modeling_dropped"


def add_modelling_file(folder: Path, transformer: PreTrainedModel) -> None:
    """Add a modelling file to a saved folder, and name it in the config's ``auto_map``.

    Args:
        folder: A folder that ``save_pretrained`` of transformers wrote.
        transformer: The saved model.

    Raises:
        ExportError: If transformers has no class of that name, or another one.
    """
    check_standalone(transformer)
    base, body = type(transformer).__name__, type(transformer.base_model).__name__
    environment = Environment(loader=PackageLoader("layershed.saving"), undefined=StrictUndefined, trim_blocks=True)
    template = environment.get_template("modeling_dropped.py.jinja")
    classes = {base: ""}
    if _is_upstream(transformer.base_model):
        classes[body] = "" if body == base else f"{transformer.base_model_prefix}."
    source = template.render(base=base, classes=classes, standins=_sources())
    (folder / f"{MODULE}.py").write_text(source, encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # any other auto class would fill the dropped parts with random weights, and at most mention it in a report
    config["auto_map"] = {}
    for auto, mapping in _mappings():
        given = next((name for name in classes if _hands_out(mapping, name)), None)
        if given is not None or type(transformer).config_class in mapping:
            config["auto_map"][auto] = f"{MODULE}.{f'Dropped{given}' if given else 'Refused'}"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_standalone(transformer: PreTrainedModel) -> None:
    """Refuse a model for which no modelling file can be written.

    Raises:
        ExportError: If transformers has no class of that name, or another one.
    """
    if not _is_upstream(transformer):
        raise ExportError(
            f"save_pretrained(standalone=True): {type(transformer).__name__} is not a class of transformers itself. "
            "Leave standalone out."
        )


def auto_class_of(folder: Path) -> str | None:
    """The auto class of transformers that gives the whole model of a standalone folder; None of another one."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    wholes = [f"{MODULE}.Dropped{base}" for base in config.get("architectures") or ()]
    loads = [auto for auto, name in (config.get("auto_map") or {}).items() if name in wholes]
    return next((auto for auto in loads if auto == "AutoModelForCausalLM"), next(iter(loads), None))


def _sources() -> str:
    """The text of the four files, and of the error that they raise, as one that imports nothing of layershed."""
    sources: tuple[Any, ...] = (spellings, LayershedError, StandInError, linear_map, stand_in, watching)
    first, *others = (inspect.getsource(source) for source in sources)
    lines = [line for text in others for line in f"\n\n{text}".splitlines(keepends=True)]
    return first + "".join(line for line in lines if not line.startswith(("from __future__", "from layershed")))


def _is_upstream(model: PreTrainedModel) -> bool:
    return getattr(transformers, type(model).__name__, None) is type(model)


def _mappings() -> Iterator[tuple[str, Any]]:
    """The auto classes of transformers, with what they map configs to."""
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if name.startswith("AutoModel") and mapping is not None:
            yield name, mapping


def _hands_out(mapping: Any, base: str) -> bool:
    """Whether an auto class hands out a model class."""
    entries = mapping._model_mapping.values()
    return any(base == entry or (isinstance(entry, tuple | list) and base in entry) for entry in entries)
