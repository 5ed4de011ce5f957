"""The kinds of small branches written by hand; replaying them against running them again."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from layershed.discovery.branch_kinds import is_attention, is_symbolic, kind_of
from layershed.discovery.recompute import replay
from layershed.discovery.recording import recording
from layershed.discovery.residual_stream import follow_block

WIDTH, TOKENS = 8, 4


class Branch(nn.Module):
    """A function of the stream, with weights to use in it."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.along = nn.Linear(TOKENS, TOKENS)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.depthwise = nn.Conv1d(WIDTH, WIDTH, 1)
        self.table = nn.Parameter(torch.randn(WIDTH, 3))
        self.register_buffer("seen", torch.zeros(TOKENS, WIDTH))

    def forward(self, x, *args, **kwargs):
        return self.function(self, x, *args, **kwargs)


class Block(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.branch = Branch(function)

    def forward(self, x, *args, **kwargs):
        return x + self.branch(x, *args, **kwargs).view(x.shape)


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.block = Block(function)

    def forward(self, x, *args, **kwargs):
        return self.block(x, *args, **kwargs)


def flow_of(function, shape=(1, TOKENS, WIDTH), *args, **kwargs):
    torch.manual_seed(0)
    model, x = Model(function).eval(), torch.randn(shape)
    with torch.no_grad(), recording(model) as tape:
        model(x, *args, **kwargs)
    return follow_block(tape, tape.calls_of("block")[0]), model, x


def kind_in(flow, **names):
    """The kind of the only branch; ``names``: of the block's arguments, where those were given by position."""
    (branch,) = flow.branches
    return kind_of(flow, branch, {key: names.get(f"_{key}", str(key)) for key in flow.call.arguments}, {})


def kind(function, *args, **kwargs):
    return kind_in(flow_of(function, *args, **kwargs)[0])


def heads(tensor):
    return tensor.unflatten(-1, (2, -1)).transpose(1, 2)


def fused(m, x):
    y = scaled_dot_product_attention(heads(m.q(x)), heads(m.k(x)), heads(m.v(x)), is_causal=True)
    return m.o(y.transpose(1, 2).flatten(-2))


def eager_of_four_dimensions(m, x):
    scores = heads(m.q(x)) @ heads(m.k(x)).transpose(-1, -2) / math.sqrt(WIDTH / 2)
    scores = scores + torch.full((TOKENS, TOKENS), -1e9).triu(1)
    return m.o((scores.softmax(-1) @ heads(m.v(x))).transpose(1, 2).flatten(-2))


def eager_of_three_dimensions(m, x):
    weights = torch.bmm(m.q(x), m.k(x).transpose(1, 2)).float().softmax(-1)
    return m.o(torch.bmm(weights.to(x.dtype), m.v(x)))


def with_a_bias_added_by_baddbmm(m, x):
    bias = torch.zeros(1, TOKENS, TOKENS)
    return m.o(torch.baddbmm(bias, m.q(x), m.k(x).transpose(1, 2)).softmax(-1) @ m.v(x))


ATTENTION = [fused, eager_of_four_dimensions, eager_of_three_dimensions, with_a_bias_added_by_baddbmm]


@pytest.mark.parametrize("function", ATTENTION)
def test_branch_that_weighs_tokens_by_a_softmax_is_attention(function):
    assert kind(function) == ("attention", "")


def perceptron(m, x):
    return m.o(m.q(x).relu() * m.k(x))


def softly_routed(m, x):
    weights = m.router(x).softmax(-1)
    return sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(m.experts))


def sparsely_routed(m, x):
    """How many tokens an expert sees depends on the data."""
    flat = x.reshape(-1, WIDTH)
    weights, chosen = m.router(flat).softmax(-1).topk(2, dim=-1)
    out = torch.zeros_like(flat)
    for i, expert in enumerate(m.experts):
        token, place = torch.where(chosen == i)
        out.index_add_(0, token, expert(flat[token]) * weights[token, place, None])
    return out.view(x.shape)


def pointwise_convolution(m, x):
    return m.depthwise(x.transpose(1, 2)).transpose(1, 2)


def written_in_place(m, x):
    out = torch.empty_like(x)
    for i in range(TOKENS):
        out[:, i] = m.q(x[:, i])
    return out


TOKENWISE = [perceptron, softly_routed, sparsely_routed, pointwise_convolution, written_in_place]


@pytest.mark.parametrize("function", TOKENWISE)
def test_branch_that_treats_every_token_by_itself_is_an_mlp(function):
    assert kind(function) == ("mlp", "")


@pytest.mark.parametrize("shape", [(1, TOKENS, WIDTH), (TOKENS, 1, WIDTH), (TOKENS, WIDTH)])
def test_branch_kind_is_found_with_tokens_first_or_without_a_batch_dimension(shape):
    assert kind(perceptron, shape) == ("mlp", "")
    axis = shape.index(TOKENS)
    assert kind(lambda m, x: m.q(x + x.roll(1, axis)), shape)[0] is None


def test_router_softmax_is_not_taken_for_attention():
    for function in (softly_routed, sparsely_routed):
        flow, _, _ = flow_of(function)
        softmax = [i for i, operation in enumerate(flow.tape.operations) if "softmax" in operation.name]
        assert len(softmax) == 1
        assert not any(is_attention(flow.tape, index) for index in range(len(flow.tape.operations)))


def test_router_after_a_product_of_activations_is_not_taken_for_attention():
    assert kind(lambda m, x: softly_routed(m, torch.bmm(x, m.q.weight[None]))) == ("mlp", "")


def convolution(m, x):
    return m.conv(x.transpose(1, 2)).transpose(1, 2)


def running_sum(m, x):
    return m.q(x).cumsum(1)


def shifted(m, x):
    return m.q(x.roll(1, 1))


def padded(m, x):
    return m.q(nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


def mean(m, x):
    return m.q(x) + m.k(x).mean(1, keepdim=True)


def across(m, x):
    """As in an MLP-Mixer."""
    return m.along(x.transpose(1, 2)).transpose(1, 2)


def linear_attention(m, x):
    return m.q(x) @ (m.k(x).transpose(1, 2) @ m.v(x))


def recurrent(m, x):
    """A gated linear recurrence that writes its outputs into slices."""
    gate, new = m.q(x).sigmoid(), m.v(x)
    state, out = torch.zeros_like(new[:, 0]), torch.zeros_like(new)
    for i in range(TOKENS):
        state = gate[:, i] * state + new[:, i]
        out[:, i] = state
    return m.o(out)


def recurrent_with_a_state_in_place(m, x):
    new = m.v(x)
    state = torch.zeros_like(new[:, 0])
    for i in range(TOKENS):
        state.mul_(0.5).add_(new[:, i])
        new[:, i] = state
    return new


MIXING = [convolution, running_sum, shifted, padded, mean, across, linear_attention]
MIXING += [recurrent, recurrent_with_a_state_in_place]


@pytest.mark.parametrize("function", MIXING)
def test_branch_that_mixes_tokens_without_attention_has_no_kind(function):
    assert kind(function) == (None, "it mixes tokens without attention")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_token_mixing_is_recognized_in_any_precision(dtype):
    for function, expected in ((perceptron, "mlp"), (recurrent, None), (mean, None)):
        torch.manual_seed(0)
        model, x = Model(function).to(dtype), torch.randn(1, TOKENS, WIDTH, dtype=dtype)
        with torch.no_grad(), recording(model) as tape:
            model(x)
        flow = follow_block(tape, tape.calls_of("block")[0])
        assert kind_in(flow)[0] == expected


def test_branch_without_a_linear_map_has_no_kind():
    assert kind(lambda m, x: x.tanh()) == (None, "it has no linear map")


@pytest.mark.parametrize("name", ["encoder_hidden_states", "cross_attention_states", "key_value_states"])
def test_attention_to_encoder_states_is_cross_attention(name):
    def cross(m, x, *args, **kwargs):
        memory = args[0] if args else kwargs[name]
        return m.o(scaled_dot_product_attention(m.q(x)[:, None], m.k(memory)[:, None], m.v(memory)[:, None])[:, 0])

    memory = torch.randn(1, 7, WIDTH)
    assert kind(cross, **{name: memory}) == ("cross_attention", "")
    by_position = flow_of(cross, (1, TOKENS, WIDTH), memory)[0]
    assert kind_in(by_position, _1=name) == ("cross_attention", "")
    assert kind_in(by_position, _1="attention_mask") == ("attention", "")
    assert kind(lambda m, x, **_: fused(m, x), **{name: memory}) == ("attention", "")  # given and not read


def test_branch_that_reads_more_than_the_stream_is_not_an_mlp():
    beside = torch.randn(1, TOKENS, 5)
    function = lambda m, x, other: m.q(x) * other.sum(-1, keepdim=True)  # noqa: E731
    assert kind(function, (1, TOKENS, WIDTH), beside) == (None, "it reads more than the stream")
    assert kind(lambda m, x, other: m.q(x), (1, TOKENS, WIDTH), beside) == ("mlp", "")


@pytest.mark.parametrize(
    "function", [*ATTENTION, *(f for f in TOKENWISE if f is not sparsely_routed), *MIXING], ids=lambda f: f.__name__
)
def test_replaying_a_branch_equals_running_it_on_the_other_stream(function):
    flow, model, x = flow_of(function)
    (branch,) = flow.branches
    for seed in (1, 2):
        other = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            expected = model.block.branch(other)
        assert torch.allclose(replay(flow.tape, branch.value, {flow.call.arguments[0]: other}), expected, atol=1e-6)
        assert not torch.allclose(flow.tape.tensors[branch.value], expected, atol=1e-2)


def through_a_buffer(m, x):
    m.seen.copy_(x[0])
    return m.q(m.seen)[None]


def test_replaying_a_branch_changes_no_recorded_tensor():
    for function in (through_a_buffer, recurrent, recurrent_with_a_state_in_place, written_in_place, sparsely_routed):
        flow, _, x = flow_of(function)
        before = [tensor.clone() for tensor in flow.tape.tensors]
        replay(flow.tape, flow.branches[0].value, {flow.call.arguments[0]: x * 1.001})
        for tensor, was in zip(flow.tape.tensors, before, strict=True):
            assert torch.equal(tensor, was)


@pytest.mark.parametrize(
    ("function", "expected"),
    [(fused, "attention"), (eager_of_four_dimensions, "attention"), (perceptron, "mlp"), (softly_routed, "mlp")]
    + [(function, None) for function in (convolution, linear_attention, shifted, padded)],
)
def test_branch_kind_on_fake_tensors_follows_from_known_operations(function, expected):
    with FakeTensorMode():
        flow, _, x = flow_of(function)
        assert is_symbolic(x)
        assert kind_in(flow)[0] == expected


def test_meta_tensors_are_symbolic_and_real_ones_are_not():
    assert is_symbolic(torch.ones(1, device="meta"))
    assert not is_symbolic(torch.ones(1))


def test_branch_that_reads_the_next_token_has_no_kind():
    assert kind(lambda m, x: m.q(x + torch.cat([x[:, 1:], 0 * x[:, :1]], 1)))[0] is None


def test_router_written_as_an_einsum_is_not_taken_for_attention():
    def routed(m, x):
        weights = torch.einsum("btd,de->bte", x, m.table).softmax(-1)
        return sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(m.experts))

    assert kind(routed)[0] == "mlp"


def test_flattened_branch_output_does_not_crash_the_kind():
    assert kind(lambda m, x: m.q(x).flatten(1))[0] in ("mlp", None)
