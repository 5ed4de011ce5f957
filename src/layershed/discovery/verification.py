"""A trial of each stand-in: the block runs with it, and its recording is computed again with a branch of zeros.

Both outputs must agree. The second computation repeats recorded operations and calls no module. So the trial fails,
before anything is dropped, if a stand-in

- returns the wrong tensor,
- returns a tensor of another shape,
- returns a tensor that the block later writes over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from layershed.discovery.branch_kinds import is_symbolic
from layershed.discovery.branches import Branch, LinearPlace, Tap
from layershed.discovery.recompute import replay
from layershed.discovery.residual_stream import BlockFlow, BranchFlow
from layershed.stand_ins.contexts import standing_in
from layershed.stand_ins.linear_map import LinearMap
from layershed.stand_ins.stand_in import StandIn


class Trial(NamedTuple):
    """Equal trials have equal results.

    Args:
        block: Class of the block.
        operations: Names of its operations.
        dropped: The branches to try without.
        kept: The others.
    """

    block: type
    operations: tuple[str, ...]
    dropped: tuple[tuple[object, ...], ...]
    kept: tuple[tuple[object, ...], ...]


def sift(
    model: nn.Module, flow: BlockFlow, branches: list[Branch], exact: dict[Trial, bool]
) -> tuple[list[Branch], list[Branch]]:
    """Try the branches of a block: each alone, then all that passed together.

    Args:
        model: The model, in the state in which it was recorded.
        flow: The block's data flow.
        branches: Its branches.
        exact: Results of earlier trials; read and extended.

    Returns:
        The branches that can be dropped, and the branches that cannot.
    """
    good: list[Branch] = []
    for branch in branches:
        if _stands(model, flow, [branch], [other for other in branches if other is not branch], exact):
            good.append(branch)
    if len(good) > 1 and not _stands(model, flow, good, [b for b in branches if b not in good], exact):
        good = []
    bad = [branch for branch in branches if branch not in good]
    # a norm that a kept branch also reads must keep running
    needed = {path for branch in bad for path, _ in branch.support}
    good = [replace(b, support=tuple(pair for pair in b.support if pair[0] not in needed)) for b in good]
    return [_with_proven_map(model, flow, branch, exact) for branch in good], bad


def _with_proven_map(model: nn.Module, flow: BlockFlow, branch: Branch, exact: dict[Trial, bool]) -> Branch:
    """The branch, without its place for a linear map if a map there would not give what joins the stream."""
    if branch.linear is None:
        return branch
    trial = Trial(*_block_of(model, flow), (("linear",), _make(flow, branch, branch.linear.stand_ins)), ())
    if trial not in exact:
        exact[trial] = _maps_exactly(model, flow, branch, branch.linear)
    return branch if exact[trial] else replace(branch, linear=None)


def _stands(
    model: nn.Module, flow: BlockFlow, dropped: list[Branch], kept: list[Branch], exact: dict[Trial, bool]
) -> bool:
    """The result of :func:`is_exact`, from an equal trial if there was one."""
    trial = Trial(*_block_of(model, flow), tuple(_makes(flow, dropped)), tuple(_makes(flow, kept)))
    if trial not in exact:
        exact[trial] = is_exact(model, flow, dropped, kept)
    return exact[trial]


def _block_of(model: nn.Module, flow: BlockFlow) -> tuple[type, tuple[str, ...]]:
    names = tuple(o.name for o in flow.tape.operations[flow.call.start : flow.call.stop])
    return type(model.get_submodule(flow.call.path)), names


def _makes(flow: BlockFlow, branches: Iterable[Branch]) -> Iterator[tuple[object, ...]]:
    for branch in branches:
        yield _make(flow, branch, (*branch.stand_ins, *branch.support))


def _make(flow: BlockFlow, branch: Branch, stand_ins: Iterable[tuple[str, StandIn]]) -> tuple[object, ...]:
    """Everything that a branch's trial depends on, with paths and operations relative to its block."""
    places = tuple((part.join - flow.call.start, len(part.before)) for part in branch.parts)
    parts = tuple(
        (path.removeprefix(f"{flow.call.path}."), s.zero, s.argument, s.source, s.echoes, s.materialize)
        for path, s in stand_ins
    )
    return branch.sublayer.kind, branch.scale, branch.topology, places, parts


def is_exact(model: nn.Module, flow: BlockFlow, dropped: Iterable[Branch], kept: Iterable[Branch]) -> bool:
    """Whether a block with stand-ins gives the same output as with branches of zeros.

    Args:
        model: The model, in the state in which it was recorded.
        flow: The block's data flow.
        dropped: The branches to try without.
        kept: The other ones.

    Returns:
        True on fake tensors, which have no numbers. The trial is repeated once the model holds weights.
    """
    call = flow.call
    assert call.output is not None
    recorded = flow.tape.tensors[call.output]
    if is_symbolic(recorded):
        return True
    shared = {path for branch in kept for path, _ in branch.support}
    stand_ins: dict[str, StandIn] = {}
    for branch in dropped:
        stand_ins |= dict(branch.stand_ins)
        stand_ins |= {path: stand_in for path, stand_in in branch.support if path not in shared}
    parts = [part for branch in dropped for part in branch.parts]
    return _runs_as(model, flow, stand_ins, parts, _without(flow, parts))


def _maps_exactly(model: nn.Module, flow: BlockFlow, branch: Branch, place: LinearPlace) -> bool:
    """Whether a block with a random linear map gives the same output as with the map's result for the branch."""
    value, *others = branch.parts
    expected = flow.tape.tensors[value.value]
    if is_symbolic(expected):
        return True
    assert place.reads.key is not None
    h = flow.tape.tensors[flow.tape.calls_of(place.reads.path)[0].arguments[place.reads.key]]
    if h.shape[-1] != expected.shape[-1] or h.numel() != expected.numel():
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(h.shape[-1], h.shape[-1], generator=generator) / h.shape[-1]
    trial_map = LinearMap.of(weight.to(h), torch.linspace(-1, 1, h.shape[-1]).to(h))
    stand_ins = {path: replace(s, map=trial_map if s.core else None) for path, s in place.stand_ins}
    with torch.no_grad():
        values = {value.value: trial_map(h).view(expected.shape)}
    values |= {other.value: torch.zeros_like(flow.tape.tensors[other.value]) for other in others}
    return _runs_as(model, flow, stand_ins, list(branch.parts), values)


def _runs_as(
    model: nn.Module,
    flow: BlockFlow,
    stand_ins: Mapping[str, StandIn],
    parts: list[BranchFlow],
    values: Mapping[int, Tensor],
) -> bool:
    """Whether a block with stand-ins gives what its recording gives with these values of the branches."""
    args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, flow.call.given)
    point = _check_point(flow, parts)
    try:
        with standing_in(model, stand_ins), _shapes_kept(model, flow, stand_ins), _reading(model, point) as seen:
            model.get_submodule(flow.call.path)(*args, **kwargs)
    except Exception:  # the dropped model would raise it, too
        return False
    if point is None:
        return True
    return bool(seen) and _equal(seen[0], replay(flow.tape, point[1], values))


def _check_point(flow: BlockFlow, parts: list[BranchFlow]) -> tuple[Tap, int] | None:
    """A place to compare at, and the value recorded there: right after the branches, before any other one reads them.

    Another X would route the tokens of a later branch to other experts, and recorded sizes would not fit.
    """
    assert flow.call.output is not None
    last = max(parts, key=lambda part: part.join)
    after = flow.stream[last.after]
    for call in flow.tape.within(flow.call):
        if call.output == last.after and last.join in call:
            return Tap(call.path), last.after
        for key, value in call.arguments.items():
            if call.start > last.join and flow.position(value) == after:
                return Tap(call.path, key), value
    gone = {part.value for part in parts}
    readers = [branch for branch in flow.branches if branch not in parts and not gone.isdisjoint(branch.before)]
    return None if readers else (Tap(flow.call.path), flow.call.output)


@contextmanager
def _reading(model: nn.Module, point: tuple[Tap, int] | None) -> Iterator[list[Tensor]]:
    """Fills a list with the tensor at a point, as it is at that moment."""
    seen: list[Tensor] = []
    if point is None:
        yield seen
        return
    tap, _ = point

    def argument(_module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((args[tap.key] if isinstance(tap.key, int) else kwargs[tap.key]).clone())

    def output(_module: nn.Module, _args: Any, result: Any) -> None:
        seen.append((result[0] if isinstance(result, tuple | list) else result).clone())

    module = model.get_submodule(tap.path)
    if tap.key is None:
        handle = module.register_forward_hook(output)
    else:
        handle = module.register_forward_pre_hook(argument, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _shapes_kept(model: nn.Module, flow: BlockFlow, stand_ins: Mapping[str, StandIn]) -> Iterator[None]:
    """Raises within the context if a stand-in returns another size: broadcast, it would fail on a larger batch only."""
    shapes = {call.path: flow.tape.tensors[call.output].shape for call in flow.tape.within(flow.call) if call.output}

    def check(path: str, _module: nn.Module, _args: object, output: object) -> None:
        first = output[0] if isinstance(output, tuple | list) else output
        if not isinstance(first, Tensor) or first.numel() != shapes[path].numel():
            raise ValueError(f"{path}: another size than in the recording")

    with ExitStack() as hooks:
        for path, stand_in in stand_ins.items():
            if stand_in.core:
                handle = model.get_submodule(path).register_forward_hook(partial(check, path))
                hooks.callback(handle.remove)
        yield


def _without(flow: BlockFlow, parts: Iterable[BranchFlow]) -> dict[int, Tensor]:
    """Zeros for the branches; where a norm in the stream follows one (post-LN), its input for its output."""
    values: dict[int, Tensor] = {}
    for part in sorted(parts, key=lambda part: part.join):
        values[part.value] = torch.zeros_like(flow.tape.tensors[part.value])
        if part.norm is not None:
            read = next(value for value in part.norm.arguments.values() if value in flow.stream)
            values[part.after] = replay(flow.tape, read, values)
    return values


def _equal(found: Tensor, expected: Tensor) -> bool:
    """Equal up to the rounding of a few additions."""
    if found.shape != expected.shape:
        return False
    tolerance = 4 * torch.finfo(expected.dtype).eps * expected.abs().max().item()
    return (found - expected).abs().max().item() <= tolerance
