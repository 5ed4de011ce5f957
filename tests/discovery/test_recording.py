"""The recording of a forward pass against the known inputs and outputs of each operation."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from layershed.discovery.recording import Value, recording


class Run(nn.Module):
    """A module that runs a function of its input."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def record(function, *args, **modules):
    model = Run(function, **modules)
    with torch.no_grad(), recording(model) as tape:
        output = model(*args)
    return tape, output


def names(tape):
    return [operation.name for operation in tape.operations]


def test_recording_lists_the_tensors_that_each_operation_reads_and_makes():
    x, y = torch.ones(2, 3), torch.full((2, 3), 2.0)
    tape, output = record(lambda _, x, y: (x * y + x).exp(), x, y)
    assert names(tape) == ["mul", "add", "exp"]
    a, b = (tape.number(tensor) for tensor in (x, y))
    product, total, power = (operation.makes[0] for operation in tape.operations)
    assert [operation.reads for operation in tape.operations] == [(a, b), (product, a), (total,)]
    assert power == tape.number(output)
    assert torch.equal(tape.tensors[product], x * y)
    assert tape.producer == {product: 0, total: 1, power: 2}
    assert dict(tape.consumers) == {a: [0, 1], b: [0], product: [1], total: [2]}


def test_recorded_arguments_hold_value_numbers_for_tensors_and_keep_other_arguments():
    x = torch.ones(2)
    tape, _ = record(lambda _, x: torch.add(x, x, alpha=3), x)
    number = Value(tape.number(x))
    assert tape.operations[0].arguments == ((number, number), {"alpha": 3})
    assert tape.consumers[number.number] == [0]  # once, although it was read twice


def test_recording_follows_split_and_concatenation():
    x = torch.arange(6.0)
    tape, output = record(lambda _, x: torch.cat(x.split(2)), x)
    split, cat = tape.operations
    assert len(split.makes) == 3
    assert cat.reads == split.makes
    assert torch.equal(output, x)


def test_recorded_in_place_operation_gives_its_tensor_a_new_value():
    x = torch.ones(2)
    tape, output = record(lambda _, x: (x + 1).mul_(2), x)
    before, after = tape.operations[0].makes[0], tape.number(output)
    assert after != before
    assert tape.operations[1].renews == {before: after}
    assert tape.operations[1].writes == (after,)
    assert tape.operations[1].makes == ()
    assert (tape.producer[before], tape.producer[after]) == (0, 1)
    assert tape.tensors[before] is tape.tensors[after] is output


@pytest.mark.parametrize("written", ["base", "view", "view of the view"])
def test_recorded_write_gives_new_values_to_all_tensors_that_share_its_memory(written):
    base, apart = torch.zeros(2, 3), torch.zeros(2, 3)

    def function(_, base, apart):
        view = base.view(3, 2)
        views = {"base": base, "view": view, "view of the view": view.t(), "other": base[1]}
        before = {name: held[0].number(tensor) for name, tensor in views.items()}
        views[written].add_(1)
        after = {name: held[0].number(tensor) for name, tensor in views.items()}
        return before, after, apart + 1, written

    model, held = Run(function), []
    with torch.no_grad(), recording(model) as tape:
        held.append(tape)
        before, after, output, _ = model(base, apart)
    assert output.eq(1).all()
    write = next(operation for operation in tape.operations if operation.renews)
    assert write.renews == {before[name]: after[name] for name in before}
    assert write.writes[0] == after[written]
    assert len({*before.values(), *after.values()}) == 8
    assert tape.calls[0].arguments[1] == tape.number(apart) == tape.operations[-1].reads[0]


def test_recorded_write_to_a_slice_produces_the_whole_tensor_that_is_read_next():
    def function(_, x):
        out = torch.zeros(2, 2)
        out[0] = x
        return out * 1

    x = torch.ones(2)
    tape, output = record(function, x)
    copy = next(i for i, operation in enumerate(tape.operations) if operation.name == "copy_")
    assert tape.number(x) in tape.operations[copy].reads
    last = tape.operations[-1]
    assert last.name == "mul"
    assert tape.producer[last.reads[0]] == copy
    assert output.tolist() == [[1, 1], [0, 0]]


def test_recorded_out_argument_counts_as_written():
    x, out = torch.ones(2), torch.empty(2)
    tape, _ = record(lambda _, x, out: torch.mul(x, 3, out=out) + 0, x, out)
    assert tape.operations[1].reads == (next(iter(tape.operations[0].renews.values())),)


def test_recorded_module_calls_nest_and_hold_their_arguments_and_operations():
    inner = Run(lambda _, a, *, scale: a * scale)
    tape, output = record(
        lambda module, x, y: module.inner(x, scale=y) + 1, torch.ones(2, 3), torch.full((3,), 2.0), inner=inner
    )
    outer, call = tape.calls
    assert (outer.path, call.path) == ("", "inner")
    assert call.shapes == {0: (2, 3), "scale": (3,)}
    assert call.arguments == {0: outer.arguments[0], "scale": outer.arguments[1]}
    assert (call.start, call.stop, outer.start, outer.stop) == (0, 1, 0, 2)
    assert [index in call for index in (0, 1)] == [True, False]
    assert outer.contains(call)
    assert not call.contains(outer)
    assert not call.contains(call)
    assert list(tape.within(outer)) == [call]
    assert list(tape.made_in(call)) == [call.output]
    assert outer.output == tape.number(output)
    assert tape.calls_of("inner") == [call]


def test_recorded_call_leaves_out_arguments_that_are_not_tensors():
    tape, _ = record(
        lambda module, x: module.inner(None, x, 3, flag=True), torch.ones(1), inner=Run(lambda _, *a, **k: a[1])
    )
    assert tape.calls_of("inner")[0].shapes == {1: (1,)}


@pytest.mark.parametrize(
    ("returned", "container", "places"),
    [
        (lambda x: x, None, [True]),
        (lambda x: (x, None, x), tuple, [True, False, True]),
        (lambda x: [x], list, [True]),
        (lambda x: None, None, [False]),
        (lambda x: {"x": x}, None, [False]),
        (lambda x: (), tuple, []),
    ],
    ids=["tensor", "tuple", "list", "None", "dict", "empty tuple"],
)
def test_recorded_call_keeps_output_positions_and_container(returned, container, places):
    x = torch.ones(1)
    tape, _ = record(lambda _, x: returned(x), x)
    (call,) = tape.calls
    assert call.container is container
    assert call.outputs == tuple(tape.number(x) if place else None for place in places)
    assert call.output == (call.outputs[0] if places else None)


def test_recorded_call_without_operations_still_lies_inside_its_caller():
    tape, _ = record(lambda m, x: m.one(m.two(x)), torch.ones(1), one=nn.Identity(), two=nn.Dropout().eval())
    outer, two, one = tape.calls
    assert (one.path, two.path) == ("one", "two")
    assert one.start == one.stop == two.stop == 0
    assert one.arguments[0] == one.output == two.output == outer.output
    assert list(tape.within(outer)) == [two, one]
    assert not two.contains(one)
    assert not one.contains(two)


def test_module_that_runs_twice_has_two_recorded_calls_in_order():
    tape, _ = record(lambda m, x: m.inner(m.inner(x)), torch.ones(1, 2), inner=nn.Linear(2, 2))
    first, second = tape.calls_of("inner")
    assert first.output == second.arguments[0]
    assert first.stop <= second.start
    assert (first.opened, first.closed) < (second.opened, second.closed)


def test_recorded_call_includes_the_forward_hooks_of_its_module():
    model = Run(lambda module, x: module.inner(x), inner=nn.Linear(2, 2))
    model.inner.register_forward_hook(lambda _module, _args, output: output * 2)
    model.inner.register_forward_pre_hook(lambda _module, args: (args[0] + 1,))
    x = torch.ones(1, 2)
    with torch.no_grad(), recording(model) as tape:
        output = model(x)
    (call,) = tape.calls_of("inner")
    assert call.output == tape.number(output)
    assert names(tape) == ["add", "t", "addmm", "mul"]
    assert (call.start, call.stop) == (0, 4)
    assert call.arguments == tape.calls_of("")[0].arguments


@pytest.mark.parametrize("fails", [False, True])
def test_recording_removes_its_hooks_and_records_nothing_after_it_ends(fails):
    def function(module, x):
        if fails:
            raise KeyError
        return module.inner(x)

    model = Run(function, inner=nn.Linear(2, 2))
    hooks = {
        name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in model.named_modules()
    }
    x = torch.ones(1, 2)
    try:
        with recording(model) as tape:
            model(x)
    except KeyError:
        assert fails
    recorded = (len(tape.operations), len(tape.calls))
    assert recorded == ((0, 1) if fails else (2, 2))
    model.function = lambda module, x: module.inner(x)
    model(x)
    assert (len(tape.operations), len(tape.calls)) == recorded
    assert hooks == {
        name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in model.named_modules()
    }


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x @ x, True),
        (lambda x: nn.functional.linear(x, x, x[0]), True),
        (lambda x: nn.functional.conv1d(x[None], x[None]), True),
        (lambda x: x @ x[0], True),
        (lambda x: torch.baddbmm(x[None], x[None], x[None]), True),
        (lambda x: x * x, False),
        (lambda x: x.softmax(-1), False),
    ],
    ids=["mm", "linear", "conv1d", "mv", "baddbmm", "mul", "softmax"],
)
def test_recording_distinguishes_matrix_products_from_other_operations(function, expected):
    tape, _ = record(lambda _, x: function(x), torch.ones(3, 3))
    assert any(tape.is_product(index) for index in range(len(tape.operations))) is expected


def test_recording_of_fake_tensors_equals_that_of_real_ones():
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.LayerNorm(4))

    def content(tape):
        return [(op.name, op.reads, op.makes, dict(op.renews)) for op in tape.operations], [
            (call.path, call.start, call.stop, call.arguments, call.outputs) for call in tape.calls
        ]

    model, x = build(), torch.ones(2, 4)
    with torch.no_grad(), recording(model) as real:
        model(x)
    with FakeTensorMode():
        model, x = build(), torch.ones(2, 4)
        with torch.no_grad(), recording(model) as fake:
            output = model(x)
    assert isinstance(output, FakeTensor)
    assert content(fake) == content(real)
