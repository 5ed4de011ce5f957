"""A recording of one forward pass: every tensor operation, its inputs and outputs, and the module that ran it.

It gives the data flow of a model as a fact, for real tensors and for fake ones.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

Key = int | str
"""The place of an argument in a call: its position, or its name."""

# operations that read only the shape of a tensor
_SHAPE_ONLY = {"new_zeros", "new_ones", "new_empty", "new_full", "zeros_like", "ones_like", "empty_like", "full_like"}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_grouped_mm_fallback", "convolution", "mv"}


@dataclass(frozen=True)
class Value:
    """Replaces a tensor in the arguments of a recorded operation by its number on the tape."""

    number: int


@dataclass
class Operation:
    """One operation of ATen.

    Args:
        function: The operator.
        arguments: Its positional and keyword arguments, with a :class:`Value` for each tensor.
        reads: Numbers of the values that it read.
        makes: Numbers of the values of the tensors that it made.
        renews: By number of each overwritten value, the number of the tensor's new value; also for tensors that share
            its memory.
    """

    function: Any
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    reads: tuple[int, ...]
    makes: tuple[int, ...] = ()
    renews: Mapping[int, int] = field(default_factory=dict)

    @property
    def constants(self) -> Any:
        """Its arguments without the tensors."""
        return _mapped_values(self.arguments)

    @property
    def writes(self) -> tuple[int, ...]:
        """Numbers of all the values that it made; its result comes first."""
        return (*self.renews.values(), *self.makes)

    @property
    def name(self) -> str:
        """Its name without the overload: ``add`` for ``aten.add.Tensor``."""
        return self.function.overloadpacket.__name__


@dataclass
class Call:
    """One call of a module; the operations from ``start`` to before ``stop`` ran inside.

    Args:
        path: Path of the module.
        given: What it was called with.
        opened: The moment at which it began, counting every operation, beginning and end of a call.
        closed: The moment at which it ended.
        arguments: The values that it was called with, by position or name.
        shapes: Shapes of those.
        outputs: The values that it returned, None for what is no tensor; a single one if it returned a tensor.
        container: tuple or list, if it returned one.
    """

    path: str
    given: tuple[tuple[Any, ...], dict[str, Any]]
    opened: int
    start: int
    arguments: dict[Key, int]
    shapes: dict[Key, tuple[int, ...]]
    stop: int = -1
    closed: int = -1
    outputs: tuple[int | None, ...] = ()
    container: type | None = None

    def __contains__(self, operation: int) -> bool:
        return self.start <= operation < self.stop

    def contains(self, other: Call) -> bool:
        """Whether another call happened inside this one."""
        return self.opened < other.opened and other.closed < self.closed

    @property
    def output(self) -> int | None:
        """The first value that it returned."""
        return self.outputs[0] if self.outputs else None


@dataclass
class Tape:
    """What :func:`recording` fills.

    Args:
        operations: In the order in which they ran.
        calls: The calls of modules, in the order in which they began.
        producer: By value, the operation that made it; parameters and inputs have none.
        consumers: By value, the operations that read it.
        tensors: By value, the tensor; for an overwritten value, its present content.
        overwritten: The overwritten values.
    """

    operations: list[Operation] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    producer: dict[int, int] = field(default_factory=dict)
    consumers: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    tensors: list[Tensor] = field(default_factory=list)
    overwritten: set[int] = field(default_factory=set)
    _moment: int = 0
    _numbers: dict[int, int] = field(default_factory=dict)
    _sharing: dict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def number(self, tensor: Tensor) -> int:
        """The value that a tensor holds now."""
        known = self._numbers.get(id(tensor))
        return self._new_value(tensor) if known is None else known

    def calls_of(self, path: str) -> list[Call]:
        """The calls of one module."""
        return [call for call in self.calls if call.path == path]

    def within(self, outer: Call) -> Iterator[Call]:
        """The calls that happened inside another one, outer ones first."""
        return (call for call in self.calls if outer.contains(call))

    def made_in(self, call: Call) -> Iterator[int]:
        """The values that were made inside a call."""
        for operation in self.operations[call.start : call.stop]:
            yield from operation.writes

    def is_product(self, operation: int) -> bool:
        """Whether an operation is a matrix product or a convolution."""
        return self.operations[operation].name in _PRODUCTS

    def _new_value(self, tensor: Tensor) -> int:
        number = len(self.tensors)
        # kept, so that no other tensor gets the same id
        self.tensors.append(tensor)
        if id(tensor) not in self._numbers:
            self._sharing[tensor.untyped_storage()._cdata].append(tensor)
        self._numbers[id(tensor)] = number
        return number

    def _reference(self, reads: list[int], tensor: Tensor) -> Value:
        reads.append(self.number(tensor))
        return Value(reads[-1])

    def _record(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function.namespace == "prim":  # a fake tensor asks for its device
            return function(*args, **kwargs)
        reads: list[int] = []
        arguments = _mapped(partial(self._reference, reads), (args, kwargs))
        if function.overloadpacket.__name__ in _SHAPE_ONLY:
            reads = []
        written = list(_written(function, args, kwargs))
        output = function(*args, **kwargs)
        # tensors that share the written memory have new values, too
        touched = {id(tensor): tensor for tensor in written}
        touched |= {id(t): t for w in written for t in self._sharing[w.untyped_storage()._cdata]}
        fresh: list[Tensor] = []
        _mapped(lambda tensor: fresh.append(tensor) if id(tensor) not in touched else None, output)
        index = len(self.operations)
        self._moment += 1
        renews = {self.number(tensor): self._new_value(tensor) for tensor in touched.values()}
        operation = Operation(
            function, arguments, tuple(reads), tuple(self._new_value(tensor) for tensor in fresh), renews
        )
        self.operations.append(operation)
        self.overwritten.update(renews)
        for number in operation.writes:
            self.producer[number] = index
        for number in dict.fromkeys(reads):
            self.consumers[number].append(index)
        return output

    def _enter(self, open_calls: list[Call], path: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        given: dict[Key, Any] = {**dict(enumerate(args)), **kwargs}
        tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
        arguments = {key: self.number(value) for key, value in tensors.items()}
        shapes = {key: tuple(value.shape) for key, value in tensors.items()}
        self._moment += 1
        with _disable_current_modes():  # a block may overwrite its arguments
            given_then = _mapped(_copied, (args, kwargs))
        call = Call(path, given_then, self._moment, len(self.operations), arguments, shapes)
        self.calls.append(call)
        open_calls.append(call)

    def _leave(self, open_calls: list[Call], _module: nn.Module, _args: Any, output: Any) -> None:
        call = open_calls.pop()
        self._moment += 1
        call.stop, call.closed = len(self.operations), self._moment
        call.container = type(output) if isinstance(output, tuple | list) else None
        if call.container is None:
            output = (output,)
        call.outputs = tuple(self.number(x) if isinstance(x, Tensor) else None for x in output)


@contextmanager
def recording(model: nn.Module) -> Iterator[Tape]:
    """Within the context every operation and every call of a module of ``model`` goes onto the tape.

    Use it for one forward pass without gradients. Its hooks are added last, so that other hooks count as part of their
    module. They are removed afterwards.
    """
    tape, open_calls, handles = Tape(), list[Call](), []
    for path, module in model.named_modules():
        enter, leave = partial(tape._enter, open_calls, path), partial(tape._leave, open_calls)
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with _Recorder(tape):
            yield tape
    finally:
        for handle in handles:
            handle.remove()


def _copied(tensor: Tensor) -> Tensor:
    """A tensor as it is now; a fake one has nothing to keep."""
    return tensor if isinstance(tensor, FakeTensor) else tensor.clone()


class _Recorder(TorchDispatchMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._tape._record(func, args, kwargs or {})


def _written(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operator writes over."""
    for place, name in _writes(function):
        given = args[place] if place < len(args) else kwargs.get(name)
        yield from given if isinstance(given, tuple | list) else () if given is None else (given,)


@functools.cache
def _writes(function: Any) -> tuple[tuple[int, str], ...]:
    """Places and names of the arguments that an operator writes over, as its schema says."""
    written = enumerate(function._schema.arguments)
    return tuple((place, arg.name) for place, arg in written if arg.alias_info is not None and arg.alias_info.is_write)


def _mapped_values(value: Any) -> Any:
    """Nested arguments with None for every tensor."""
    if type(value) in (tuple, list):
        return tuple(_mapped_values(inner) for inner in value)
    if type(value) is dict:
        return tuple((key, _mapped_values(inner)) for key, inner in value.items())
    return None if isinstance(value, Value) else value


def _mapped(act: Callable[[Tensor], Any], value: Any) -> Any:
    """The same nested tuples, lists and dicts with every tensor replaced; the general tree_map is ten times as slow."""
    if isinstance(value, Tensor):
        return act(value)
    if type(value) in (tuple, list):
        return type(value)([_mapped(act, inner) for inner in value])
    if type(value) is dict:
        return {key: _mapped(act, inner) for key, inner in value.items()}
    return value
