"""Optimizers forget bypassed parameters, against optimizers and models that never saw a drop."""

import copy
import math

import pytest
import torch
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from layershed.discovery.find import find_sublayers
from layershed.recovery.optimizer_groups import forget_parameters
from layershed.surgery import bypass

# what attention.0 and mlp.2 of a llama hold
GONE = (
    "model.layers.0.self_attn.",
    "model.layers.0.input_layernorm.",
    "model.layers.2.mlp.",
    "model.layers.2.post_attention_layernorm.",
)


def some(model):
    return [s for s in find_sublayers(model) if s.name in {"attention.0", "mlp.2"}]


def split(model):
    """Parameters that go and parameters that stay."""
    named = dict(model.named_parameters())
    return (
        [p for name, p in named.items() if name.startswith(GONE)],
        [p for name, p in named.items() if not name.startswith(GONE)],
    )


def fill_gradients(model, seed):
    """A gradient for every parameter, so that only the optimizer decides what moves."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def two_groups(model, **settings):
    """Norms in one group, everything else in another, as weight decay wants it."""
    norms = [p for p in model.parameters() if p.ndim == 1]
    others = [p for p in model.parameters() if p.ndim > 1]
    return AdamW([{"params": others, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}], lr=0.01, **settings)


def stepped(model, make=two_groups):
    optimizer = make(model)
    fill_gradients(model, 0)
    optimizer.step()
    return optimizer


def identities(parameters):
    return [id(parameter) for parameter in parameters]


def test_forgetting_keeps_the_group_objects_and_their_lists(llama):
    optimizer = stepped(llama)
    groups, lists = list(optimizer.param_groups), [group["params"] for group in optimizer.param_groups]
    owner = optimizer.param_groups
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    bypass(llama, some(llama))
    forget_parameters([optimizer], llama)
    assert optimizer.param_groups is owner
    assert all(now is before for now, before in zip(optimizer.param_groups, groups, strict=True))
    assert all(group["params"] is before for group, before in zip(groups, lists, strict=True))
    assert [{key: value for key, value in group.items() if key != "params"} for group in groups] == settings


def test_only_bypassed_parameters_are_forgotten_and_the_rest_keeps_order_and_state(llama):
    optimizer = stepped(llama)
    gone, kept = split(llama)
    state = {id(p): copy.deepcopy(optimizer.state[p]) for p in kept}
    bypass(llama, some(llama))
    forget_parameters([optimizer], llama)
    others, norms = (group["params"] for group in optimizer.param_groups)
    assert identities(others) == identities(p for p in kept if p.ndim > 1)
    assert identities(norms) == identities(p for p in kept if p.ndim == 1)
    assert set(identities(optimizer.state)) == set(identities(kept))
    assert gone
    for parameter in kept:
        for key, value in state[id(parameter)].items():
            assert torch.equal(optimizer.state[parameter][key], value)


def test_forgetting_twice_equals_once(llama):
    optimizer = stepped(llama)
    bypass(llama, some(llama))
    forget_parameters([optimizer], llama)
    groups = [identities(group["params"]) for group in optimizer.param_groups]
    state = copy.deepcopy(optimizer.state_dict())
    forget_parameters([optimizer], llama)
    assert [identities(group["params"]) for group in optimizer.param_groups] == groups
    again = optimizer.state_dict()
    assert again["param_groups"] == state["param_groups"]
    assert list(again["state"]) == list(state["state"])


def test_optimizer_of_a_dense_model_forgets_nothing(llama):
    optimizer = stepped(llama)
    forget_parameters([optimizer], llama)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(llama.parameters()))
    assert len(optimizer.state) == len(list(llama.parameters()))


def test_steps_after_forgetting_move_kept_parameters_as_before_and_no_other(llama):
    untouched = copy.deepcopy(llama)
    optimizer, reference = stepped(llama), stepped(untouched)
    bypass(llama, some(llama))
    forget_parameters([optimizer], llama)
    gone, _ = split(llama)
    frozen = [parameter.detach().clone() for parameter in gone]
    for seed in (1, 2):
        fill_gradients(llama, seed)
        fill_gradients(untouched, seed)
        optimizer.step()
        reference.step()
    assert all(torch.equal(now, before) for now, before in zip(gone, frozen, strict=True))
    moved = dict(untouched.named_parameters())
    for name, parameter in llama.named_parameters():
        assert torch.equal(parameter, moved[name]) == (not name.startswith(GONE)), name


def test_learning_rate_schedule_goes_on_after_forgetting(llama):
    optimizer = stepped(llama)
    schedule = CosineAnnealingLR(optimizer, T_max=10)
    rates = []
    for step in range(10):
        rates.append([group["lr"] for group in optimizer.param_groups])
        if step == 4:
            bypass(llama, some(llama))
            forget_parameters([optimizer], llama)
        optimizer.step()
        schedule.step()
    expected = [0.01 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)]
    for step, pair in enumerate(rates):
        assert pair == pytest.approx([expected[step]] * 2)


def test_every_optimizer_forgets_bypassed_parameters(llama):
    halves = [[p for p in llama.parameters() if (p.ndim == 1) == norm] for norm in (True, False)]
    optimizers = [SGD(halves[0], lr=0.1, momentum=0.9), AdamW(halves[1])]
    fill_gradients(llama, 0)
    for optimizer in optimizers:
        optimizer.step()
    gone, kept = split(llama)
    bypass(llama, some(llama))
    forget_parameters(iter(optimizers), llama)
    for optimizer, norm in zip(optimizers, (True, False), strict=True):
        expected = identities(p for p in kept if (p.ndim == 1) == norm)
        assert identities(optimizer.param_groups[0]["params"]) == expected
        assert set(identities(optimizer.state)) == set(expected)
    assert {p.ndim for p in gone} == {1, 2}


def test_parameter_group_may_become_empty(llama):
    gone, kept = split(llama)
    optimizer = AdamW([{"params": gone}, {"params": kept}])
    bypass(llama, some(llama))
    forget_parameters([optimizer], llama)
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, len(kept)]
    fill_gradients(llama, 0)
    optimizer.step()
