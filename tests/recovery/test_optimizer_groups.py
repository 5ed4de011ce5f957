"""What optimizers hold after a switch, and their learning rates, against plain optimizers."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR

from layershed.discovery.find import find_sublayers
from layershed.errors import CheckpointError
from layershed.quantization import quantize
from layershed.recovery.lora import inject_lora
from layershed.recovery.optimizer_groups import (
    LearningRateFactor,
    forget_quantized,
    hand_over,
    layout_of,
    restore_layout,
)
from layershed.surgery import bypass
from tests.support.models import build_model

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
RATES = {"attention": 0.01, "mlp": 0.02, "no decay": 0.03, "head": 0.04}


class Run(nn.Module):
    """A transformer and a head beside it, in the order that sorts neither first by accident."""

    def __init__(self, architecture="llama"):
        super().__init__()
        self.before = nn.Linear(4, 4)
        self.net = build_model(architecture)
        self.head = nn.Linear(4, 4)


def kind_of(name):
    if not name.startswith("net."):
        return "head"
    if any(f".{end}.weight" in name for end in ATTENTION):
        return "attention"
    return "mlp" if any(f".{end}.weight" in name for end in MLP) else "no decay"


def four_groups(run, make=AdamW, **settings):
    groups = [
        {"params": [p for name, p in run.named_parameters() if kind_of(name) == kind], "lr": rate}
        for kind, rate in RATES.items()
    ]
    return make(groups, weight_decay=0.1, **settings)


def fill_gradients(module, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) if parameter.requires_grad else None


def stepped(run, make=four_groups):
    optimizer = make(run)
    fill_gradients(run, 0)
    optimizer.step()
    return optimizer


def switch(run, optimizers, **settings):
    inject_lora(run.net, **settings)
    hand_over(optimizers, run, run.net)


def names_of(run, group):
    names = {id(p): name for name, p in run.named_parameters()}
    return [names[id(p)] for p in group["params"]]


def test_every_adapter_joins_the_group_of_its_weight_and_frozen_weights_are_gone():
    run = Run()
    optimizer = stepped(run)
    before = {id(p) for p in run.parameters()}
    switch(run, [optimizer])
    expected = {kind: [] for kind in RATES}
    for name, parameter in run.named_parameters():  # in the module's order
        if id(parameter) not in before:
            (end,) = (end for end in (*ATTENTION, *MLP) if f".{end}.lora_" in name)
            expected["attention" if end in ATTENTION else "mlp"].append(name)
        elif not name.startswith("net."):
            expected["head"].append(name)
    assert {kind: len(names) for kind, names in expected.items()} == {
        "attention": 4 * 4 * 2,
        "mlp": 4 * 3 * 2,
        "no decay": 0,
        "head": 4,
    }
    for (kind, rate), group in zip(RATES.items(), optimizer.param_groups, strict=True):
        assert names_of(run, group) == expected[kind]
        assert group["lr"] == rate
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in run.parameters() if p.requires_grad}
    assert {id(p) for p in optimizer.state} == {id(run.get_parameter(name)) for name in expected["head"]}


def test_adapter_joins_the_group_of_its_weight_and_not_of_its_bias():
    run = Run("opt")
    norms = [p for p in run.parameters() if p.ndim == 1]
    others = [p for p in run.parameters() if p.ndim > 1]
    optimizer = AdamW([{"params": norms, "weight_decay": 0.0}, {"params": others, "weight_decay": 0.1}], lr=0.01)
    switch(run, [optimizer])
    assert names_of(run, optimizer.param_groups[0]) == ["before.bias", "head.bias"]
    adapters = [name for name, _ in run.named_parameters() if ".lora_" in name]
    assert len(adapters) == 4 * 6 * 2
    assert names_of(run, optimizer.param_groups[1]) == ["before.weight", *adapters, "head.weight"]


def test_hand_over_keeps_outside_state_and_group_objects():
    run = Run()
    optimizer = stepped(run)
    outside = [*run.before.parameters(), *run.head.parameters()]
    states = [optimizer.state[p] for p in outside]
    values = copy.deepcopy(states)
    owner, groups = optimizer.param_groups, list(optimizer.param_groups)
    lists = [group["params"] for group in groups]
    switch(run, [optimizer])
    assert optimizer.param_groups is owner
    for group, now, kept in zip(groups, optimizer.param_groups, lists, strict=True):
        assert now is group
        assert now["params"] is kept
    for parameter, state, value in zip(outside, states, values, strict=True):
        assert optimizer.state[parameter] is state
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(state[key], value[key]) for key in value)
        assert state["exp_avg"].abs().sum() > 0


def test_adapter_of_a_weight_in_no_group_joins_the_first_group_of_the_transformer():
    run = Run()
    groups = [run.head.parameters(), run.net.lm_head.parameters(), run.net.model.norm.parameters()]
    optimizer = AdamW([{"params": list(group)} for group in groups])
    switch(run, [optimizer], target_modules=["q_proj"])
    adapters = [name for name, _ in run.named_parameters() if ".lora_" in name]
    assert len(adapters) == 8
    assert [names_of(run, group) for group in optimizer.param_groups] == [["head.weight", "head.bias"], adapters, []]


def test_adapters_stay_with_the_optimizer_of_their_weight():
    run = Run()
    first = SGD([p for name, p in run.named_parameters() if kind_of(name) == "attention"], lr=0.1, momentum=0.9)
    second = AdamW([p for name, p in run.named_parameters() if kind_of(name) != "attention"])
    fill_gradients(run, 0)
    first.step()
    second.step()
    switch(run, [first, second])
    found = [
        {name.split(".")[-4] for name in names_of(run, o.param_groups[0]) if "lora" in name} for o in (first, second)
    ]
    assert found == [set(ATTENTION), set(MLP)]
    assert not first.state


def test_hand_over_without_optimizers_does_nothing():
    run = Run()
    inject_lora(run.net)
    before = copy.deepcopy(run.state_dict())
    hand_over([], run, run.net)
    assert all(torch.equal(value, before[name]) for name, value in run.state_dict().items())


def test_hand_over_after_a_second_injection_keeps_the_first_state():
    run = Run()
    optimizer = stepped(run)
    switch(run, [optimizer], target_modules=["q_proj"])
    fill_gradients(run, 1)
    optimizer.step()
    first = {name: optimizer.state[p] for name, p in run.named_parameters() if ".lora_" in name}
    assert len(first) == 8
    switch(run, [optimizer], target_modules=["q_proj", "up_proj"])
    assert all(optimizer.state[run.get_parameter(name)] is state for name, state in first.items())
    held = {name for group in optimizer.param_groups for name in names_of(run, group)}
    assert held == {name for name, p in run.named_parameters() if p.requires_grad}
    assert sum(".up_proj.lora_" in name for name in held) == 8


def test_steps_after_hand_over_equal_those_of_fresh_optimizers():
    """The head's own goes on from where it was; weights of the transformer do not move."""
    run = Run()
    optimizer = stepped(run)
    untold = Run()
    reference = stepped(untold)
    switch(run, [optimizer])
    inject_lora(untold.net)
    fresh = AdamW(
        [
            {
                "params": [p for n, p in untold.named_parameters() if ".lora_" in n and any(e in n for e in ends)],
                "lr": rate,
            }
            for ends, rate in ((ATTENTION, RATES["attention"]), (MLP, RATES["mlp"]))
        ],
        weight_decay=0.1,
    )
    for seed in (1, 2, 3):
        fill_gradients(run, seed)
        fill_gradients(untold, seed)
        optimizer.step()
        fresh.step()
        reference.step()  # passes over what has no gradient
    start = dict(stepped_run().named_parameters())
    for name, parameter in untold.named_parameters():
        assert torch.equal(run.get_parameter(name), parameter), name
        if ".lora_" not in name and name.startswith("net."):
            assert torch.equal(parameter, start[name.replace(".base_layer", "")])


def stepped_run():
    run = Run()
    stepped(run)
    return run


SCHEDULES = {
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, T_max=12),
    "one cycle": lambda optimizer: OneCycleLR(optimizer, max_lr=list(RATES.values()), total_steps=14),
    "linear": lambda optimizer: LinearLR(optimizer, start_factor=0.25, total_iters=9),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rate_schedules_go_on_after_hand_over(schedule):
    def run(switched):
        module = Run()
        optimizer = four_groups(module)
        scheduler = SCHEDULES[schedule](optimizer)
        seen = []
        for step in range(12):
            if switched and step == 5:
                switch(module, [optimizer])
                forget_quantized([optimizer], module)
            optimizer.step()
            scheduler.step()
            seen.append([(group["lr"], group["betas"]) for group in optimizer.param_groups])
        return seen, scheduler.state_dict()

    (found, state), (wanted, reference) = run(True), run(False)
    assert found == wanted
    assert len({rates[0] for rates in found}) > 3
    for key in ("last_epoch", "_step_count", "_last_lr", "base_lrs"):
        assert state.get(key) == reference.get(key)


def test_restored_layout_lets_an_optimizer_state_load():
    run = Run()
    optimizer = stepped(run)
    switch(run, [optimizer])
    fill_gradients(run, 1)
    optimizer.step()
    layout = layout_of([optimizer], run)
    fresh = Run()
    inject_lora(fresh.net)
    fresh.load_state_dict(run.state_dict())
    other = four_groups(fresh)
    groups = list(other.param_groups)
    restore_layout([other], fresh, layout)
    assert all(now is before for now, before in zip(other.param_groups, groups, strict=True))
    assert layout_of([other], fresh) == layout
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for module, own in ((run, optimizer), (fresh, other)):
        fill_gradients(module, 2)
        own.step()
    named = dict(run.named_parameters())
    assert all(torch.equal(p, named[name]) for name, p in fresh.named_parameters())


def test_layout_lists_names_by_optimizer_and_group():
    run = Run()
    first, second = SGD(run.before.parameters(), lr=1.0), AdamW([{"params": [p]} for p in run.head.parameters()])
    assert layout_of([first, second], run) == [[["before.weight", "before.bias"]], [["head.weight"], ["head.bias"]]]


@pytest.mark.parametrize(
    ("layout", "match"),
    [
        ([[["head.weight"]]], r"\[1\] parameter groups.*\[2\]"),
        ([[["head.weight"], []], [[]]], r"\[2, 1\] parameter groups.*\[2\]"),
        ([], r"\[\] parameter groups"),
        ([[["head.weight"], ["head.scale"]]], r"'head\.scale', which the model lacks"),
    ],
)
def test_layout_of_other_optimizers_is_refused(layout, match):
    run = Run()
    optimizer = AdamW([{"params": [p]} for p in run.head.parameters()])
    with pytest.raises(CheckpointError, match=match):
        restore_layout([optimizer], run, layout)


def test_quantized_weights_leave_the_optimizer_and_others_keep_their_state():
    run = Run()
    optimizer = stepped(run)
    quantize(run.net)
    kept = {name: optimizer.state[p] for name, p in run.named_parameters() if p.is_floating_point()}
    assert not any(name.split(".")[-2] in (*ATTENTION, *MLP) for name in kept)
    forget_quantized([optimizer], run)
    found = [names_of(run, group) for group in optimizer.param_groups]
    assert found[:2] == [[], []]
    assert sorted(found[2] + found[3]) == sorted(kept)
    assert len(optimizer.state) == len(kept)
    assert all(optimizer.state[run.get_parameter(name)] is state for name, state in kept.items())


def test_quantized_weights_leave_optimizers_made_over_them_too():
    """As those of a resumed run, whose model is quantized before configure_optimizers."""
    run = Run()
    quantize(run.net)
    bypass(run.net, [s for s in find_sublayers(run.net) if s.name == "mlp.1"])
    optimizer = AdamW(run.parameters())
    forget_quantized([optimizer], run)
    assert names_of(run, optimizer.param_groups[0]) == [n for n, p in run.named_parameters() if p.is_floating_point()]


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("make", [SGD, AdamW])
@pytest.mark.parametrize("factor", [0.25, 1.0, 3.0])
def test_learning_rate_factor_equals_a_scaled_learning_rate(make, factor):
    run, reference = Run(), Run()
    optimizer = four_groups(run, make)
    slow = four_groups(reference, make)
    for group in slow.param_groups:
        group["lr"] *= factor
    LearningRateFactor(lambda: factor).attach([optimizer])
    before = flat(run)
    for seed in (0, 1):
        fill_gradients(run, seed)
        fill_gradients(reference, seed)
        optimizer.step()
        slow.step()
        assert [group["lr"] for group in optimizer.param_groups] == list(RATES.values())
    assert torch.equal(flat(run), flat(reference))
    assert not torch.equal(flat(run), before)


def test_learning_rate_factor_may_change_and_schedules_do_not_see_it():
    factors = [1.0, 0.5, 0.25, 2.0, 1.0, 0.1]
    coming = iter(factors)
    parameters = [nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2)]
    scaled, plain = (SGD([parameter], lr=1.0) for parameter in parameters)
    schedules = [CosineAnnealingLR(optimizer, T_max=8) for optimizer in (scaled, plain)]
    LearningRateFactor(lambda: next(coming)).attach([scaled])
    for factor in factors:
        rate = plain.param_groups[0]["lr"]
        before = [parameter.item() for parameter in parameters]
        for parameter, optimizer, schedule in zip(parameters, (scaled, plain), schedules, strict=True):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            schedule.step()
        moved = [was - parameter.item() for was, parameter in zip(before, parameters, strict=True)]
        assert moved == pytest.approx([rate * factor, rate])
        assert scaled.param_groups[0]["lr"] == plain.param_groups[0]["lr"] != rate
    assert schedules[0].state_dict() == schedules[1].state_dict()


def test_learning_rate_factor_scales_every_attached_optimizer_and_no_other():
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(3)]
    optimizers = [SGD([p], lr=lr) for p, lr in zip(parameters, (1.0, 2.0, 4.0), strict=True)]
    LearningRateFactor(lambda: 0.5).attach(optimizers[:2])
    for parameter, optimizer in zip(parameters, optimizers, strict=True):
        parameter.grad = torch.ones(3)
        optimizer.step()
    assert [p[0].item() for p in parameters] == [-0.5, -1.0, -4.0]


def test_learning_rate_factor_puts_tensor_rates_back_as_the_same_objects():
    parameter, rate = nn.Parameter(torch.zeros(3)), torch.tensor(0.5)
    optimizer = AdamW([parameter], lr=rate, foreach=False)
    LearningRateFactor(lambda: 0.5).attach([optimizer])
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.5
    assert parameter[0].item() == pytest.approx(-0.25, rel=1e-5)


def failing():
    raise ZeroDivisionError


@pytest.mark.parametrize("then", ["detach", "step"])
def test_closure_that_raised_leaves_no_scaled_learning_rate(then):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = SGD([parameter], lr=1.0)
    rates = LearningRateFactor(lambda: 0.5)
    rates.attach([optimizer])
    with pytest.raises(ZeroDivisionError):
        optimizer.step(failing)
    if then == "detach":
        rates.detach()
        assert optimizer.param_groups[0]["lr"] == 1.0
    parameter.grad = torch.ones(1)
    optimizer.step()
    assert parameter.item() == (-1.0 if then == "detach" else -0.5)
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_learning_rate_factor_attached_twice_scales_once():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = SGD([parameter], lr=1.0)
    rates = LearningRateFactor(lambda: 0.5)
    rates.attach([optimizer])
    rates.attach([optimizer])
    parameter.grad = torch.ones(1)
    optimizer.step()
    assert parameter.item() == -0.5
    rates.detach()
    rates.detach()
    optimizer.step()
    assert parameter.item() == -1.5
