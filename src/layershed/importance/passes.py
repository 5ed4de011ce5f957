"""Where a forward pass begins: where the blocks run, be it in the model's own forward or in somebody else's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn


class Passes:
    """The modules that run blocks, and which of them are running.

    A pass begins when a module that holds blocks, or a block, is called while no module around it is running, unless
    it comes after everything that ran in the pass so far: a decoder that is called after its encoder continues the
    encoder's pass.

    Args:
        transformer: The transformer.
        blocks: Paths of its blocks, in the order in which they run.

    Attributes:
        paths: Paths of the modules to watch: the blocks, and all modules around them.
    """

    def __init__(self, transformer: nn.Module, blocks: Sequence[str]) -> None:
        self._first: dict[str, int] = {}
        for place, block in enumerate(blocks):
            parts = block.split(".")
            for path in (".".join(parts[:end]) for end in range(len(parts) + 1)):
                self._first.setdefault(path, place)
        never_called = nn.ModuleList | nn.ModuleDict
        self.paths = [path for path in self._first if not isinstance(transformer.get_submodule(path), never_called)]
        self._places = {block: place for place, block in enumerate(blocks)}
        self.forget()

    def forget(self) -> None:
        """Take nothing as running; the next call begins a pass."""
        self._running: list[str] = []
        self._reached = -1  # the last block of this pass

    @property
    def inside(self) -> bool:
        """Whether one of the modules is running."""
        return bool(self._running)

    def enter(self, path: str, begin: Callable[[], None]) -> bool:
        """Note that a module begins to run.

        Args:
            path: Its path.
            begin: Called if a pass begins with it.

        Returns:
            Whether no module around it is running.
        """
        while self._running and not holds(self._running[-1], path):
            self._running.pop()  # an error ended it
        outermost = not self._running
        if outermost and self._first[path] <= self._reached:
            self._reached = -1
            begin()
        self._running.append(path)
        self._reached = max(self._reached, self._places.get(path, -1))
        return outermost

    def leave(self, path: str) -> None:
        """Note that a module has ended, by an error, too."""
        if path in self._running:
            del self._running[self._running.index(path) :]


def recomputing() -> bool:
    """Whether the backward pass is running; gradient checkpointing then runs the blocks a second time."""
    return torch._C._current_graph_task_id() != -1


def holds(outer: str, inner: str) -> bool:
    """Whether the module at one path holds that at the other."""
    return outer != inner and (not outer or inner.startswith(f"{outer}."))
