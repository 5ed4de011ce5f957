"""Repeats a part of a recorded forward pass with other values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from layershed.discovery.recording import Operation, Tape, Value


def replay(tape: Tape, target: int, values: Mapping[int, Tensor]) -> Tensor:
    """A recorded value, computed again from other values.

    Args:
        tape: The recording.
        target: The value to compute again.
        values: Tensors that replace recorded values.

    Returns:
        The new tensor of the target.
    """
    made = dict(values)
    with torch.no_grad():
        for index in sorted(_needed(tape, target, values)):
            _run(tape, tape.operations[index], made)
    return made[target] if target in made else tape.tensors[target]


def _needed(tape: Tape, target: int, values: Mapping[int, Tensor]) -> set[int]:
    """The operations that lead from the changed values to the target, and those whose results were overwritten."""
    last = tape.producer.get(target, -1)
    changed = set(values)
    first = min((readers[0] for value in values if (readers := tape.consumers.get(value))), default=last)
    for operation in tape.operations[first : last + 1]:
        if not changed.isdisjoint(operation.reads):
            changed.update(operation.writes)
    needed: set[int] = set()
    todo = [target]
    while todo:
        value = todo.pop()
        index = tape.producer.get(value)
        if value in values or index is None or index in needed or not (value in changed or value in tape.overwritten):
            continue
        needed.add(index)
        todo.extend(tape.operations[index].reads)
    return needed


def _run(tape: Tape, operation: Operation, made: dict[int, Tensor]) -> None:
    """Run one operation again; it overwrites the same values, views included."""
    for number in operation.renews:
        if number not in made:
            made[number] = tape.tensors[number].clone()

    def tensor(leaf: object) -> object:
        return made.get(leaf.number, tape.tensors[leaf.number]) if isinstance(leaf, Value) else leaf

    args, kwargs = tree_map(tensor, operation.arguments)
    results = [leaf for leaf in tree_flatten(operation.function(*args, **kwargs))[0] if isinstance(leaf, Tensor)]
    made.update({new: made[old] for old, new in operation.renews.items()})
    renewed = {id(made[old]) for old in operation.renews}
    made.update(zip(operation.makes, (result for result in results if id(result) not in renewed), strict=True))
