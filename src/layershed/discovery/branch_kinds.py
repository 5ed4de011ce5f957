"""The kind of a branch: attention, cross-attention, MLP, or another one, which is left alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from layershed.discovery.recompute import replay
from layershed.discovery.recording import Key, Tape
from layershed.discovery.residual_stream import BlockFlow, BranchFlow
from layershed.planning.plan import Kind

_MIDDLE = 3  # tokens of which one has a neighbour on either side
_MIXING = {"convolution", "roll", "flip", "constant_pad_nd", "_fft_r2c"}
_LOOKUPS = {"index", "index_select", "gather", "embedding"}
_VIEWS = {"view", "_unsafe_view", "expand", "transpose", "permute", "t", "clone", "unsqueeze", "squeeze", "_to_copy"}
_CROSS = {"encoder_hidden_states", "cross_attention_states", "key_value_states"}


class Make(NamedTuple):
    """Describes a branch. Branches of equal make are tried only once.

    Args:
        operations: Their operations with all arguments but the tensors.
        is_zero: Whether they gave only zeros, which show nothing about tokens.
    """

    operations: tuple[tuple[Any, str], ...]
    is_zero: bool


def kind_of(
    flow: BlockFlow, branch: BranchFlow, names: Mapping[Key, str], tokenwise: dict[Make, bool]
) -> tuple[Kind | None, str]:
    """The kind of a branch; or None and the reason why it cannot be dropped, as the end of a sentence.

    Attention weighs tokens by a softmax; an MLP has matrix products and treats every token by itself.

    Args:
        flow: The block's data flow.
        branch: The branch.
        names: The names of the block's arguments; they identify the output of an encoder.
        tokenwise: By make, whether its branches treat every token by itself; read and extended.
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
    operations = [flow.tape.operations[i] for i in sorted(branch.cone)]
    tensor = flow.tape.tensors[branch.value]
    make = Make(tuple((done.function, str(done.constants)) for done in operations), is_zero(tensor))
    if make not in tokenwise:
        tokenwise[make] = _is_tokenwise(flow, branch)
    return ("mlp", "") if tokenwise[make] else (None, "it mixes tokens without attention")


def is_attention(tape: Tape, operation: int) -> bool:
    """Whether an operation weighs tokens by a softmax: a fused attention, or a softmax over products of activations.

    A router of experts has a softmax over a product with its weights, so it is no attention.
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
            return not any(_is_weight(tape, factor) for factor in tape.operations[index].reads[-2:])
        if not tape.is_product(index):
            todo.extend(tape.operations[index].reads)
    return False


def _is_weight(tape: Tape, value: int) -> bool:
    """Whether a value is a parameter or a view of one."""
    while (index := tape.producer.get(value)) is not None:
        if tape.operations[index].name not in _VIEWS:
            return False
        value = tape.operations[index].reads[0]
    return True


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
    """Whether a branch treats every token by itself.

    The branch is computed again from two other X:

    - The first and the last token are swapped. Its output must be swapped, too. Every expert keeps its token count.
    - The first and the last token are altered. Its output for the tokens between them must stay.

    Fake tensors have no numbers. For them, no operation may be known to mix tokens. The test is repeated once the model
    holds weights.
    """
    tape = flow.tape
    if is_symbolic(tape.tensors[branch.value]):
        return not any(_may_mix(flow, branch, operation) for operation in branch.cone)
    stream = {value: tape.tensors[value] for value in flow.stream}
    try:
        before = _by_token(replay(tape, branch.value, stream))
        swapped = _by_token(replay(tape, branch.value, {value: _swapped(tensor) for value, tensor in stream.items()}))
    except Exception:  # unknown counts as no
        return False
    size = before.abs().max().item()
    if size == 0:  # a branch that starts at zero
        return not any(_may_mix(flow, branch, operation) for operation in branch.cone)
    # rounding of a token may depend on the other tokens of its expert
    tolerance = max(2 * torch.finfo(before.dtype).eps, 1e-5) * size
    if before.shape[0] < _MIDDLE or not _near(_swapped(swapped[None])[0], before, tolerance):
        return False
    # small changes, too: a large one may send a token to other experts, for which recorded sizes do not fit
    for share in (1.0, 0.3, 0.1, 0.01, 0.001):
        altered = {value: _with_other_ends(tensor, share) for value, tensor in stream.items()}
        try:
            after = _by_token(replay(tape, branch.value, altered))
        except Exception:
            continue
        telling = share == 1 or not _near(after, before, 10 * tolerance)
        if telling and _near(after[1:-1], before[1:-1], tolerance):
            return True
    return False


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and (a.double() - b.double()).abs().max().item() <= tolerance


def _swapped(tensor: Tensor) -> Tensor:
    """A copy with the first and the last token swapped."""
    swapped = tensor.clone(memory_format=torch.contiguous_format)
    tokens, own = _by_token(swapped), _by_token(tensor)
    tokens[0], tokens[-1] = own[-1], own[0]
    return swapped


def _may_mix(flow: BlockFlow, branch: BranchFlow, operation: int) -> bool:
    """Whether an operation could mix tokens, such as a convolution or a product of two activations."""
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


def is_symbolic(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no numbers."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def is_zero(tensor: Tensor) -> bool:
    """Whether a tensor has numbers, and all of them are zero."""
    return not is_symbolic(tensor) and not bool(tensor.any())


def _by_token(tensor: Tensor) -> Tensor:
    """The tokens of the one sequence, of shape (1, tokens, ...), (tokens, 1, ...) or flattened."""
    return tensor[0] if tensor.ndim > 2 and tensor.shape[0] == 1 else tensor


def _with_other_ends(tensor: Tensor, share: float) -> Tensor:
    altered = tensor.clone(memory_format=torch.contiguous_format)
    for end in (0, -1):
        token = _by_token(altered)[end]
        token += share * token.roll(1, -1)  # another direction: norms and gates may undo a sign or a size
    return altered
