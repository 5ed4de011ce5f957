"""Single overrides: what install changes on a module, and what undoing it leaves. Stand-ins: test_stand_in.py."""

import types

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from layershed.planning.plan import Sublayer
from layershed.spellings import cache_name
from layershed.stand_ins.contexts import lifted, withheld
from layershed.stand_ins.install import MARK, install, uninstall
from layershed.stand_ins.record import overridden
from layershed.stand_ins.stand_in import StandIn
from layershed.stand_ins.wrappers import override_of
from tests.support.models import build_model

SUBLAYER = Sublayer(0, "attention", "model.layers.0.self_attn")


def zeros(**kwargs):
    return StandIn(SUBLAYER, zero=True, **kwargs)


def pass_through():
    return StandIn(SUBLAYER, zero=False)


@pytest.fixture
def hidden():
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def test_installed_stand_in_freezes_its_module_and_uninstall_unfreezes_it(hidden):
    module = nn.Linear(8, 8)
    module.bias.requires_grad_(False)
    before = module(hidden)
    before.sum().backward()
    assert module.weight.grad is not None
    install(module, pass_through())
    assert module(hidden) is hidden
    assert [p.requires_grad for p in module.parameters()] == [False, False]
    assert module.weight.grad is None
    uninstall(module)
    assert [p.requires_grad for p in module.parameters()] == [True, False]
    assert torch.equal(module(hidden), before)


def test_uninstall_of_a_plain_module_does_nothing():
    module = nn.Linear(2, 2)
    uninstall(module)
    assert all(p.requires_grad for p in module.parameters())


def test_forward_hooks_of_a_bypassed_module_still_run(hidden):
    module, seen = nn.Linear(8, 8), []
    module.register_forward_hook(lambda _module, _args, output: seen.append(output))
    install(module, zeros())
    module(hidden)
    assert torch.equal(seen[0], torch.zeros_like(hidden))


def test_foreign_instance_forward_is_not_an_override_and_comes_back_after_uninstall():
    """Kernels and accelerate put a forward on the instance too."""
    module = nn.Linear(3, 3)
    own = types.MethodType(lambda self, x: 2 * x, module)
    module.forward = own
    assert override_of(module) is None
    install(module, zeros())
    with lifted(module):
        assert module(torch.ones(3)).tolist() == [2, 2, 2]
    uninstall(module)
    assert module(torch.ones(3)).tolist() == [2, 2, 2]


def test_overridden_finds_every_override_and_lifted_hides_them(hidden):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    dense = model(hidden)
    overrides = [(model[0], zeros()), (model[1], pass_through())]
    for module, override in overrides:
        install(module, override)
    assert [(module, id(override)) for module, override in overridden(model)] == [(m, id(o)) for m, o in overrides]
    dropped = model(hidden)
    trainable = [p.requires_grad for p in model.parameters()]
    with lifted(model):
        assert list(overridden(model)) == []
        assert torch.equal(model(hidden), dense)
        assert [p.requires_grad for p in model.parameters()] == trainable
    assert torch.equal(model(hidden), dropped)
    assert not torch.equal(dropped, dense)
    with pytest.raises(KeyError), lifted(model):
        raise KeyError
    assert [(module, id(override)) for module, override in overridden(model)] == [(m, id(o)) for m, o in overrides]


def test_repr_of_a_bypassed_module_says_bypassed():
    module = nn.Linear(2, 3)
    before = repr(module)
    install(module, zeros())
    assert repr(module) == "Linear(bypassed)"
    uninstall(module)
    assert repr(module) == before


def test_cache_layer_of_a_bypassed_attention_allocates_one_element(tokens):
    model = build_model("llama")
    stand_in = zeros(echoes=(None,), argument="hidden_states", layer_idx=0)
    install(model.model.layers[0].self_attn, stand_in)
    cache = DynamicCache(config=model.config)
    model(input_ids=tokens, use_cache=True, **{cache_name(model.forward): cache})
    own, other = (cache.layers[i].keys for i in (0, 1))
    assert own.shape[2] == other.shape[2] == tokens.shape[1]
    assert own.numel() * 8 <= other.numel()
    assert own.untyped_storage().nbytes() == own.element_size()


def test_withheld_parameters_are_renamed_in_the_same_order_and_renamed_back():
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), nn.Linear(3, 2))
    model.add_module("again", model[1][0])  # a module that stands in two places
    names, parameters = list(model.state_dict()), list(map(id, model.parameters()))
    for module in (model[1], model[1][0]):
        install(module, pass_through())
    with withheld(model):
        inside = list(model.state_dict()), list(map(id, model.parameters()))
    assert inside[1] == parameters
    wanted = {"1.0": "1 (dropped).0 (dropped)", "1.1": "1 (dropped).1", "again": "again (dropped)"}
    paths = [name.rpartition(".") for name in names]
    assert inside[0] == [f"{wanted.get(path, path)}.{name}" for path, _, name in paths]
    unmarked = [name for name in model.state_dict() if not name.endswith(MARK)]
    assert (unmarked, list(map(id, model.parameters()))) == (names, parameters)
