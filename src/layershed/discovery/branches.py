"""From the data flow of a block to its sublayers: the stand-ins for their modules, and where X and Y can be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Literal

from torch import nn

from layershed.discovery.branch_kinds import Make, kind_of
from layershed.discovery.captured import Captures
from layershed.discovery.linear_place import LinearReplacement, find_linear
from layershed.discovery.recording import Call, Key
from layershed.discovery.replacement import Modules, Replacement, Unfit, outermost
from layershed.discovery.residual_stream import BlockFlow, BranchFlow
from layershed.planning.plan import Kind, Sublayer
from layershed.stand_ins.stand_in import RemovedModule, StandIn

Topology = Literal["sequential", "parallel"]


@dataclass(frozen=True)
class Tap:
    """A place where a tensor can be read while the model runs.

    Args:
        path: Path of a module.
        key: Position or name of one of its arguments, or None for what it returns.
    """

    path: str
    key: Key | None = None


@dataclass(frozen=True)
class LinearPlace:
    """Where a linear map can run in place of a sublayer.

    Args:
        reads: Where h, the output of the sublayer's own norm, can be read in the dense model.
        writes: Where b can be read there; None if only X and Y can be.
        scale: Y = X + scale * b, before the norm that follows in a post-LN block.
        in_post_norm: Whether a norm in the stream follows it (post-LN).
        width: Size of h, and of what the map gives.
        stand_ins: By module path, the stand-ins of the modules that stop running. Exactly one is a core; it takes the
            map.
    """

    reads: Tap
    writes: Tap | None
    scale: float
    in_post_norm: bool
    width: int
    stand_ins: tuple[tuple[str, StandIn], ...]


@dataclass(frozen=True)
class Branch:
    """A sublayer with the facts that surgery and importance need.

    Args:
        sublayer: The sublayer.
        topology: ``"sequential"``: it reads the Y of the sublayer before it; ``"parallel"``: it reads the same X
            as another sublayer.
        entry: Where X can be read.
        exit: Where its output can be read.
        scale: Y = X + scale * b, where b is read at the exit; None if Y itself is read there.
        stand_ins: By module path, the stand-ins for its own modules.
        support: By module path, the stand-ins for norms and similar modules, used once every sublayer that needs
            them is dropped.
        parts: Its terms in the data flow.
        overwritten: Whether its block writes over the stream that it reads, ``x += f(x)``.
        linear: Where a linear map can run in its place; None if that could not be proven.
    """

    sublayer: Sublayer
    topology: Topology
    entry: Tap
    exit: Tap
    scale: float | None
    stand_ins: tuple[tuple[str, StandIn], ...]
    support: tuple[tuple[str, StandIn], ...] = ()
    parts: tuple[BranchFlow, ...] = field(default=(), compare=False, repr=False)
    overwritten: bool = False
    linear: LinearPlace | None = None


@dataclass(frozen=True)
class LeftAlone:
    """A whole block, or a part of one, that cannot be dropped.

    Args:
        path: Path of its module.
        reason: Why it cannot be dropped, as the end of a sentence.
    """

    path: str
    reason: str


def branches_of(
    flow: BlockFlow,
    block: int,
    model: nn.Module,
    slots: Mapping[str, tuple[int, int]] | None,
    tokenwise: dict[Make, bool],
) -> tuple[list[list[Branch]], list[LeftAlone]]:
    """The sublayers of a block in the order in which they run, and what is left alone.

    Args:
        flow: The block's data flow.
        block: Its index.
        model: The model that the tape was made of.
        slots: By module path, the slot of the KV cache that the module fills, and the number of probe tokens it stores;
            None if unknown.
        tokenwise: Results of :func:`kind_of` for earlier branches, which it reads and extends.

    Returns:
        One list of sublayers; several if a module holds several attentions in sequence (LongCat-Flash): each
        attention then begins a new block.
    """
    return _Block(flow, block, model, slots, tokenwise).assemble()


class _Block:
    def __init__(
        self,
        flow: BlockFlow,
        block: int,
        model: nn.Module,
        slots: Mapping[str, tuple[int, int]] | None,
        tokenwise: dict[Make, bool],
    ) -> None:
        self.flow, self.tape, self.block, self.tokenwise = flow, flow.tape, block, tokenwise
        self.calls = list(flow.tape.within(flow.call))
        self.modules = Modules(flow, slots, Captures(model, flow.tape))
        parameters = list(signature(model.get_submodule(flow.call.path).forward).parameters)
        positions = dict(enumerate(parameters))
        operations = flow.tape.operations[flow.call.start : flow.call.stop]
        self._overwritten = any(not flow.stream.keys().isdisjoint(operation.renews) for operation in operations)
        self.names = {key: positions.get(key, "") if isinstance(key, int) else key for key in flow.call.arguments}
        self.left_alone: list[LeftAlone] = []
        removed = [call for call in self.calls if isinstance(model.get_submodule(call.path), RemovedModule)]
        self._maps = [call for call in removed if any(map(self.tape.is_product, range(call.start, call.stop)))]

    def assemble(self) -> tuple[list[list[Branch]], list[LeftAlone]]:
        found: list[tuple[Branch, list[BranchFlow]]] = []
        for kind, parts in self._groups():
            branch = self._branch(kind, parts)
            if branch is not None:
                found.append((branch, parts))
        found.sort(key=lambda pair: (pair[1][0].join, self.tape.calls_of(pair[0].sublayer.path)[0].opened))
        blocks: list[list[Branch]] = [[]]
        for branch, _ in found:
            kind = branch.sublayer.kind
            if any(other.sublayer.kind == kind for other in blocks[-1]):
                if kind != "attention":
                    self.left_alone.append(LeftAlone(branch.sublayer.path, f"its block has another {kind} before it"))
                    continue
                blocks.append([])
            blocks[-1].append(branch)
        dropped = [part for block in blocks for branch in block for part in branch.parts]
        blocks = [[self._in_block(b, self.block + i, dropped) for b in block] for i, block in enumerate(blocks)]
        return blocks, self.left_alone

    def _groups(self) -> list[tuple[Kind, list[BranchFlow]]]:
        """The terms of each sublayer; parallel MLPs, such as experts and a shared expert, are one."""
        groups: dict[tuple[Kind, object], list[BranchFlow]] = {}
        for branch in self.flow.branches:
            if self._is_map(branch):
                self.flow.plain = False
                continue
            kind, reason = kind_of(self.flow, branch, self.names, self.tokenwise)
            if kind is None:
                self._leave_alone(branch, reason)
            else:
                groups.setdefault((kind, branch.before if kind == "mlp" else branch.value), []).append(branch)
        return [(kind, side) for (kind, _), parts in groups.items() for side in self._side_by_side(parts)]

    def _is_map(self, branch: BranchFlow) -> bool:
        """Whether a linear map in place of a removed sublayer computes it."""
        products = [operation for operation in branch.cone if self.tape.is_product(operation)]
        return bool(products) and all(any(i in call for call in self._maps) for i in products)

    def _side_by_side(self, parts: list[BranchFlow]) -> list[list[BranchFlow]]:
        """The terms as one group, unless another term joins the stream between them."""
        together = self.flow.stream[parts[-1].after] - parts[0].before == {part.value for part in parts}
        return [parts] if together else [[part] for part in parts]

    def _leave_alone(self, branch: BranchFlow, reason: str) -> None:
        self.left_alone.append(LeftAlone(self.modules.path(branch), reason))

    def _branch(self, kind: Kind, parts: list[BranchFlow]) -> Branch | None:
        """One sublayer, or None if it has to be left alone."""
        found = [self.modules.find(kind, part) for part in parts]
        fit = [each for each in found if isinstance(each, Replacement)]
        entry, read = self._entry(parts[0]), self._exit(parts)
        if isinstance(entry, Unfit) or isinstance(read, Unfit) or len(fit) < len(found):
            reasons = [each.reason for each in (*found, entry, read) if isinstance(each, Unfit)]
            self._leave_alone(parts[0], reasons[0])
            return None
        sublayer = Sublayer(self.block, kind, fit[0].core.call.path)
        own = {each.core.call.path: self.modules.stand_in(sublayer, each.core, core=True) for each in fit}
        around = {
            support.call.path: self.modules.stand_in(sublayer, support, core=False)
            for each in fit
            for support in each.support
        }
        others = [branch for branch in self.flow.branches if branch not in parts]
        beside = any(other.before == parts[0].before for other in others)
        topology: Topology = "parallel" if beside else "sequential"
        stand_ins, support = tuple(own.items()), tuple(around.items())
        return Branch(
            sublayer,
            topology,
            entry,
            *read,
            stand_ins,
            support,
            parts=tuple(parts),
            overwritten=self._overwritten,
            linear=self._linear(sublayer, parts, fit),
        )

    def _linear(self, sublayer: Sublayer, parts: list[BranchFlow], fit: list[Replacement]) -> LinearPlace | None:
        """Where a linear map can run; of several terms the first one holds it, and the others give zeros."""
        found = find_linear(self.modules, sublayer.kind, parts[0], fit[0])
        if not isinstance(found, LinearReplacement) or (len(parts) > 1 and found.around):
            return None
        scales, writer = {part.scale for part in parts}, self.modules.writer(parts[0])
        if len(scales) > 1 or None in scales or (parts[-1].norm is not None and writer is None):
            return None
        core = replace(self.modules.stand_in(sublayer, found.core, core=True), source=found.source)
        around = [(each.call.path, self.modules.stand_in(sublayer, each, core=False)) for each in found.around]
        others = [(each.core.call.path, self.modules.stand_in(sublayer, each.core, core=False)) for each in fit[1:]]
        call, key = found.reads
        writes = None if writer is None or len(parts) > 1 else Tap(writer.path)
        return LinearPlace(
            Tap(call.path, key),
            writes,
            parts[0].scale or 1.0,
            parts[-1].norm is not None,
            call.shapes[key][-1],
            ((found.core.call.path, core), *around, *others),
        )

    def _in_block(self, branch: Branch, block: int, dropped: list[BranchFlow]) -> Branch:
        """The same branch in the block of its final index, with the support that goes once all its users go."""
        sublayer = replace(branch.sublayer, block=block)
        own = tuple((path, replace(stand_in, sublayer=sublayer)) for path, stand_in in branch.stand_ins)
        support = tuple(
            (path, replace(stand_in, sublayer=sublayer))
            for path, stand_in in branch.support
            if self.modules.is_spare(path, dropped)
        )
        linear = branch.linear
        if linear is not None:
            placed = tuple((path, replace(stand_in, sublayer=sublayer)) for path, stand_in in linear.stand_ins)
            linear = replace(linear, stand_ins=placed)
        return replace(branch, sublayer=sublayer, stand_ins=own, support=support, linear=linear)

    def _entry(self, branch: BranchFlow) -> Tap | Unfit:
        for call in self._called_once():
            if any(operation in call for operation in branch.cone):
                for key, value in call.arguments.items():
                    if self.flow.stream.get(value) == branch.before:
                        return Tap(call.path, key)
        if not branch.before:
            return Tap(self.flow.call.path, self.flow.source)
        return Unfit("no module takes its X")

    def _exit(self, parts: list[BranchFlow]) -> tuple[Tap, float | None] | Unfit:
        """Where b can be read, after its dropout if it has one; otherwise where Y can be read."""
        last = parts[-1]
        calls = self._called_once()
        if len(parts) == 1 and last.norm is None and last.scale is not None:
            writers = outermost([call for call in calls if call.output == last.value])
            if writers:
                return Tap(writers[-1].path), last.scale
        writers = [call for call in calls if call.output == last.after]
        if writers:
            return Tap(writers[0].path), None
        after = self.flow.stream[last.after]
        if after - parts[0].before != {part.value for part in parts}:
            return Unfit("a branch beside it joins the stream before it")
        for call in calls:
            for key, value in call.arguments.items():
                if call.start > last.join and self.flow.stream.get(value) == after:
                    return Tap(call.path, key), None
        if self.flow.position(self.flow.call.output) == after:
            return Tap(self.flow.call.path), None
        return Unfit("no module takes its Y")

    def _called_once(self) -> list[Call]:
        return [call for call in self.calls if len(self.tape.calls_of(call.path)) == 1]
