"""What was proven of a model stays known until something changes that a proof depends on.

Kept outside the models, so that their copies, their pickles and their attributes know nothing of it.
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
        answer: What was found out.
        state: The state of the model in which it was.
        numbers: Which numbers its tensors held when they were last seen to be finite, or None if that cannot be told.
        of_zeros: Whether a branch gave nothing but zeros, so that with other numbers the answer may be another one.
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
        """The proof for a model as it is now, and the way to leave one if there is none.

        Args:
            transformer: The model, in the state in which a probe runs.

        Returns:
            The proof or None, and a function that takes the answer and whether a branch gave nothing but zeros.
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
    """Whether a model may hold other numbers than those that were last seen to be finite."""
    return proof.numbers is None or proof.numbers != numbers_of(transformer)


def numbers_of(transformer: nn.Module) -> Numbers | None:
    """What changes whenever torch writes into a parameter or a buffer, or None if there may be no such sign.

    Sharded weights have none: after each gathering they stand elsewhere, and ranks must not come to differ.
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
