"""The drops in the config of a model, where saving and loading by transformers keep them.

- ``dropped_modules`` describes every stand-in, by module path. A bypassed model has it, too, so that a folder that
  others save says what is dropped.
- ``per_layer_config[i].skip`` is transformers' own field and lists the kinds that were removed from a layer.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypeGuard

from torch import nn

from layershed.errors import PlanError
from layershed.planning.plan import Sublayer, sublayer_from
from layershed.spellings import layer_overrides
from layershed.stand_ins.contexts import DROPPED_MODULES
from layershed.stand_ins.linear_map import LinearMap
from layershed.stand_ins.stand_in import Capture, StandIn

_LINEAR = "linear"
"""The field of a description that holds width and rank of the linear map."""


class _Note(dict[str, Any]):
    """A description that knows its model, because models often share a config object. Copies are plain dicts."""

    def __init__(self, content: Mapping[str, Any], owner: nn.Module | None) -> None:
        super().__init__(content)
        self.owner = None if owner is None else weakref.ref(owner)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return {path: copy.deepcopy(fields, memo) for path, fields in self.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


def note_dropped(config: Any, stand_ins: Mapping[str, StandIn], owner: nn.Module | None = None) -> None:
    """Describe stand-ins in a config; without any, the description goes, unless it is that of another model.

    Args:
        config: The config.
        stand_ins: The stand-ins by path.
        owner: The model whose they are; None for a config on its way to a folder.
    """
    if not stand_ins and note_owner(config) not in (None, owner):
        return
    config.__dict__.pop(DROPPED_MODULES, None)
    if stand_ins:
        content = {path: _as_primitives(stand_in) for path, stand_in in stand_ins.items()}
        config.__dict__[DROPPED_MODULES] = _Note(content, owner)


def note_owner(config: Any) -> nn.Module | None:
    """The model that a description in a config is about; None for a config from a folder, or a copied one."""
    note = getattr(config, "__dict__", {}).get(DROPPED_MODULES)
    return note.owner() if isinstance(note, _Note) and note.owner is not None else None


def resolved(model: nn.Module, path: str) -> str:
    """The path that a description made for a model's body, or for a model around it, means in this model."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    paths = {name for name, _ in model.named_modules()}
    return next((p for p in (path, f"{prefix}{path}", path.removeprefix(prefix)) if p in paths), path)


def noted_sublayers(config: Any) -> dict[str, Sublayer]:
    """By module path, the dropped sublayer that a config describes there; the config may be untrusted.

    Raises:
        PlanError: If a sublayer is malformed.
    """
    noted = getattr(config, "__dict__", {}).get(DROPPED_MODULES) or {}
    if not isinstance(noted, Mapping) or not all(isinstance(fields, Mapping) for fields in noted.values()):
        raise PlanError(f"The config's {DROPPED_MODULES} is not a mapping from module paths to stand-ins.")
    return {path: sublayer_from(fields.get("sublayer")) for path, fields in noted.items()}


def noted_maps(config: Any) -> set[str]:
    """Names of the sublayers that a config describes as replaced by linear maps."""
    noted = getattr(config, "__dict__", {}).get(DROPPED_MODULES) or {}
    return {sublayer.name for path, sublayer in noted_sublayers(config).items() if noted[path].get(_LINEAR) is not None}


def mark_dropped(config: Any, stand_ins: Mapping[str, StandIn], owner: nn.Module | None = None) -> None:
    """Write into a config which sublayers are dropped; its other fields stay.

    - ``per_layer_config[i].skip`` is transformers' own field and lists the kinds.
    - ``dropped_modules`` holds the stand-ins by module path.

    A config whose layers differ by type (Gemma 4) takes no ``skip`` and gets only ``dropped_modules``.
    """
    note_dropped(config, stand_ins, owner)
    text_config = config.get_text_config()
    layers = layer_overrides(text_config)
    if any(own.keys() - {"skip"} for own in layers.values()):
        return
    for sublayer in {stand_in.sublayer for stand_in in stand_ins.values() if stand_in.core}:
        own = layers.setdefault(sublayer.block, {})
        own["skip"] = sorted({*own.get("skip", ()), sublayer.kind})
    if layers and max(layers) < getattr(text_config, "num_hidden_layers", 0):
        text_config.per_layer_config = layers


def _as_primitives(stand_in: StandIn) -> dict[str, Any]:
    """The fields that differ from their defaults, for JSON."""
    default = StandIn(stand_in.sublayer, stand_in.zero)
    left_out = {"sublayer", "zero", "frozen", "own", "original", "map"}
    fields = {f: v for f, v in vars(stand_in).items() if f not in left_out and v != getattr(default, f)}
    if stand_in.map is not None:
        fields[_LINEAR] = [stand_in.map.width, stand_in.map.rank]
    return {"sublayer": asdict(stand_in.sublayer), "zero": stand_in.zero, **fields}


def stand_in_from(fields: Mapping[str, Any]) -> StandIn:
    """The stand-in that :func:`mark_dropped` described. Checks every field, as the config is untrusted.

    Raises:
        TypeError: If a field is unknown or of the wrong type.
        PlanError: If its sublayer is malformed.
    """
    known: dict[str, Any] = {
        "zero": bool,
        "core": bool,
        "argument": int | str,
        "asked_by": int | str,
        "layer_idx": int,
        "stride": int,
        "materialize": bool,
        "as_list": bool,
        "source": int | str,
    }
    given = {
        name: value
        for name, value in fields.items()
        if name not in ("sublayer", "echoes", "given", "captures", "aliases", "asked", _LINEAR)
    }
    for name, value in given.items():
        if name not in known or not isinstance(value, known[name]):
            raise TypeError(f"{name}={value!r} is no field of a stand-in")
    echoes, seen = fields.get("echoes"), fields.get("given", ())
    if not isinstance(seen, tuple | list) or not all(isinstance(key, int | str) for key in seen):
        raise TypeError(f"given={seen!r} is no field of a stand-in")
    if echoes is not None and not isinstance(echoes, tuple | list):
        raise TypeError(f"echoes={echoes!r} is no field of a stand-in")
    aliases = fields.get("aliases", ())
    if not isinstance(aliases, tuple | list) or not all(isinstance(path, str) for path in aliases):
        raise TypeError(f"aliases={aliases!r} is no field of a stand-in")
    captures = tuple(map(_capture_from, fields.get("captures", ())))
    echoed = None if echoes is None else tuple(echoes)
    asked = tuple(map(_asked_from, fields.get("asked", ())))
    return StandIn(
        sublayer_from(fields["sublayer"]),
        echoes=echoed,
        given=tuple(seen),
        aliases=tuple(aliases),
        captures=captures,
        asked=asked,
        map=_map_from(fields.get(_LINEAR)),
        **given,
    )


def _map_from(value: Any) -> LinearMap | None:
    """The map that a description gives the size of, without memory; its weights are loaded later."""
    if value is None:
        return None
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{_LINEAR}: {value!r} is no width and rank of a linear map")
    width, rank = value
    if not is_map_size(width) or not (rank is None or is_map_size(rank)):
        raise TypeError(f"{_LINEAR}: {value!r} is no width and rank of a linear map")
    return LinearMap(width, rank, device="meta")


def is_map_size(value: Any) -> TypeGuard[int]:
    """Whether a value from a file may be the width or the rank of a linear map.

    No transformer is wider: a file that says so would take the memory of the machine.
    """
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**20


def _capture_from(value: Any) -> Capture:
    if isinstance(value, tuple | list) and [type(part) for part in value] == [str, int, int]:
        key, ndim, size = value
        return key, ndim, size
    raise TypeError(f"captures: {value!r} is no entry of a stand-in")


def _asked_from(value: Any) -> tuple[int, int]:
    if isinstance(value, tuple | list) and [type(part) for part in value] == [int, int] and 0 < value[0] < 16:
        place, ndim = value
        if 0 <= ndim < 16:
            return place, ndim
    raise TypeError(f"asked: {value!r} is no entry of a stand-in")
