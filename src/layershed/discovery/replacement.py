"""Which modules compute a branch and nothing else, and what stands in for them once it is dropped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from layershed.discovery.branch_kinds import is_attention
from layershed.discovery.recording import Call, Key, Operation
from layershed.discovery.residual_stream import BlockFlow, BranchFlow
from layershed.planning.plan import Kind, Sublayer
from layershed.stand_ins.stand_in import UNKNOWN_SLOT, StandIn

# what a zero stays zero under
_ZERO_KEEPING = {"mul", "div", "neg", "view", "_unsafe_view", "_reshape_alias", "clone", "_to_copy", "detach", "alias"}
_ZERO_KEEPING |= {"unsqueeze", "squeeze", "transpose", "permute", "t", "slice", "expand", "native_dropout", "tanh"}


class Unfit(Exception):
    """Why a branch cannot be dropped, as the end of a sentence."""


class Modules:
    """The modules of one block, and what they have to do with its branches.

    Args:
        flow: The block's data flow.
        slots: By module path, the slot of the KV cache that it fills, and with how many tokens of the probe's.
    """

    def __init__(self, flow: BlockFlow, slots: Mapping[str, tuple[int, int]] | None) -> None:
        self.flow, self.tape, self.slots = flow, flow.tape, slots
        self.calls = list(flow.tape.within(flow.call))
        self.spine = {flow.tape.producer[v] for v in flow.stream if flow.tape.producer.get(v, -1) in flow.call}

    def path(self, branch: BranchFlow) -> str:
        """Path of the last module with products in it."""
        calls = self.own_calls(branch)
        heavy = [call for call in calls if self._is_heavy("mlp", branch, call)]
        return next((call.path for call in reversed(heavy or calls)), self.flow.call.path)

    def own_calls(self, branch: BranchFlow) -> list[Call]:
        """The outermost calls that compute the branch and nothing of the stream."""
        fit = [
            call
            for call in self.calls
            if not any(operation in call for operation in self.spine)
            and any(operation in call for operation in branch.cone)
        ]
        return outermost(fit)

    def find(self, kind: Kind, branch: BranchFlow) -> tuple[list[tuple[Call, bool, Key]], list[tuple[Call, Key]]]:
        """The modules that compute a branch.

        Args:
            kind: Its kind.
            branch: The branch.

        Returns:
            The core, as (call, whether it gives zero, key of its hidden states), and the calls around it.

        Raises:
            Unfit: If no modules compute it and nothing else.
        """
        calls = self.own_calls(branch)
        joining = self._joining(branch)
        if joining is not None:
            try:
                return self._joining_modules(kind, branch, calls, *joining)
            except Unfit:
                pass  # its parts may fit
        heavy = [call for call in calls if self._is_heavy(kind, branch, call)]
        if not heavy or not self._covers(kind, branch, calls):
            raise Unfit("it is not computed by modules of its own")
        core = heavy[-1]
        behind = [i for call in calls if call.opened > core.opened for i in range(call.start, call.stop)]
        # a short convolution behind the core goes along with it
        if any(self.tape.is_product(i) and self.tape.operations[i].name != "convolution" for i in behind):
            raise Unfit(f"{core.path} is not all of it")
        self._check_by_products(branch, calls, core.output)
        support = self._support(branch, [call for call in calls if call is not core])
        self._check_tail(branch, core, [call for call, _ in support])
        return [(core, True, self._hidden_key(branch, core))], support

    def _joining_modules(
        self, kind: Kind, branch: BranchFlow, calls: list[Call], core: Call, key: Key
    ) -> tuple[list[tuple[Call, bool, Key]], list[tuple[Call, Key]]]:
        """As :meth:`find`, where the core adds its branch to the stream itself."""
        around = [call for call in calls if not core.contains(call)]
        if not self._covers(kind, branch, [core] if kind != "mlp" else [core, *around]):
            raise Unfit(f"{core.path} is not all of it")
        self._check_by_products(branch, [core, *around], core.output)
        return [(core, False, key)], [pair for pair in self._support(branch, around) if not core.contains(pair[0])]

    def _covers(self, kind: Kind, branch: BranchFlow, calls: list[Call]) -> bool:
        """Whether all products (or all attention) of a branch happen inside some calls."""
        return all(any(i in call for call in calls) for i in branch.cone if self._counts(kind, i))

    def _is_heavy(self, kind: Kind, branch: BranchFlow, call: Call) -> bool:
        return any(
            self._counts(kind, operation) for operation in range(call.start, call.stop) if operation in branch.cone
        )

    def _counts(self, kind: Kind, operation: int) -> bool:
        return self.tape.is_product(operation) if kind == "mlp" else is_attention(self.tape, operation)

    def _joining(self, branch: BranchFlow) -> tuple[Call, Key] | None:
        """The module that adds the branch to the stream itself, as BERT's and BLOOM's do, and where it takes X."""
        stream = self.flow.stream
        others = [other.join for other in self.flow.branches if other is not branch]
        for call in self.calls:
            if branch.join not in call or any(join in call for join in others):
                continue
            joined = stream[branch.after] - {branch.value}
            key = next((k for k, v in call.arguments.items() if stream.get(v) == joined), None)
            done = call.output == branch.after or self.flow.position(call.output) == stream[branch.after]
            if key is not None and done and (branch.norm is None or branch.norm.start >= call.start):
                return call, key
        return None

    def _check_tail(self, branch: BranchFlow, core: Call, passing: list[Call]) -> None:
        """Whatever happens between the core and the stream must let a zero pass."""
        tainted = {core.output}
        for index in sorted(branch.cone):
            operation = self.tape.operations[index]
            if index < core.stop or tainted.isdisjoint(operation.reads):
                continue
            tainted.update(operation.writes)
            if any(index in call for call in passing):
                continue
            name = operation.name.removesuffix("_")
            # a bias that the core itself returns goes with it
            silent = {*tainted, *core.outputs, *self._views_of(core.outputs)}
            silent.update(value for value in operation.reads if self._is_zero(value))
            keeps = name in _ZERO_KEEPING and (name != "div" or operation.reads[0] in tainted)
            keeps = keeps or (name == "add" and silent.issuperset(operation.reads))
            if not keeps:
                raise Unfit(f"{operation.name} comes between it and the stream")

    def _is_zero(self, value: int) -> bool:
        """Whether a value is zeros that were just made, as a removed module gives them."""
        while (index := self.tape.producer.get(value)) is not None:
            operation = self.tape.operations[index]
            if operation.name in ("new_zeros", "zeros_like", "zeros"):
                return True
            if operation.name not in _ZERO_KEEPING or not operation.reads:
                return False
            value = operation.reads[0]
        return False

    def _views_of(self, values: Iterable[int | None]) -> set[int]:
        """What the block makes of some values by looking at them in another shape."""
        found = set(values)
        for operation in self._block_operations():
            if operation.name in _ZERO_KEEPING and found.issuperset(operation.reads):
                found.update(operation.makes)
        return {value for value in found if value is not None}

    def _check_by_products(self, branch: BranchFlow, calls: list[Call], result: int | None) -> None:
        """Nothing that its modules compute may be read by anything else, their result and shared norms aside."""
        others = [other for other in self.flow.branches if other is not branch]
        if any(branch.value in self.tape.operations[i].reads for other in others for i in other.cone):
            raise Unfit("another branch reads what it gives")
        inside = {operation for call in calls for operation in range(call.start, call.stop)}
        shared = {i for other in others for i in other.cone}
        for call in calls:
            for value in self.tape.made_in(call):
                if value == result or value == branch.value or value == branch.after or value in self.flow.stream:
                    continue
                readers = [i for i in self.tape.consumers[value] if i not in inside and i not in branch.cone]
                if self.tape.producer[value] in branch.cone and value == call.output:
                    readers = [i for i in readers if i not in shared]  # a norm that two branches read
                if readers:
                    raise Unfit("what it computes on the way is read elsewhere, too")

    def _support(self, branch: BranchFlow, calls: Iterable[Call]) -> list[tuple[Call, Key]]:
        """Those of the calls that can hand their input on while the branch does not run."""
        found = []
        for call in calls:
            keys = [key for key in call.arguments if self._moves(call.arguments[key], branch)]
            once = len(self.tape.calls_of(call.path)) == 1
            if once and len(keys) == 1 and call.container is None and call.output is not None:
                found.append((call, keys[0]))
        if branch.norm is not None and self.tape.calls_of(branch.norm.path)[1:] == []:
            moving = [key for key, value in branch.norm.arguments.items() if value in self.flow.stream]
            found += [(branch.norm, key) for key in moving[:1]]
        return found

    def _moves(self, value: int, branch: BranchFlow) -> bool:
        return value in self.flow.stream or self.tape.producer.get(value) in branch.cone

    def _hidden_key(self, branch: BranchFlow, core: Call) -> Key:
        """Which argument tells the shape of the branch."""
        assert core.output is not None
        shape = tuple(self.tape.tensors[core.output].shape)
        moving = [key for key, value in core.arguments.items() if self._moves(value, branch)]
        same = [key for key in moving if core.shapes[key] == shape]
        if not moving:
            raise Unfit(f"{core.path} takes nothing of the stream")
        if not same and len(core.shapes[moving[0]]) < len(shape):
            raise Unfit(f"{core.path} gives tokens by sequence and takes them flattened")
        return (same or moving)[0]

    def stand_in(self, sublayer: Sublayer, call: Call, *, zero: bool, key: Key, core: bool) -> StandIn:
        """What stands in for the module of a call."""
        if core and len(self.tape.calls_of(call.path)) > 1:
            raise Unfit(f"{call.path} ran more than once in a forward pass")
        echoes = None
        if call.container is not None:
            given = {value: key for key, value in call.arguments.items()}
            echoes = tuple(given.get(value) if value is not None else None for value in call.outputs[1:])
        layer_idx, stride = None, 1
        if core and sublayer.kind == "attention" and self.slots is None:
            layer_idx = UNKNOWN_SLOT
        elif core and sublayer.kind == "attention" and self.slots and call.path in self.slots:
            layer_idx, cached = self.slots[call.path]
            stride = max(1, call.shapes[key][1] // cached)
        overwritten = any(call.output in operation.renews for operation in self._block_operations())
        return StandIn(
            sublayer,
            zero,
            core,
            argument=key,
            echoes=echoes,
            given=tuple(call.arguments) if core else (),
            layer_idx=layer_idx,
            stride=stride,
            materialize=zero and overwritten,
            as_list=call.container is list,
        )

    def _block_operations(self) -> list[Operation]:
        return self.tape.operations[self.flow.call.start : self.flow.call.stop]

    def is_spare(self, path: str, dropped: list[BranchFlow]) -> bool:
        """Whether nothing but dropped branches needs a module: neither the stream nor what is left alone."""
        cones = {operation for branch in dropped for operation in branch.cone}
        results = {branch.value for branch in dropped}
        call = self.tape.calls_of(path)[0]
        made = [value for value in self.tape.made_in(call) if value not in results]
        readers = {reader for value in made for reader in self.tape.consumers[value] if reader not in call}
        return readers <= cones or any(branch.norm is call for branch in dropped)


def outermost(calls: list[Call]) -> list[Call]:
    """Those of the calls that happened inside no other one."""
    return [call for call in calls if not any(other.contains(call) for other in calls)]
