"""Remembers the proof of a model until something changes that the proof depends on.

The memory is kept outside the models, so that copies, pickles and attributes of a model are not affected.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from layershed.discovery.fingerprint import Fingerprint

T = TypeVar("T")

_KEPT = 8  # states of one model: with adapters and without, in one dtype and in another, ...


@dataclass(frozen=True)
class _Proof(Generic[T]):
    answer: T
    state: Fingerprint


class Proofs(Generic[T]):
    """The latest answers for each model, by its state."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[nn.Module, OrderedDict[tuple[object, ...], _Proof[T]]] = WeakKeyDictionary()

    def find(self, transformer: nn.Module, state: Fingerprint) -> T | None:
        """The answer for a model in a state, or None.

        Args:
            transformer: The model.
            state: Its fingerprint, taken where a probe runs.
        """
        known = self._known.get(transformer, OrderedDict())
        proof = known.get(state.key)
        if proof is None or not proof.state.is_alive():
            return None
        known.move_to_end(state.key)
        return proof.answer

    def keep(self, transformer: nn.Module, state: Fingerprint, answer: T) -> None:
        """Remember an answer; forget those that can no longer be valid, and the oldest."""
        known = self._known.setdefault(transformer, OrderedDict())
        known.pop(state.key, None)
        known[state.key] = _Proof(answer, state)
        for key in [key for key, other in known.items() if not other.state.is_alive()]:
            del known[key]
        while len(known) > _KEPT:
            known.popitem(last=False)
