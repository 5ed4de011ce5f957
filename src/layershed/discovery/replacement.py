"""Which modules compute a branch and nothing else, and which stand-ins replace them once it is dropped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from layershed.discovery.branch_kinds import is_attention
from layershed.discovery.captured import Captures
from layershed.discovery.recording import Call, Key, Operation
from layershed.discovery.residual_stream import BlockFlow, BranchFlow
from layershed.planning.plan import Kind, Sublayer
from layershed.stand_ins.stand_in import UNKNOWN_SLOT, StandIn

# operations that keep a zero at zero
_ZERO_KEEPING = {"mul", "div", "neg", "view", "_unsafe_view", "_reshape_alias", "clone", "_to_copy", "detach", "alias"}
_ZERO_KEEPING |= {"unsqueeze", "squeeze", "transpose", "permute", "t", "slice", "expand", "native_dropout", "tanh"}


@dataclass(frozen=True)
class Replaced:
    """A module that stops running once its branch is dropped.

    Args:
        call: Its call on the tape.
        key: The argument that holds the hidden states.
        zero: Whether its stand-in returns zeros; otherwise it returns the hidden states unchanged.
    """

    call: Call
    key: Key
    zero: bool


@dataclass(frozen=True)
class Replacement:
    """The modules to replace so that a branch contributes nothing.

    Args:
        core: The module that computes the branch. It returns zeros, or X where it adds the branch to X itself.
        support: Modules around the core, such as its norm. They return their input once no other branch needs them.

    Example:
        A Llama block computes ``x + mlp(post_attention_layernorm(x))``. For its MLP branch ``core`` is the call of
        ``mlp`` with ``key=0, zero=True``, and ``support`` is the call of ``post_attention_layernorm`` with
        ``key=0, zero=False``. What is left of the block is ``x + 0``. A BLOOM block calls ``mlp(normed, x)``, which
        adds ``x`` itself. There ``core`` has ``key=1, zero=False``: it returns ``x``.
    """

    core: Replaced
    support: tuple[Replaced, ...]


@dataclass(frozen=True)
class Unfit:
    """A branch that cannot be dropped.

    Args:
        reason: Why, as the end of a sentence.
    """

    reason: str


class Modules:
    """The modules of one block, and their part in its branches.

    Args:
        flow: The block's data flow.
        slots: By module path, the slot of the KV cache that the module fills, and the number of probe tokens it stores.
        captures: What transformers collects from the model's modules.
    """

    def __init__(self, flow: BlockFlow, slots: Mapping[str, tuple[int, int]] | None, captures: Captures) -> None:
        self.flow, self.tape, self.slots, self._captures = flow, flow.tape, slots, captures
        self.calls = list(flow.tape.within(flow.call))
        self.spine = {flow.tape.producer[v] for v in flow.stream if flow.tape.producer.get(v, -1) in flow.call}

    def path(self, branch: BranchFlow) -> str:
        """Path of the last module with products in it."""
        calls = self.own_calls(branch)
        heavy = [call for call in calls if self.is_heavy("mlp", branch, call)]
        return next((call.path for call in reversed(heavy or calls)), self.flow.call.path)

    def writer(self, branch: BranchFlow) -> Call | None:
        """The last module that returns the branch and ran once, if there is one."""
        once = [call for call in self.own_calls(branch) if len(self.tape.calls_of(call.path)) == 1]
        return next((call for call in reversed(once) if call.output == branch.value), None)

    def own_calls(self, branch: BranchFlow) -> list[Call]:
        """The outermost calls that compute only the branch, not the stream."""
        fit = [
            call
            for call in self.calls
            if not any(operation in call for operation in self.spine)
            and any(operation in call for operation in branch.cone)
        ]
        return outermost(fit)

    def find(self, kind: Kind, branch: BranchFlow) -> Replacement | Unfit:
        """The modules that compute a branch and nothing else, or why there are none."""
        calls = self.own_calls(branch)
        found = self._adding_itself(kind, branch, calls) or self._apart_from_stream(kind, branch, calls)
        if isinstance(found, Replacement) and len(self.tape.calls_of(found.core.call.path)) > 1:
            return Unfit(f"{found.core.call.path} ran more than once in a forward pass")
        return found

    def _apart_from_stream(self, kind: Kind, branch: BranchFlow, calls: list[Call]) -> Replacement | Unfit:
        """As :meth:`find`, if the block adds the core's result."""
        heavy = [call for call in calls if self.is_heavy(kind, branch, call)]
        if not heavy or not self._covers(kind, branch, calls):
            return Unfit("it is not computed by modules of its own")
        core = heavy[-1]
        later = [i for call in calls if call.opened > core.opened for i in range(call.start, call.stop)]
        # a short convolution after the core goes along with it
        if any(self.tape.is_product(i) and self.tape.operations[i].name != "convolution" for i in later):
            return Unfit(f"{core.path} is not all of it")
        support = self.support(branch, [call for call in calls if call is not core])
        problem = self._by_products(branch, calls, core.output) or self._tail(branch, core, support)
        if problem is not None:
            return problem
        key = self.hidden_key(branch, core)
        return key if isinstance(key, Unfit) else Replacement(Replaced(core, key, zero=True), support)

    def _adding_itself(self, kind: Kind, branch: BranchFlow, calls: list[Call]) -> Replacement | None:
        """As :meth:`find`, if the core adds its branch to the stream itself and does nothing else; else None."""
        joining = self._joining(branch)
        if joining is None:
            return None
        core, key = joining
        around = [call for call in calls if not core.contains(call)]
        if not self._covers(kind, branch, [core] if kind != "mlp" else [core, *around]):
            return None
        if self._by_products(branch, [core, *around], core.output) is not None:
            return None
        support = tuple(each for each in self.support(branch, around) if not core.contains(each.call))
        return Replacement(Replaced(core, key, zero=False), support)

    def _covers(self, kind: Kind, branch: BranchFlow, calls: list[Call]) -> bool:
        """Whether all products (or all attention) of a branch happen inside some calls."""
        return all(any(i in call for call in calls) for i in branch.cone if self._counts(kind, i))

    def is_heavy(self, kind: Kind, branch: BranchFlow, call: Call) -> bool:
        """Whether a call computes products of the branch, or its attention."""
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

    def _tail(self, branch: BranchFlow, core: Call, support: Iterable[Replaced]) -> Unfit | None:
        """The operation between core and stream that does not keep a zero at zero, or None."""
        tainted = {core.output}
        for index in sorted(branch.cone):
            operation = self.tape.operations[index]
            if index < core.stop or tainted.isdisjoint(operation.reads):
                continue
            tainted.update(operation.writes)
            if any(index in each.call for each in support):
                continue
            name = operation.name.removesuffix("_")
            # a bias that the core itself returns goes with it
            silent = {*tainted, *core.outputs, *self._views_of(core.outputs)}
            silent.update(value for value in operation.reads if self._is_zero(value))
            keeps = name in _ZERO_KEEPING and (name != "div" or operation.reads[0] in tainted)
            keeps = keeps or (name == "add" and silent.issuperset(operation.reads))
            if not keeps:
                return Unfit(f"{operation.name} comes between it and the stream")
        return None

    def _is_zero(self, value: int) -> bool:
        """Whether a value is freshly made zeros, as a removed module returns them."""
        while (index := self.tape.producer.get(value)) is not None:
            operation = self.tape.operations[index]
            if operation.name in ("new_zeros", "zeros_like", "zeros"):
                return True
            if operation.name not in _ZERO_KEEPING or not operation.reads:
                return False
            value = operation.reads[0]
        return False

    def _views_of(self, values: Iterable[int | None]) -> set[int]:
        """The values and their views in other shapes."""
        found = set(values)
        for operation in self._block_operations():
            if operation.name in _ZERO_KEEPING and found.issuperset(operation.reads):
                found.update(operation.makes)
        return {value for value in found if value is not None}

    def _by_products(self, branch: BranchFlow, calls: list[Call], result: int | None) -> Unfit | None:
        """A value of its modules that is read elsewhere, or None; their result and shared norms are allowed."""
        others = [other for other in self.flow.branches if other is not branch]
        if any(branch.value in self.tape.operations[i].reads for other in others for i in other.cone):
            return Unfit("another branch reads its output")
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
                    return Unfit("other modules read its intermediate values, too")
        return None

    def support(self, branch: BranchFlow, calls: Iterable[Call]) -> tuple[Replaced, ...]:
        """The calls that can return their input while the branch does not run."""
        found: list[tuple[Call, Key]] = []
        for call in calls:
            keys = [key for key in call.arguments if self.moves(call.arguments[key], branch)]
            once = len(self.tape.calls_of(call.path)) == 1
            if once and len(keys) == 1 and call.container is None and call.output is not None:
                found.append((call, keys[0]))
        if branch.norm is not None and self.tape.calls_of(branch.norm.path)[1:] == []:
            moving = [key for key, value in branch.norm.arguments.items() if value in self.flow.stream]
            found += [(branch.norm, key) for key in moving[:1]]
        return tuple(Replaced(call, key, zero=False) for call, key in found)

    def moving_key(self, branch: BranchFlow, call: Call) -> Key | None:
        """The first argument of a call that is the stream, or computed by the branch."""
        return next((key for key, value in call.arguments.items() if self.moves(value, branch)), None)

    def moves(self, value: int, branch: BranchFlow) -> bool:
        """Whether a value is the stream, or computed by the branch."""
        return value in self.flow.stream or self.tape.producer.get(value) in branch.cone

    def hidden_key(self, branch: BranchFlow, core: Call) -> Key | Unfit:
        """Which argument has the shape of the branch."""
        assert core.output is not None
        shape = tuple(self.tape.tensors[core.output].shape)
        moving = [key for key, value in core.arguments.items() if self.moves(value, branch)]
        same = [key for key in moving if core.shapes[key] == shape]
        if not moving:
            return Unfit(f"{core.path} takes nothing of the stream")
        if not same and len(core.shapes[moving[0]]) < len(shape):
            return Unfit(f"{core.path} takes flattened tokens and returns them by sequence")
        return (same or moving)[0]

    def stand_in(self, sublayer: Sublayer, replaced: Replaced, *, core: bool) -> StandIn:
        """The stand-in for a module."""
        call, key, zero = replaced.call, replaced.key, replaced.zero
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
            captures=self._captures.of(call) if core else (),
            aliases=self._aliases(call),
        )

    def _aliases(self, call: Call) -> tuple[str, ...]:
        """Paths of the other modules that return what a module returns, or a view of it: parents, dropouts."""
        same = self._views_of((call.output,)) if call.output is not None else set()
        others = (other for other in (self.flow.call, *self.calls) if other is not call and not call.contains(other))
        return tuple(dict.fromkeys(other.path for other in others if other.output in same))

    def _block_operations(self) -> list[Operation]:
        return self.tape.operations[self.flow.call.start : self.flow.call.stop]

    def is_spare(self, path: str, dropped: list[BranchFlow]) -> bool:
        """Whether only dropped branches need a module: neither the stream nor a part that is left alone needs it."""
        cones = {operation for branch in dropped for operation in branch.cone}
        results = {branch.value for branch in dropped}
        call = self.tape.calls_of(path)[0]
        made = [value for value in self.tape.made_in(call) if value not in results]
        readers = {reader for value in made for reader in self.tape.consumers[value] if reader not in call}
        return readers <= cones or any(branch.norm is call for branch in dropped)


def outermost(calls: list[Call]) -> list[Call]:
    """The calls that happened inside no other call."""
    return [call for call in calls if not any(other.contains(call) for other in calls)]
