"""Forward passes in which only some blocks run; the others return what they returned in an earlier pass.

The model's own forward runs, so masks, positions and everything between blocks are its own. A block that does not run
returns a recorded output:

- a block before the first one that runs returns the output of the last block before that one. If it belongs to another
  list of blocks, as an encoder's does, it returns the output of that list's last block.
- a block after the last one that runs, in the same list, returns that one's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

Outputs = dict[int, Any]
"""What blocks returned, by their place in the order of running."""


class BlockRuns:
    """Runs some of a model's blocks.

    Args:
        transformer: The transformer.
        paths: Paths of its blocks, in the order in which they run.
    """

    def __init__(self, transformer: nn.Module, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)
        self._blocks = [transformer.get_submodule(path) for path in paths]
        lists = [path.rpartition(".")[0] for path in paths]
        self._last_of_list = {name: place for place, name in enumerate(lists)}
        self._lists = lists

    def place_of(self, path: str) -> int:
        """The place of the block that holds a module.

        Raises:
            KeyError: If no block holds it.
        """
        for place, block in enumerate(self.paths):
            if path == block or path.startswith(f"{block}."):
                return place
        raise KeyError(path)

    def needed_before(self, first: int) -> tuple[int, ...]:
        """The blocks whose outputs a pass needs that runs only the blocks from ``first`` on."""
        before = {self._source(place, first) for place in range(first)}
        return tuple(sorted(before))

    def _source(self, place: int, first: int) -> int:
        """The block whose output a block before ``first`` returns."""
        return min(self._last_of_list[self._lists[place]], first - 1)

    @contextmanager
    def running(
        self, outputs: Mapping[int, Any], first: int = 0, last: int | None = None, keep: Sequence[int] = ()
    ) -> Iterator[Outputs]:
        """Within the context a forward pass of the model runs only the blocks from ``first`` to ``last``.

        Args:
            outputs: The outputs of the blocks that :meth:`needed_before` names, from an earlier pass over the batch.
            first: The first block that runs.
            last: The last one of its list that runs; None for all.
            keep: The blocks that run and whose outputs are wanted.

        Yields:
            A mapping that holds, after the pass, the outputs of ``keep``.
        """
        kept: Outputs = {}
        with ExitStack() as stack:
            for place in range(first):
                stack.enter_context(_returning(self._blocks[place], outputs[self._source(place, first)]))
            for place in {*keep, *([] if last is None else [last])}:
                handle = self._blocks[place].register_forward_hook(_keeper(kept, place), with_kwargs=False)
                stack.callback(handle.remove)
            for place in range(len(self.paths) if last is None else last + 1, len(self.paths)):
                if last is not None and self._lists[place] == self._lists[last]:
                    stack.enter_context(_returning_later(self._blocks[place], kept, last))
            yield kept
        if last is not None and last not in keep:
            kept.pop(last, None)


def same_outputs(one: Any, other: Any) -> bool:
    """Whether two outputs of a block are equal, up to the rounding of another kernel."""
    (values, spec), (others, other_spec) = tree_flatten(one), tree_flatten(other)
    if spec != other_spec:
        return False
    pairs = [(a, b) for a, b in zip(values, others, strict=True) if isinstance(a, Tensor) and isinstance(b, Tensor)]
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True) for a, b in pairs)


def _keeper(kept: Outputs, place: int) -> Any:
    def keep(_module: nn.Module, _args: object, output: Any) -> None:
        kept[place] = output

    return keep


@contextmanager
def _returning(block: nn.Module, output: Any) -> Iterator[None]:
    with _forward_as(block, lambda *_args, **_kwargs: output):
        yield


@contextmanager
def _returning_later(block: nn.Module, kept: Outputs, place: int) -> Iterator[None]:
    with _forward_as(block, lambda *_args, **_kwargs: kept[place]):
        yield


@contextmanager
def _forward_as(block: nn.Module, function: Any) -> Iterator[None]:
    missing = object()
    before = block.__dict__.get("forward", missing)
    block.__dict__["forward"] = function
    try:
        yield
    finally:
        if before is missing:
            del block.__dict__["forward"]
        else:
            block.__dict__["forward"] = before
