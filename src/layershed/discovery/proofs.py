"""Remembers the proof of a model until something changes that the proof depends on.

The memory is kept outside the models, so that copies, pickles and attributes of a model are not affected.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from layershed.discovery.fingerprint import Fingerprint, fingerprint

T = TypeVar("T")
Numbers = tuple[tuple[int, int, int], ...]

_KEPT = 8  # states of one model: with adapters and without, in autocast and outside, ...


@dataclass
class Proof(Generic[T]):
    """A proven answer.

    Args:
        answer: The result.
        state: The state of the model at that time.
        numbers: The numbers of its tensors when they were last checked to be finite, or None if unknown.
        of_zeros: Whether a branch gave nothing but zeros. Then the answer may change with the numbers.
    """

    answer: T
    state: Fingerprint
    numbers: Numbers | None
    of_zeros: bool


class Proofs(Generic[T]):
    """The latest answers for each model, by its state."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[nn.Module, OrderedDict[tuple[object, ...], Proof[T]]] = WeakKeyDictionary()

    def find(self, transformer: nn.Module) -> tuple[Proof[T] | None, Callable[[T, bool], None]]:
        """The proof for a model in its present state, and a function that stores one.

        Args:
            transformer: The model, in the state in which a probe runs.

        Returns:
            The proof or None. The function takes the answer, and whether a branch gave nothing but zeros.
        """
        state = fingerprint(transformer)
        if state is None:
            return None, lambda _answer, _of_zeros: None
        known = self._known.setdefault(transformer, OrderedDict())
        proof = known.get(state.key)
        if (
            proof is not None
            and proof.state.is_alive()
            and not (proof.of_zeros and has_new_numbers(transformer, proof))
        ):
            known.move_to_end(state.key)
            return proof, lambda _answer, _of_zeros: None

        def keep(answer: T, of_zeros: bool) -> None:
            known.pop(state.key, None)
            known[state.key] = Proof(answer, state, numbers_of(transformer), of_zeros)
            for key in [key for key, other in known.items() if not other.state.is_alive()]:
                del known[key]
            while len(known) > _KEPT:
                known.popitem(last=False)

        return None, keep


def has_new_numbers(transformer: nn.Module, proof: Proof[T]) -> bool:
    """Whether a model may hold other numbers than those that were last checked to be finite."""
    return proof.numbers is None or proof.numbers != numbers_of(transformer)


def numbers_of(transformer: nn.Module) -> Numbers | None:
    """A value that changes whenever torch writes into a parameter or a buffer, or None if there is none.

    Sharded weights have none: each gathering moves them, and all ranks must take the same path. Writes through
    ``tensor.data`` or raw pointers are not seen.
    """
    if any(isinstance(module, FSDPModule) for module in transformer.modules()):
        return None
    try:
        return tuple(_signs(chain(transformer.parameters(), transformer.buffers())))
    except RuntimeError:  # inference tensors count no writes, and some kinds of tensors have no memory of their own
        return None


def _signs(tensors: Iterator[Tensor]) -> Iterator[tuple[int, int, int]]:
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            raise RuntimeError("a distributed tensor")
        yield id(tensor), 0 if tensor.is_meta else tensor.data_ptr(), tensor._version
