"""A modelling file for those who do not have layershed: the stand-ins, and which modules they stand in for."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import transformers
from jinja2 import Environment, PackageLoader, StrictUndefined
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from layershed import standins
from layershed.errors import ExportError

MODULE = "modeling_dropped"


def add_modelling_file(folder: Path, model_class: type[PreTrainedModel]) -> None:
    """Add a modelling file to a saved folder, and name it in the config's ``auto_map``.

    Args:
        folder: What ``save_pretrained`` of transformers wrote.
        model_class: The model's class, one of transformers' own.

    Raises:
        ExportError: If the class is not one that transformers hands out by its name.
    """
    base = model_class.__name__
    if getattr(transformers, base, None) is not model_class:
        raise ExportError(f"save_pretrained(standalone=True): {base} is not a class of transformers itself.")
    environment = Environment(loader=PackageLoader("layershed"), undefined=StrictUndefined, keep_trailing_newline=True)
    source = environment.get_template("modeling_dropped.py.jinja").render(
        base=base, standins=inspect.getsource(standins)
    )
    (folder / f"{MODULE}.py").write_text(source, encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = dict.fromkeys(_auto_classes(base), f"{MODULE}.Dropped{base}")
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _auto_classes(base: str) -> list[str]:
    """The auto classes of transformers that hand out a model class."""
    found = []
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None) if name.startswith("AutoModel") else None
        names = mapping._model_mapping.values() if mapping is not None else ()
        if any(base == entry or (isinstance(entry, tuple | list) and base in entry) for entry in names):
            found.append(name)
    return found
