"""One proof for all models of one structure, for tests that are not about proofs: proving takes much of their time.

Whether a model's numbers are finite is checked for each model all the same.
"""

import types
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

from layershed.discovery import find, fingerprint
from layershed.discovery.anatomy import Anatomy
from layershed.discovery.probe import outputs_of
from layershed.importance import taps

_KEPT_ALIVE = (type, types.FunctionType, types.BuiltinFunctionType, partial)
_known: dict[tuple[Any, ...], Anatomy] = {}
_prove = find._prove


class _Structure(fingerprint._Walk):
    """A fingerprint with the order in which a model's objects are met in place of their ids."""

    def __init__(self) -> None:
        super().__init__()
        self._order: dict[int, int] = {}

    def hooks(self, functions: Iterable[Any]) -> None:
        for function in functions:
            self._identify(function)
            for cell in getattr(function, "__closure__", None) or ():
                content = cell.cell_contents if cell != fingerprint._EMPTY else None
                if type(content) not in fingerprint._PLAIN and not isinstance(content, _KEPT_ALIVE):
                    raise fingerprint._NoFingerprintError
                self.key.append(content)

    def _identify(self, value: Any) -> bool:
        first = super()._identify(value)
        if isinstance(value, _KEPT_ALIVE):
            # a tap only watches, so it does not matter which tracker it passes values to
            self.key[-1] = value.func if _is_tap(value) else value
        elif isinstance(value, types.MethodType) or self._depth >= fingerprint._DEPTH:
            raise fingerprint._NoFingerprintError
        else:
            self.key[-1] = self._order.setdefault(id(value), len(self._order))
        return first


def _is_tap(value: object) -> bool:
    return isinstance(value, partial) and value.func in (taps._if_on, taps._enter_if_on, taps._leave_if_on)


def structure(transformer: nn.Module) -> tuple[Any, ...] | None:
    """What two models have in common whose proofs are the same; None if that cannot be said."""
    walk = _Structure()
    with_order = fingerprint._Walk
    fingerprint._Walk = lambda: walk  # type: ignore[assignment, misc]
    try:
        state = fingerprint.fingerprint(transformer)
    finally:
        fingerprint._Walk = with_order  # type: ignore[misc]
    return None if state is None else state.key


def prove_once(transformer: nn.Module, state: fingerprint.Fingerprint | None) -> Anatomy:
    """As ``find._prove``, with the proof of another model of this structure where there is one."""
    key = None if state is None else structure(transformer)
    if key is None:
        return _prove(transformer, state)
    known = _known.get(key)
    if known is None:
        anatomy = _prove(transformer, state)
        if find._PROOFS.find(transformer, state) is not None:  # proven for any weights
            _known[key] = anatomy.copy()
        return anatomy
    find.refuse_not_finite(transformer, outputs_of(transformer, known.paths))
    find._PROOFS.keep(transformer, state, known.copy())
    return known.copy()
