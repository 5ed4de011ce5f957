"""The model card of a saved folder: its base, what was dropped, the figures of its run, how to load it, its licence."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from jinja2 import Environment, PackageLoader, StrictUndefined
from transformers import PreTrainedModel

from layershed.formatting import counts_of, printable, short_count
from layershed.performance.model_size import weight_sizes
from layershed.planning.notation import short_importance
from layershed.planning.plan import Drop, DropPlan
from layershed.quantization import quantization_of
from layershed.recovery.lora import adapted_modules
from layershed.saving.standalone import auto_class_of
from layershed.spellings import PreTrainedConfig
from layershed.stand_ins.carried import maps_of
from layershed.surgery import dropped_sublayers

CARD_FILE = "README.md"
UNKNOWN = "unknown"  # the hub's own word for a licence that nobody knows
MARK = "layershed writes this card anew with the model. Delete this line to keep your own text."
_NAME = "dropped_from"  # in the header, the name of a base that is not of the hub
_LONGEST = 1_000_000


def add_card(
    folder: Path,
    transformer: PreTrainedModel,
    plan: DropPlan | None = None,
    figures: Mapping[str, str] | None = None,
    *,
    former: Path | None = None,
) -> None:
    """Add a model card to a folder that ``save_pretrained`` of transformers wrote.

    A model without drops gets no card. A card of the user, which lacks the mark of ours, is kept.

    Args:
        folder: The folder.
        transformer: The saved model.
        plan: Its drop plan; None lists the dropped sublayers without importances.
        figures: What the run measured, by label.
        former: The folder that this one replaces.
    """
    theirs = None if former is None else former / CARD_FILE
    if theirs is not None and theirs.is_file() and MARK not in _text(theirs):
        shutil.copyfile(theirs, folder / CARD_FILE)
    elif dropped := dropped_sublayers(transformer):
        maps = maps_of(transformer)
        unplanned = (Drop(sublayer, action="linear" if sublayer in maps else "bypass") for sublayer in dropped)
        drops = plan.drops if plan else tuple(unplanned)
        text = model_card(transformer, drops, plan, figures or {}, auto_class_of(folder))
        (folder / CARD_FILE).write_text(text, encoding="utf-8")


def model_card(
    transformer: PreTrainedModel,
    drops: Sequence[Drop],
    plan: DropPlan | None,
    figures: Mapping[str, str],
    auto_class: str | None,
) -> str:
    """The text of a model card, with the YAML header that the hub reads.

    Args:
        transformer: The dropped model.
        drops: What was dropped.
        plan: The plan, for its scope and metric.
        figures: What the run measured, by label.
        auto_class: The auto class of transformers that loads a standalone folder; None if it is not standalone.
    """
    source = str(getattr(transformer.config, "name_or_path", "") or "")
    base, licence = base_of(source), licence_of(source, transformer.config)
    causal = type(transformer).__name__.endswith("ForCausalLM")
    named = base if is_hub_id(base) else Path(base).name
    of_hub: dict[str, Any] = {"base_model": base} if is_hub_id(base) else {_NAME: named} if base else {}
    data = ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation" if causal else None,
        tags=["layershed", "layer-dropping", *(["custom_code"] if auto_class else [])],
        **of_hub,
    )
    quantized = quantization_of(transformer)
    environment = Environment(
        loader=PackageLoader("layershed.saving"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(plain=_plain, importance=short_importance)
    return environment.get_template("model_card.md.jinja").render(
        header=data.to_yaml().strip(),
        mark=MARK,
        base=named,
        kind=type(transformer).__name__,
        counts=counts_of(drop.sublayer for drop in drops),
        parameters=short_count(weight_sizes(transformer).parameters),
        quantized=None if quantized is None else quantized.mode,
        drops=drops,
        maps=len(maps_of(transformer)),
        plan=plan,
        figures=dict(figures),
        adapters=bool(adapted_modules(transformer)),
        auto_class=auto_class,
        licence=licence,
        known=licence != UNKNOWN,
        versions={package: version(package) for package in ("layershed", "transformers", "torch")},
    )


def base_of(source: str) -> str:
    """The model that a folder of ours was dropped from, as its card says; else the source itself."""
    card = Path(source) / CARD_FILE
    if not (source and card.is_file() and MARK in _text(card)):
        return source
    header = _header(source)
    named = header.get("base_model", header.get(_NAME, ""))
    return named if isinstance(named, str) else ""


def licence_of(source: str, config: PreTrainedConfig | None = None) -> str:
    """The licence of a model as its config, its GGUF file or its card says it; nothing is downloaded.

    Args:
        source: A folder, a .gguf file or a hub id. The card of a hub id is read if it is in the hub's cache.
        config: The model's config.

    Returns:
        The licence as the hub spells it, such as ``apache-2.0``, or ``"unknown"``.
    """
    found = [getattr(config, "license", None)]
    found += [_gguf_licence(source)] if source.endswith(".gguf") else [_header(source).get("license")]
    known = next((each for each in found if isinstance(each, str) and each.strip()), UNKNOWN)
    return printable(known.strip())


def is_hub_id(name: str) -> bool:
    """Whether a name can be one of the hub, and is no folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name) and not Path(name).exists()


def _header(source: str) -> dict[str, Any]:
    """The YAML header of a model's card: of a folder, or of a hub id in the cache."""
    path: object = Path(source) / CARD_FILE if Path(source).is_dir() and source else None
    if path is None and is_hub_id(source):
        path = try_to_load_from_cache(source, CARD_FILE)
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return {}
    try:
        return dict(ModelCard(_text(Path(path)), ignore_metadata_errors=True).data.to_dict())
    except (ValueError, TypeError, yaml.YAMLError, RecursionError):  # a stranger's header
        return {}


def _gguf_licence(source: str) -> str | None:
    try:
        from gguf import GGUFReader  # an extra; it reads the header, and maps the weights

        field = GGUFReader(source).get_field("general.license")
        return None if field is None else str(field.contents())
    except Exception:  # a stranger's file: its errors are of many kinds, and the model was read from it already
        return None


def _text(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(_LONGEST).decode("utf-8", "replace")


def _plain(text: object) -> str:
    """A text in a cell of a Markdown table, without markup of its own."""
    return printable(str(text)).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
