"""The parts of a recorded model: its blocks, their sublayers, and what is left alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from layershed.discovery.branch_kinds import Make, is_attention, is_zero
from layershed.discovery.branches import Branch, LeftAlone, LinearPlace, Tap, branches_of
from layershed.discovery.recording import Tape
from layershed.discovery.registry import registered_adapter
from layershed.discovery.residual_stream import BlockFlow, follow_block
from layershed.discovery.verification import Trial, sift
from layershed.errors import UnprovenStructureError
from layershed.stand_ins.stand_in import RemovedModule, StandIn


@dataclass(frozen=True)
class Anatomy:
    """The result of discovery.

    Args:
        branches: The sublayers in forward order.
        left_alone: Everything else that the blocks add to their stream, with the reason why it cannot be dropped.
        blocks: By index, the block and the place where it takes X; None for a block that is left alone as a whole, or
            is only a part of a module.
        plain: Indices of the blocks that compute X plus their sublayers' branches and nothing else.
        tokens_first: Whether X is of shape (tokens, batch, hidden), as XLNet's is.
        paths: Paths of all blocks, in the order in which they run.
    """

    branches: tuple[Branch, ...]
    left_alone: tuple[LeftAlone, ...]
    blocks: tuple[Tap | None, ...]
    plain: frozenset[int]
    tokens_first: bool
    paths: tuple[str, ...] = ()

    @property
    def cores(self) -> tuple[str, ...]:
        """Paths of the sublayers' own modules."""
        return tuple(path for branch in self.branches for path, stand_in in branch.stand_ins if stand_in.core)

    def copy(self, more: Mapping[str, Mapping[str, Any]] | None = None) -> Anatomy:
        """A copy with its own stand-ins, which are mutable, and without references to the recording.

        Args:
            more: By path, further fields of the stand-ins.
        """
        fields = more or {}

        def own(stand_ins: tuple[tuple[str, StandIn], ...]) -> tuple[tuple[str, StandIn], ...]:
            return tuple((path, replace(stand_in, own={}, **fields.get(path, {}))) for path, stand_in in stand_ins)

        def place(linear: LinearPlace | None) -> LinearPlace | None:
            return None if linear is None else replace(linear, stand_ins=own(linear.stand_ins))

        branches = (
            replace(b, stand_ins=own(b.stand_ins), support=own(b.support), linear=place(b.linear), parts=())
            for b in self.branches
        )
        return replace(self, branches=tuple(branches))


def take_apart(transformer: nn.Module, tape: Tape, slots: Mapping[str, tuple[int, int]] | None) -> tuple[Anatomy, bool]:
    """The anatomy of a recorded model, and whether one of its branches gave only zeros."""
    branches: list[Branch] = []
    left_alone: list[LeftAlone] = []
    blocks: list[Tap | None] = []
    plain: set[int] = set()
    tokens_first = of_zeros = False
    tokenwise: dict[Make, bool] = {}
    exact: dict[Trial, bool] = {}
    paths = tuple(_block_paths(transformer, tape))
    for path in paths:
        calls = tape.calls_of(path)
        try:
            if len(calls) != 1:
                raise UnprovenStructureError(f"it ran {len(calls)} times in a forward pass")
            flow = follow_block(tape, calls[0])
        except UnprovenStructureError as error:
            if len(calls) == 1 and any(is_attention(tape, i) for i in range(calls[0].start, calls[0].stop)):
                raise
            left_alone.append(LeftAlone(path, str(error)))
            blocks.append(None)
            continue
        own, others = branches_of(flow, len(blocks), transformer, slots, tokenwise)
        own, failed = _sifted(transformer, flow, own, exact)
        tokens_first |= calls[0].shapes[flow.source][1:2] == (1,)
        of_zeros |= any(is_zero(tape.tensors[branch.value]) for branch in flow.branches)
        if flow.plain and len(own) == 1 and not [*others, *failed]:
            plain.add(len(blocks))
        blocks += [Tap(path, flow.source)] if len(own) == 1 else [None] * len(own)
        branches += [branch for block in own for branch in block]
        left_alone += [*others, *failed]
    anatomy = Anatomy(tuple(branches), tuple(left_alone), tuple(blocks), frozenset(plain), tokens_first, paths)
    return anatomy.copy(), of_zeros


def _sifted(
    transformer: nn.Module, flow: BlockFlow, blocks: list[list[Branch]], exact: dict[Trial, bool]
) -> tuple[list[list[Branch]], list[LeftAlone]]:
    """The branches that pass their trial, by block, and those that fail it, as left alone."""
    good, bad = sift(transformer, flow, [branch for block in blocks for branch in block], exact)
    reason = "replacing it does not reproduce a zero branch"
    kept = [
        [branch for branch in good if branch.sublayer.block == block[0].sublayer.block] for block in blocks if block
    ]
    return kept or [[]], [LeftAlone(branch.sublayer.path, reason) for branch in bad]


def _block_paths(transformer: nn.Module, tape: Tape) -> Iterator[str]:
    """Paths of the blocks, in the order of running: the members of the outermost lists in which attention ran."""
    attention = {i for i in range(len(tape.operations)) if is_attention(tape, i)}
    found: dict[str, int] = {}
    registered = registered_adapter(transformer)
    for path, module in transformer.named_modules():
        if any(path.startswith(f"{outer}.") for outer in found) or len(module._modules) == 0:
            continue
        if registered is not None and registered.blocks:
            if path not in registered.blocks:
                continue
        elif not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        calls = [call for name in module._modules for call in tape.calls_of(f"{path}.{name}")]
        removed = any(isinstance(inner, RemovedModule) for inner in module.modules())
        if calls and (removed or any(i in call for call in calls for i in attention)):
            found[path] = calls[0].start
    for path in sorted(found, key=found.__getitem__):
        yield from (f"{path}.{name}" for name in transformer.get_submodule(path)._modules)
