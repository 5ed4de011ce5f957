"""Following the residual stream through small blocks written by hand, whose branches are known."""

import pytest
import torch
from torch import nn

from layershed.discovery.recording import recording
from layershed.discovery.residual_stream import follow_block
from layershed.errors import UnprovenStructureError

WIDTH = 8


class Small(nn.Module):
    """A block with two branches, a norm for each and something to scale by."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.f, self.g = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.other = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.gain = nn.Parameter(torch.full((WIDTH,), 0.3))
        self.number = nn.Parameter(torch.tensor(0.3))
        self.register_buffer("constant", torch.tensor(0.25))
        self.dropout = nn.Dropout()

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.block = Small(function)

    def forward(self, *args, **kwargs):
        return self.block(*args, **kwargs)


def follow(function, *args, **kwargs):
    torch.manual_seed(0)
    model = Model(function).eval()
    given = args or (torch.randn(1, 4, WIDTH),) if not kwargs else args
    with torch.no_grad(), recording(model) as tape:
        model(*given, **kwargs)
    return follow_block(tape, tape.calls_of("block")[0])


def terms(flow):
    """Per branch: which module gave it, its scale and how many branches are in the X that it reads."""
    made = {call.output: call.path.removeprefix("block.") for call in reversed(flow.tape.calls)}
    order = [branch.value for branch in flow.branches]
    return [(made.get(b.value, ""), b.scale, sorted(order.index(v) for v in b.before)) for b in flow.branches]


def sequential(m, x):
    x = x + m.f(m.norm(x))
    return x + m.g(m.other(x))


def parallel(m, x):
    return m.f(m.norm(x)) + m.g(m.norm(x)) + x


def sandwich(m, x):
    return x + m.other(m.f(m.norm(x)))


def post_norm(m, x):
    x = m.norm(x + m.f(x))
    return m.other(m.g(x) + x)


def scaled_stream(m, x):
    return 0.5 * (x + m.f(m.norm(x))) + m.g(x)


def scaled_before(m, x):
    x = 2 * x
    return x + m.f(m.norm(x))


def by_number(m, x):
    return x + 0.1 * m.f(x)


def divided(m, x):
    return x + m.f(x) / 4


def by_alpha(m, x):
    return torch.add(x, m.f(x), alpha=3)


def by_constant(m, x):
    return x + m.constant * m.f(x)


def by_parameter(m, x):
    return x + m.f(x) * m.gain


def by_trainable_number(m, x):
    return x + m.number * m.f(x)


def in_place(m, x):
    y = m.f(m.norm(x))
    y += x
    y += m.g(y)
    return y


def subtracted(m, x):
    return x - m.f(x)


def subtracted_from(m, x):
    return m.f(x) - x


def summed_first(m, x):
    return x + 0.5 * (m.f(x) - 2 * m.g(x))


def reshaped(m, x):
    flat = x.view(-1, WIDTH)
    return (flat + m.f(flat)).view(1, 4, WIDTH).to(torch.float64).to(torch.float32)


def with_dropout(m, x):
    return m.dropout(x) + m.dropout(m.f(x))


def gated(m, x):
    return x + m.f(x).sigmoid() * m.g(x)


FLOWS = {
    sequential: ([("f", 1.0, []), ("g", 1.0, [0])], True),
    parallel: ([("f", 1.0, []), ("g", 1.0, [])], True),
    sandwich: ([("other", 1.0, [])], True),
    post_norm: ([("f", 1.0, []), ("g", 1.0, [0])], False),
    scaled_stream: ([("f", 1.0, []), ("g", 2.0, [])], False),
    scaled_before: ([("f", 1.0, [])], False),
    by_number: ([("f", 0.1, [])], True),
    divided: ([("f", 0.25, [])], True),
    by_alpha: ([("f", 3.0, [])], True),
    by_constant: ([("f", 0.25, [])], True),
    by_parameter: ([("f", None, [])], True),
    by_trainable_number: ([("f", None, [])], True),
    in_place: ([("f", 1.0, []), ("g", 1.0, [0])], True),
    subtracted: ([("f", -1.0, [])], True),
    subtracted_from: ([("f", -1.0, [])], False),
    summed_first: ([("f", 0.5, []), ("g", -1.0, [])], True),
    reshaped: ([("f", 1.0, [])], True),
    with_dropout: ([("f", 1.0, [])], True),
    gated: ([("", 1.0, [])], True),
}


@pytest.mark.parametrize("function", FLOWS, ids=lambda function: function.__name__)
def test_followed_block_lists_branches_with_scales_and_places(function):
    expected, plain = FLOWS[function]
    flow = follow(function)
    found = sorted(terms(flow))
    assert [term[0] for term in found] == [term[0] for term in expected]
    assert [term[1] for term in found] == [scale and pytest.approx(scale) for _, scale, _ in expected]
    assert [term[2] for term in found] == [before for _, _, before in expected]
    assert flow.plain is plain


SUMS = {
    **dict.fromkeys((sequential, parallel, sandwich, by_number, divided, by_alpha, by_constant, subtracted), 1.0),
    **dict.fromkeys((summed_first, reshaped, with_dropout, gated), 1.0),
    scaled_stream: 0.5,
    subtracted_from: -1.0,
}


@pytest.mark.parametrize("function", SUMS, ids=lambda function: function.__name__)
def test_x_and_the_scaled_branches_add_up_to_the_block_output(function):
    flow = follow(function)
    tensors = flow.tape.tensors
    x = tensors[flow.call.arguments[0]]
    total = x + sum(branch.scale * tensors[branch.value].view(x.shape) for branch in flow.branches)
    assert torch.allclose(SUMS[function] * total, tensors[flow.call.output], atol=1e-6)


def test_constant_in_the_sum_of_a_block_is_not_a_branch():
    flow = follow(lambda m, x: x + m.gain + m.f(x))
    assert terms(flow) == [("f", 1.0, [])]


@pytest.mark.parametrize(
    "function", [lambda m, x: x + m.f(x) + m.gain, lambda m, x: x + m.f(x) + 1], ids=["parameter", "number"]
)
def test_block_that_adds_a_constant_is_not_plain(function):
    assert not follow(function).plain


def test_stream_positions_name_the_branches_already_added():
    flow = follow(sequential)
    f, g = flow.branches
    x, output = flow.call.arguments[0], flow.call.output
    assert flow.position(x) == frozenset()
    assert flow.position(f.after) == {f.value} == g.before
    assert flow.position(output) == flow.position(g.after) == {f.value, g.value}
    assert flow.position(f.value) is flow.position(None) is None
    assert g.after == output
    assert flow.tape.operations[f.join].name == "add"
    assert f.after in flow.tape.operations[f.join].writes


@pytest.mark.parametrize(("function", "parts"), [(sequential, ["norm", "f"]), (sandwich, ["norm", "f", "other"])])
def test_cone_of_a_branch_ends_at_the_stream(function, parts):
    flow = follow(function)
    calls = [flow.tape.calls_of(f"block.{name}")[0] for name in parts]
    inside = {index for call in calls for index in range(call.start, call.stop)}
    weights = {i for i in inside if flow.tape.operations[i].name == "t"}  # a weight's own, which X does not reach
    assert flow.branches[0].cone == inside - weights


def test_cone_of_a_branch_ends_at_x_and_not_at_its_producer():
    flow = follow(parallel)
    f, g = flow.branches
    first, second = (flow.tape.calls_of("block.norm")[i] for i in (0, 1))
    assert any(index in first for index in f.cone)
    assert any(index in second for index in g.cone)
    assert f.cone.isdisjoint(g.cone)


def test_norm_shared_by_two_branches_is_in_both_cones():
    def shared(m, x):
        n = m.norm(x)
        return x + m.f(n) + m.g(n)

    f, g = follow(shared).branches
    norm = follow(shared).tape.calls_of("block.norm")[0]
    assert [index in norm for index in sorted(f.cone & g.cone)] == [True]


def test_stream_continues_after_a_post_norm_that_belongs_to_its_branch():
    flow = follow(post_norm)
    f, g = flow.branches
    assert [branch.norm.path for branch in (f, g)] == ["block.norm", "block.other"]
    assert (f.after, g.after) == (f.norm.output, g.norm.output)
    assert flow.position(f.after) == {f.value} == g.before
    assert flow.call.output == g.after


def test_final_norm_after_two_branches_belongs_to_neither():
    flow = follow(lambda m, x: m.norm(x + m.f(x) + m.g(x)))
    assert [branch.norm for branch in flow.branches] == [None, None]
    assert not flow.plain


def test_x_is_the_first_argument_with_the_shape_of_the_output():
    x, mask = torch.randn(1, 4, WIDTH), torch.ones(4, 4)
    flow = follow(lambda m, mask, *, hidden: (hidden + m.f(hidden), mask), mask, hidden=x)
    assert flow.source == "hidden"
    assert terms(flow) == [("f", 1.0, [])]


def test_block_that_returns_a_tuple_is_followed_by_its_first_element():
    flow = follow(lambda m, x: (x + m.f(x), m.g(x)))
    assert terms(flow) == [("f", 1.0, [])]


def into_a_view(m, x):
    """A sum, in truth, yet one that would have to be seen through the memory that two tensors share."""
    y = x.clone()
    y.view(-1, WIDTH).add_(m.f(x).view(-1, WIDTH))
    return y


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: m.f(x), "its output is no sum of its input and branches"),
        (lambda m, x: torch.lerp(x, m.f(x), 0.5), "its output is no sum of its input and branches"),
        (lambda m, x: (x + m.f(x)).tanh(), "its output is no sum of its input and branches"),
        (lambda m, x: torch.cat([x[..., :4], m.f(x)[..., 4:]], -1), "its output is no sum of its input and branches"),
        (into_a_view, "its output is no sum of its input and branches"),
        (lambda m, x: x * m.f(x), "its output is no sum of its input and branches"),
        (lambda m, x: m.f(torch.ones_like(x)), "its output does not depend on its input"),
        (lambda m, x: x + m.f(x) + x, "it adds its stream to itself"),
        (lambda m, x: (y := x + m.f(x)) + m.g(x * y), "a branch reads the stream at more than one place"),
    ],
    ids=["branch alone", "lerp", "tanh", "cat", "view", "product", "constant", "doubled", "two places"],
)
def test_block_whose_output_is_no_sum_is_refused_by_its_name(function, reason):
    with pytest.raises(UnprovenStructureError) as caught:
        follow(function)
    assert str(caught.value).startswith(f"block: Y = X + f(norm(X)) does not hold ({reason})")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: None, "block returns no tensor."),
        (lambda m, x: {"x": x}, "block returns no tensor."),
        (lambda m, x: x[:, :2], "block: no argument has the shape of its output, (1, 2, 8)."),
    ],
    ids=["None", "dict", "slice"],
)
def test_block_without_a_stream_is_refused(function, message):
    with pytest.raises(UnprovenStructureError) as caught:
        follow(function)
    assert str(caught.value) == message
