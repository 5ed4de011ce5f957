"""What a branch is: attention, cross-attention, MLP, or something else that is left alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_map

from layershed.dataflow import BlockFlow, BranchFlow
from layershed.plan import Kind
from layershed.tape import Key, Operation, Tape, Value

_MIXING = {"convolution", "roll", "flip", "constant_pad_nd", "_fft_r2c"}
_LOOKUPS = {"index", "index_select", "gather", "embedding"}
_VIEWS = {"view", "_unsafe_view", "expand", "transpose", "permute", "t", "clone", "unsqueeze", "squeeze", "_to_copy"}
_CROSS = {"encoder_hidden_states", "cross_attention_states", "key_value_states"}


def kind_of(flow: BlockFlow, branch: BranchFlow, names: Mapping[Key, str]) -> tuple[Kind | None, str]:
    """The kind of a branch, or None and the reason why it is nothing to drop, as the end of a sentence.

    Attention weighs tokens by a softmax; an MLP has matrix products and treats every token by itself.

    Args:
        flow: The block's data flow.
        branch: The branch.
        names: The names of the block's arguments, by which an encoder's output is known.
    """
    extra = _extra_arguments(flow, branch)
    if any(is_attention(flow.tape, operation) for operation in branch.cone):
        return "cross_attention" if any(names[key] in _CROSS for key in extra) else "attention", ""
    if not any(flow.tape.is_product(operation) for operation in branch.cone):
        return None, "it has no linear map"
    stream = flow.call.shapes[flow.source]
    beside = [key for key in extra if flow.call.shapes[key][:-1] == stream[:-1]]
    if beside:
        return None, "it reads more than the stream"
    return ("mlp", "") if _is_tokenwise(flow, branch) else (None, "it mixes tokens without attention")


def is_attention(tape: Tape, operation: int) -> bool:
    """Whether an operation weighs tokens by a softmax: a fused attention, or a softmax over products of activations.

    The router of experts has a softmax, too, yet over a product with its weights.
    """
    done = tape.operations[operation]
    if "attention" in done.name or "attn" in done.name:
        return True
    if "softmax" not in done.name:
        return False
    todo, seen = [done.reads[0]], set[int]()
    while todo:
        value = todo.pop()
        index = tape.producer.get(value)
        if value in seen or index is None:
            continue
        seen.add(value)
        if tape.operations[index].name in ("bmm", "baddbmm"):
            return True
        if not tape.is_product(index):
            todo.extend(tape.operations[index].reads)
    return False


def _extra_arguments(flow: BlockFlow, branch: BranchFlow) -> set[Key]:
    """Keys of the tensors given to the block, other than the stream, that a branch depends on."""
    tape = flow.tape
    given = {value: key for key, value in flow.call.arguments.items() if key != flow.source}
    found: set[Key] = set()
    seen: set[int] = set()
    todo = [value for operation in branch.cone for value in tape.operations[operation].reads]
    while todo:
        value = todo.pop()
        if value in seen or value in flow.stream:
            continue
        seen.add(value)
        if value in given:
            found.add(given[value])
        producer = tape.producer.get(value)
        if producer is not None and producer in flow.call:
            todo.extend(tape.operations[producer].reads)
    return found


def _is_tokenwise(flow: BlockFlow, branch: BranchFlow) -> bool:
    """Whether a branch treats every token by itself: another first token leaves the others as they are.

    The branch is computed again from an altered X. On fake tensors it is enough that none of its operations is known
    to mix tokens; whoever built the skeleton asks again once it holds weights.
    """
    tape = flow.tape
    if is_symbolic(tape.tensors[branch.value]):
        return not any(_may_mix(flow, branch, operation) for operation in branch.cone)
    stream = {value: tape.tensors[value] for value in flow.stream}
    # the small change, too: where the large one sends a token to other experts, recorded sizes do not fit any more
    for share in (1.0, 0.01):
        altered = {value: _with_another_first_token(tensor, share) for value, tensor in stream.items()}
        try:
            before, after = (_by_token(replay(tape, branch, x))[1:].double() for x in (stream, altered))
        except Exception:  # whatever it raises: it cannot be told
            continue
        tolerance = max(8 * torch.finfo(tape.tensors[branch.value].dtype).eps, 1e-5) * before.abs().max().item()
        return before.shape == after.shape and (before - after).abs().max().item() <= tolerance
    return False


def _may_mix(flow: BlockFlow, branch: BranchFlow, operation: int) -> bool:
    """Whether an operation could mix tokens: a convolution, say, or a product of two activations."""
    done = flow.tape.operations[operation]
    factors = [value for value in done.reads[-3:] if _is_activation(flow, branch, value)]
    return done.name in _MIXING or (done.name in ("bmm", "baddbmm") and len(factors) > 1)


def _is_activation(flow: BlockFlow, branch: BranchFlow, value: int) -> bool:
    """Whether a value is computed from the stream; weights that a token looks up, such as its expert's, are not."""
    while (index := flow.tape.producer.get(value)) in branch.cone:
        assert index is not None
        done = flow.tape.operations[index]
        if done.name in _LOOKUPS:
            return done.reads[0] in flow.stream or flow.tape.producer.get(done.reads[0]) in branch.cone
        if done.name not in _VIEWS:
            return True
        value = done.reads[0]
    return value in flow.stream


def replay(tape: Tape, branch: BranchFlow, values: dict[int, Tensor]) -> Tensor:
    """Compute a branch again, from other values of the stream.

    Args:
        tape: The recording.
        branch: The branch.
        values: What to take in the place of recorded values.

    Returns:
        The new b.
    """
    overwritten = {value for operation in tape.operations for value in operation.renews}
    needed = set(branch.cone)
    # what was written over since must be made anew
    todo = [value for index in needed for value in tape.operations[index].reads]
    while todo:
        value = todo.pop()
        index = tape.producer.get(value)
        if value in overwritten and value not in values and index is not None and index not in needed:
            needed.add(index)
            todo.extend(tape.operations[index].reads)
    made = dict(values)
    with torch.no_grad():
        for index in sorted(needed):
            _run(tape, tape.operations[index], made)
    return made[branch.value]


def is_symbolic(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no numbers."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _run(tape: Tape, operation: Operation, made: dict[int, Tensor]) -> None:
    """Run one operation again; what it writes over is written over here, too, views included."""
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


def _by_token(tensor: Tensor) -> Tensor:
    """The tokens of the one sequence, of shape (1, tokens, ...), (tokens, 1, ...) or flattened."""
    return tensor[0] if tensor.ndim > 2 and tensor.shape[0] == 1 else tensor


def _with_another_first_token(tensor: Tensor, share: float) -> Tensor:
    altered = tensor.clone(memory_format=torch.contiguous_format)
    first = _by_token(altered)[0]
    first += share * first.roll(1, -1)  # another direction: norms and gates may undo a sign or a size
    return altered
