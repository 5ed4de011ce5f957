"""Sequences of a stream that is larger than memory: shuffled in windows, shared by the ranks, resumed exactly."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

from torch.utils.data import IterableDataset

from layershed.errors import DataError
from layershed.training.as_data_error import as_data_error

Numbered = tuple[int, Mapping[str, Any]]
"""A row and its index in the stream."""


class Window(Protocol):
    """Makes sequences of some rows."""

    def __call__(self, rows: Sequence[Numbered], rest: Sequence[int], /) -> tuple[Sequence[Any], list[int]]:
        """The sequences, and the tokens that are left for the next rows."""


class StreamedSequences(IterableDataset[Any]):
    """Sequences of one rank, without end: after the last row the stream begins again, in another order.

    The rows are read in windows. A window is shuffled, made into sequences, and forgotten. Of the rows after the
    held-out ones, rank r of n takes every n-th, from the r-th on: no row is taken by two ranks. The order depends on
    the seed, the pass and the window only.

    The state is that of the stream at the start of the window, and the number of sequences given since. Loading it
    reads the window again, so that an interrupted run goes on at its next sequence.

    Args:
        rows: An iterable data set of the library ``datasets``, whose state can be saved.
        window: Makes sequences of some rows.
        skip: Number of first rows that are held out.
        size: Rows per window.
        seed: Seed of the orders.
        rank: Index of this rank.
        ranks: Number of ranks.
        where: How errors name the data.
    """

    def __init__(
        self, rows: Any, window: Window, *, skip: int, size: int, seed: int, rank: int, ranks: int, where: str
    ) -> None:
        super().__init__()
        self._rows, self._window, self._where = rows, window, where
        self._skip, self._size, self._seed, self._rank, self._ranks = skip, size, seed, rank, ranks
        self._state = _start_of_pass(0)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as primitives."""
        return copy.deepcopy(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._state = copy.deepcopy(state)

    def __iter__(self) -> Iterator[Any]:
        """The sequences, from the state on."""
        state = self._state
        while True:
            yield from self._one_pass(state)
            state = _start_of_pass(state["pass"] + 1)

    def _one_pass(self, state: dict[str, Any]) -> Iterator[Any]:
        """The sequences from a state to the end of the stream."""
        rows = copy.deepcopy(self._rows)  # a data set keeps the state that was loaded into it
        if state["rows"] is not None:
            rows.load_state_dict(state["rows"])
        numbered = enumerate(self._read(rows), start=state["index"])
        share = (row for row in numbered if self._is_own(row[0]))
        while taken := list(islice(share, self._size)):
            after = {**state, "index": taken[-1][0] + 1, "rows": rows.state_dict(), "window": state["window"] + 1}
            random.Random(f"{self._seed} {state['pass']} {state['window']}").shuffle(taken)
            made, after["rest"] = self._window(taken, state["rest"])
            for number in range(state["given"], len(made)):
                self._state = {**state, "given": number + 1}
                yield made[number]
            state = {**after, "given": 0, "made": state["made"] + len(made)}
        if not state["made"]:
            raise DataError(
                f"{self._where}: the stream gives rank {self._rank} no sequence in a whole pass; give more rows, or "
                "lower block_size, val_rows or the number of devices."
            )

    def _read(self, rows: Any) -> Iterator[Mapping[str, Any]]:
        """The rows; what the libraries raise in mid-run is one sentence."""
        iterator = iter(rows)
        while True:
            with as_data_error(f"{self._where}: a row could not be read"):
                row = next(iterator, None)
            if row is None:
                return
            yield row

    def _is_own(self, index: int) -> bool:
        return index >= self._skip and (index - self._skip) % self._ranks == self._rank


def _start_of_pass(number: int) -> dict[str, Any]:
    return {"pass": number, "window": 0, "index": 0, "rows": None, "rest": [], "given": 0, "made": 0}
