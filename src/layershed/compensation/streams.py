"""One residual stream through a model, advanced block by block for all batches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from layershed.importance.block_runs import BlockRuns, Outputs, same_outputs


class Stream:
    """What the blocks before a place returned, for every batch.

    Args:
        runs: The model's blocks.
        body: The model without its head.
        inputs: The inputs of every batch.

    Attributes:
        reuses: Whether passes take the outputs of earlier blocks; else they run from the first block on.
    """

    def __init__(self, runs: BlockRuns, body: nn.Module, inputs: Sequence[dict[str, Any]]) -> None:
        self._runs, self._body, self._inputs = runs, body, inputs
        self._outputs: list[Outputs] = [{} for _ in inputs]
        self._done = 0
        self.reuses = True

    def advance(self, place: int) -> None:
        """Run the blocks before a place, as the model is now."""
        if place <= self._done:
            return
        keep = [p for p in self._runs.needed_before(place) if p >= self._done]
        for batch, before in enumerate(self._outputs):
            with self._running(batch, place - 1, keep) as kept:
                self._body(**self._inputs[batch])
            both = {**before, **kept}
            self._outputs[batch] = {p: both[p] for p in self._runs.needed_before(place)}
        self._done = place

    def run(self, batch: int, place: int) -> None:
        """Run the block at a place on one batch, for the hooks that are on it."""
        with self._running(batch, place, []):
            self._body(**self._inputs[batch])

    def check(self, place: int) -> bool:
        """Whether a pass that takes earlier blocks' outputs gives what a whole pass gives, on the first batch."""
        if not self._done:
            return True
        with self._running(0, place, [place]) as short:
            self._body(**self._inputs[0])
        with self._runs.running({}, 0, None, [place]) as whole:
            self._body(**self._inputs[0])
        return same_outputs(short[place], whole[place])

    def _running(self, batch: int, last: int, keep: Sequence[int]) -> AbstractContextManager[Outputs]:
        return self._runs.running(self._outputs[batch], self._done if self.reuses else 0, last, keep)
