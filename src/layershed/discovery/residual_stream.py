"""The residual stream of a block, followed on a tape: the branches added to it, and where each branch reads it.

A block's output is followed back to its input, through additions, scalings and changes of shape, which are linear.
Everything else that is added on the way is a branch: ``Y = X + b1 + b2 + ...``. If a norm is in the stream
(post-LN), the search goes on at the norm's input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from layershed.discovery.recording import Call, Key, Operation, Tape, Value
from layershed.errors import UnprovenStructureError

Position = frozenset[int]
"""A place in the stream: the branches that have been added up to there."""

_RESHAPING = {"view", "_unsafe_view", "_reshape_alias", "clone", "_to_copy", "detach", "alias", "unsqueeze", "squeeze"}


@dataclass(frozen=True)
class BranchFlow:
    """One term of the sum that a block adds to its stream.

    Args:
        value: The term b.
        scale: What it is multiplied by before it joins, relative to the stream, or None if that is a tensor.
        before: Where in the stream it reads X.
        after: The stream's value once it has joined, after its own norm if there is one (post-LN).
        join: The addition by which it joins.
        cone: The operations that compute it from X.
        norm: The norm in the stream right after it, or None.
    """

    value: int
    scale: float | None
    before: Position
    after: int
    join: int
    cone: frozenset[int]
    norm: Call | None = None


@dataclass
class BlockFlow:
    """The stream through one call of a block.

    Args:
        tape: The recording.
        call: The block's call.
        source: Key of the argument that is the stream's input.
        branches: In the order in which they join.
        stream: Position by value, of every value that is the stream.
        plain: Whether the block computes X plus its branches and nothing else: no scaling, no norm in the stream.
    """

    tape: Tape
    call: Call
    source: Key
    branches: list[BranchFlow] = field(default_factory=list)
    stream: dict[int, Position] = field(default_factory=dict)
    plain: bool = True

    def position(self, value: int | None) -> Position | None:
        """Where in the stream a value is, or None if it is not the stream."""
        return None if value is None else self.stream.get(value)


def follow_block(tape: Tape, call: Call) -> BlockFlow:
    """Follow the stream through a block.

    Raises:
        UnprovenStructureError: If its output is not its input plus branches; names the block.
    """
    if call.output is None:
        raise UnprovenStructureError(f"{call.path} returns no tensor.")
    shape = tuple(tape.tensors[call.output].shape)
    sources = [key for key in call.arguments if call.shapes[key] == shape]
    if not sources:
        raise UnprovenStructureError(f"{call.path}: no argument has the shape of its output, {shape}.")
    return _Follower(tape, call, sources[0]).follow()


class _Follower:
    """Follows one block's stream from its output back to its input, and then forward again."""

    def __init__(self, tape: Tape, call: Call, source: Key) -> None:
        self.tape, self.call = tape, call
        self.x = call.arguments[source]
        self.flow = BlockFlow(tape, call, source)
        self.reach = self._reach()
        self._outputs = {inner.output for inner in tape.within(call)}
        self._bases: dict[int, frozenset[int]] = {}
        self._gain: dict[int, float | None] = {}

    def follow(self) -> BlockFlow:
        value = self.call.output
        if value is None or value not in self.reach:
            raise self._unproven("its output does not depend on its input")
        segments: list[tuple[int, int, Call | None]] = []
        norm = None
        while True:
            base = self._base(value)
            segments.append((base, value, norm))
            if base == self.x:
                break
            self.flow.plain = False
            norm = self._norm_with(base)
            value = next(number for number in norm.arguments.values() if number in self.reach)
        position: Position = frozenset()
        for base, value, norm in reversed(segments):
            position = self._add_up(base, value, norm, position)
        return self.flow

    def _reach(self) -> set[int]:
        """Every value inside the block that depends on X."""
        reach = {self.x}
        for operation in self.tape.operations[self.call.start : self.call.stop]:
            if not reach.isdisjoint(operation.reads):
                reach.update(operation.writes)
        return reach

    def _producer(self, value: int) -> Operation | None:
        index = self.tape.producer.get(value)
        return self.tape.operations[index] if index is not None and index in self.call else None

    def _parts(self, value: int) -> list[tuple[int, float | None]]:
        """The inputs of a linear operation that made a value, with their weights (None: a tensor); else empty."""
        operation = None if value == self.x else self._producer(value)
        if operation is None or operation.writes[0] != value:
            return []
        (args, kwargs), name = operation.arguments, operation.name.removesuffix("_")
        numbers = [argument.number if isinstance(argument, Value) else -1 for argument in args]
        moving = [number in self.reach for number in numbers]
        if name in _RESHAPING and moving[0]:
            return [(numbers[0], 1.0)]
        if name in ("add", "sub"):
            weights = (1.0, (1.0 if name == "add" else -1.0) * kwargs.get("alpha", 1))
            return [(number, weight) for number, weight, moves in zip(numbers, weights, moving, strict=False) if moves]
        if name in ("mul", "div") and sum(moving) == 1 and (name == "mul" or moving[0]):
            place = moving.index(True)
            factor = _as_float(args[1 - place], self.tape)
            return [(numbers[place], factor if factor is None or name == "mul" else 1 / factor)]
        return []

    def _leaves(self, value: int) -> frozenset[int]:
        """The values whose weighted sum a value is, followed back as far as possible."""
        todo = [value]
        while todo:
            current = todo[-1]
            parts = [part for part, _ in self._parts(current)]
            missing = [part for part in parts if part not in self._bases]
            if missing:
                todo += missing
                continue
            todo.pop()
            self._bases[current] = frozenset[int]().union(*map(self._bases.__getitem__, parts)) or frozenset({current})
        return self._bases[value]

    def _base(self, value: int) -> int:
        """The leaf that is the stream: X, or else the leaf from which all others are computed."""
        leaves = self._leaves(value)
        if self.x in leaves:
            return self.x
        for leaf in leaves:
            if all(leaf in self._ancestors(other) for other in leaves if other != leaf):
                return leaf
        raise self._unproven("its output is no sum of its input and branches")

    def _ancestors(self, value: int) -> set[int]:
        found: set[int] = set()
        todo = [value]
        while todo:
            operation = self._producer(todo.pop())
            for read in operation.reads if operation else ():
                if read in self.reach and read not in found:
                    found.add(read)
                    todo.append(read)
        return found

    def _norm_with(self, output: int) -> Call:
        """The norm in the stream that wrote a value."""
        for call in self.tape.within(self.call):
            moving = {number for number in call.arguments.values() if number in self.reach}
            heavy = any(self.tape.is_product(index) for index in range(call.start, call.stop))
            if call.output is None or heavy or len(moving) != 1 or output not in self.tape.made_in(call):
                continue
            if self._leaves(call.output) == {output}:
                return call
        raise self._unproven("its output is no sum of its input and branches")

    def _add_up(self, base: int, value: int, norm: Call | None, position: Position) -> Position:
        """Go from ``base`` to ``value``, noting the stream's positions and the branches that join."""
        stream, gain = self.flow.stream, self._gain
        stream[base], gain[base] = position, 1.0
        joined: list[BranchFlow] = []
        for node in self._between(base, value):
            parts = self._parts(node)
            (through, weight), *more = [part for part in parts if base in self._leaves(part[0])]
            if more:
                raise self._unproven("it adds its stream to itself")
            before = gain[through]
            gain[node] = None if before is None or weight is None else before * weight
            fresh: set[int] = set()
            for part, factor in parts:
                if part != through:
                    for term, inner in self._terms(part, base):
                        fresh.add(term)
                        joined.append(self._branch(term, _ratio(factor, inner, gain[node]), node))
            stream[node] = stream[through] | fresh
            self.flow.plain &= gain[node] == 1.0 and not self._adds_constant(node)
        if norm is not None and norm.output is not None and len(joined) == 1:
            joined = [replace(joined[0], after=norm.output, norm=norm)]
        self.flow.branches += joined
        return stream[value]

    def _between(self, base: int, value: int) -> list[int]:
        """The values of the stream after ``base`` up to ``value``, in the order in which they were made."""
        found, todo = set[int](), [value]
        while todo:
            current = todo.pop()
            if current != base and current not in found and base in self._leaves(current):
                found.add(current)
                todo += [part for part, _ in self._parts(current)]
        return sorted(found, key=self.tape.producer.__getitem__)

    def _terms(self, value: int, base: int) -> Iterator[tuple[int, float | None]]:
        """The branches in a sum that joins the stream, with their weights: down to what a module returned."""
        parts = [] if value in self._outputs or self._adds_returned_bias(value) else self._parts(value)
        if not parts:
            yield value, 1.0
        self.flow.plain &= not self._adds_constant(value)
        for part, weight in parts:
            for term, inner in self._terms(part, base):
                yield term, None if weight is None or inner is None else weight * inner

    def _adds_returned_bias(self, value: int) -> bool:
        """Whether a value is a sum with a constant that a module of the block returned, such as its bias."""
        operation = self._producer(value)
        if operation is None or not self._adds_constant(value):
            return False
        constants = {self._viewed(read) for read in operation.reads if read not in self.reach}
        return any(not constants.isdisjoint(call.outputs) for call in self.tape.within(self.call))

    def _viewed(self, value: int) -> int:
        """What a value is a view of."""
        while (operation := self._producer(value)) is not None and operation.name in {*_RESHAPING, "expand"}:
            value = operation.reads[0]
        return value

    def _adds_constant(self, value: int) -> bool:
        """Whether a value is a sum with something that does not depend on X."""
        operation = self._producer(value)
        adds = operation is not None and operation.name.removesuffix("_") in ("add", "sub")
        return adds and len(self._parts(value)) == 1

    def _branch(self, term: int, weight: float | None, node: int) -> BranchFlow:
        """A branch with its cone, and the place in the stream where that begins."""
        cone: set[int] = set()
        starts: set[tuple[Position, float | None]] = set()
        todo, seen = [term], set[int]()
        while todo:
            value = todo.pop()
            if value in seen or value not in self.reach:
                continue
            seen.add(value)
            if value in self.flow.stream:
                starts.add((self.flow.stream[value], self._gain[value]))
                continue
            index = self.tape.producer[value]
            cone.add(index)
            todo.extend(self.tape.operations[index].reads)
        if len(starts) != 1:
            raise self._unproven("a branch reads the stream at more than one place")
        ((before, gain),) = starts
        scale = None if weight is None or gain is None else weight * gain
        return BranchFlow(term, scale, before, node, self.tape.producer[node], frozenset(cone))

    def _unproven(self, reason: str) -> UnprovenStructureError:
        return UnprovenStructureError(
            f"{self.call.path}: Y = X + f(norm(X)) does not hold ({reason}). Dropping a part of this block could "
            "silently change the model."
        )


def _ratio(factor: float | None, inner: float | None, gain: float | None) -> float | None:
    return None if factor is None or inner is None or not gain else factor * inner / gain


def _as_float(argument: object, tape: Tape) -> float | None:
    if not isinstance(argument, Value):
        return float(argument) if isinstance(argument, int | float) else None
    tensor = tape.tensors[argument.number]
    # what comes from a parameter changes in training
    constant = argument.number not in tape.producer and not isinstance(tensor, nn.Parameter | FakeTensor)
    return float(tensor) if constant and tensor.ndim == 0 else None
