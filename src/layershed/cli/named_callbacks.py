"""Callbacks of a config by name, so that a word of the command line or a second config reaches one of them.

jsonargparse parses a dictionary of callbacks. This module adds what it leaves out: two configs are merged by name, and
a name that no callback has is refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from copy import copy
from typing import Any, NoReturn, cast

from jsonargparse import ArgumentParser
from jsonargparse._typehints import ActionTypeHint
from jsonargparse._util import NestedArg
from lightning.pytorch.callbacks import Callback

from layershed.integration.protocols import Placed

_BY_NAME = dict[str, Callback | None]
_LISTED = list[Callback] | Callback | None
Callbacks = _BY_NAME | _LISTED
OPTION = "trainer.callbacks"


class _NamedCallbacks(ActionTypeHint):
    """Parses callbacks by name, one callback, or a list of them."""

    def _check_type(self, value: Any, append: bool = False, cfg: Any = None, mode: Any = None) -> Any:
        before = cfg.get(self.dest) if cfg else None
        if isinstance(before, dict):
            if append:
                _refuse(f"the callbacks of this config have names; write --{OPTION}.NAME {value}")
            if isinstance(value, NestedArg):
                _check_name(value, before)
            elif _type_of(value) is _BY_NAME:
                value = {**before, **value}
            else:
                cfg = None  # a list replaces all names
        twin = copy(self)
        twin._typehint = _type_of(value, before)
        try:
            return super(_NamedCallbacks, twin)._check_type(value, append=append, cfg=cfg, mode=mode)
        except TypeError:
            if isinstance(value, NestedArg) and "." in value.key and not isinstance(before, dict):
                _refuse(_unnamed(value.key, before))
            raise

    def instantiate_classes(self, value: Any) -> Any:
        """Build the callbacks."""
        twin = copy(self)
        twin._typehint = _type_of(value)
        return super(_NamedCallbacks, twin).instantiate_classes(value)


def by_name(parser: ArgumentParser) -> None:
    """Let a parser of Lightning's Trainer merge callbacks by name."""
    for action in parser._actions:
        if action.dest == OPTION:
            action.__class__ = _NamedCallbacks


def as_list(given: Callbacks | Iterable[Callback]) -> list[Callback]:
    """The callbacks of a config in the order in which they act.

    Args:
        given: By name, one, several or none. A name with None is left out. Named callbacks of layershed are put in the
            order drop, quantize, LoRA, export, because the place of a name says nothing after two configs are merged.
    """
    if given is None:
        return []
    if isinstance(given, Callback):
        return [given]
    if not isinstance(given, dict):
        return list(given)
    listed = [callback for callback in given.values() if callback is not None]
    places = [index for index, callback in enumerate(listed) if isinstance(callback, Placed)]
    ordered = sorted(places, key=lambda index: cast(Placed, listed[index]).layershed_place)
    moved = dict(zip(places, ordered, strict=True))
    return [listed[moved.get(index, index)] for index in range(len(listed))]


def _check_name(given: NestedArg, before: dict[str, Any]) -> None:
    """Refuse an option, or the removal, of a callback that no config names.

    Raises:
        TypeError: If the key, such as ``drop.start``, begins with a name that is not there.
    """
    name, dot, _ = given.key.partition(".")
    named = [known for known, callback in before.items() if callback is not None]
    adds = not dot and str(given.val).replace(".", "").isidentifier() and given.val not in (None, "null")
    if name in named or adds:
        return
    near = difflib.get_close_matches(name, named, n=1)
    advice = f"did you mean {near[0]}?" if near else f"it names {', '.join(named)}"
    _refuse(f"no callback of the config has the name {name!r}; {advice}")


def _unnamed(key: str, before: Any) -> str:
    name = key.partition(".")[0]
    if isinstance(before, list):
        return (
            f"{key!r} is no option of the last callback; the config lists its callbacks without names. Give them names "
            f"instead of dashes, such as {name}: {{class_path: ..., init_args: ...}}"
        )
    return f"no callback has the name {name!r} yet; give its class first: --{OPTION}.{name} CLASS"


def _type_of(value: Any, before: Any = None) -> Any:
    """The part of ``Callbacks`` that a value is of. An error of jsonargparse then says what is wrong with that part."""
    if isinstance(value, NestedArg):
        return _BY_NAME if isinstance(before, dict) or not (before or "." in value.key) else _LISTED
    if isinstance(value, str):  # may hold JSON
        return Callbacks
    return _BY_NAME if isinstance(value, dict) and "class_path" not in value else _LISTED


def _refuse(reason: str) -> NoReturn:
    """Raise an error in the form of jsonargparse's own."""
    raise TypeError(f'Parser key "{OPTION}": {reason}') from ValueError(reason)
