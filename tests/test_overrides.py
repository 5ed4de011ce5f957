"""Single overrides: what they return, what the cache sees, and what undoing them leaves. Models: test_surgery.py."""

import types

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from layershed.overrides import (
    PassThrough,
    ZeroBranch,
    advance_cache,
    first_tensor,
    install,
    lifted,
    overridden,
    override_of,
    uninstall,
)
from layershed.plan import Sublayer
from tests.conftest import build_model

SUBLAYER = Sublayer(0, "attention", "model.layers.0.self_attn")


def zero_branch(outputs=0, layer_idx=None, materialize=False):
    return ZeroBranch(SUBLAYER, outputs, layer_idx, materialize)


@pytest.fixture
def hidden():
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def test_first_tensor_is_the_first_by_position_and_else_by_keyword():
    a, b = torch.zeros(1), torch.ones(1)
    assert first_tensor((None, a, b), {"c": b}) is a
    assert first_tensor((), {"mask": None, "hidden_states": a, "other": b}) is a
    assert first_tensor((3,), {"hidden_states": b}) is b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_branch_is_zeros_like_the_hidden_states(hidden, dtype):
    zeros = zero_branch()(hidden.to(dtype))
    assert zeros.dtype == dtype
    assert torch.equal(zeros, torch.zeros(2, 5, 8, dtype=dtype))
    assert torch.equal(hidden + zero_branch()(hidden_states=hidden), hidden)


def test_a_zero_branch_comes_in_the_form_of_its_module(hidden):
    first, *rest = zero_branch(outputs=3)(hidden, attention_mask=None)
    assert torch.equal(first, torch.zeros_like(hidden))
    assert rest == [None, None]
    assert isinstance(zero_branch(outputs=1)(hidden), tuple)


def test_zeros_cost_one_element_unless_they_are_written_into(hidden):
    assert zero_branch()(hidden).untyped_storage().nbytes() == hidden.element_size()
    own = zero_branch(materialize=True)(hidden)
    own += hidden  # Falcon adds in place
    assert torch.equal(own, hidden)


def test_pass_through_returns_its_input(hidden):
    assert PassThrough(SUBLAYER)(hidden) is hidden
    assert PassThrough(SUBLAYER)(hidden_states=hidden) is hidden


@pytest.mark.parametrize("keyword", ["past_key_values", "layer_past"])
def test_a_bypassed_attention_moves_the_cache_on(hidden, keyword):
    cache = DynamicCache()
    branch = zero_branch(outputs=2, layer_idx=0)
    branch(hidden, **{keyword: cache})
    assert cache.get_seq_length() == 5
    branch(hidden[:, :1], **{keyword: cache})
    assert cache.get_seq_length() == 6


def test_a_bypassed_mlp_leaves_the_cache_alone(hidden):
    cache = DynamicCache()
    zero_branch(layer_idx=None)(hidden, past_key_values=cache)
    zero_branch(layer_idx=0)(hidden, past_key_values=None)
    assert cache.get_seq_length() == 0


def test_the_cache_of_one_layer_is_moved_and_no_other(hidden):
    cache = DynamicCache()
    keys = torch.randn(2, 4, 3, 6)
    cache.update(keys, keys, 0)
    advance_cache(cache, 1, hidden)
    assert (cache.get_seq_length(0), cache.get_seq_length(1)) == (3, 5)
    assert torch.equal(cache.layers[0].keys, keys)


def test_install_freezes_what_was_trainable_and_uninstall_gives_that_back(hidden):
    module = nn.Linear(8, 8)
    module.bias.requires_grad_(False)
    before = module(hidden)
    before.sum().backward()
    assert module.weight.grad is not None
    install(module, PassThrough(SUBLAYER))
    assert module(hidden) is hidden
    assert [p.requires_grad for p in module.parameters()] == [False, False]
    assert module.weight.grad is None
    uninstall(module)
    assert [p.requires_grad for p in module.parameters()] == [True, False]
    assert torch.equal(module(hidden), before)


def test_uninstall_without_an_override_does_nothing():
    module = nn.Linear(2, 2)
    uninstall(module)
    assert all(p.requires_grad for p in module.parameters())


def test_hooks_of_a_bypassed_module_still_run(hidden):
    module, seen = nn.Linear(8, 8), []
    module.register_forward_hook(lambda _module, _args, output: seen.append(output))
    install(module, zero_branch())
    module(hidden)
    assert torch.equal(seen[0], torch.zeros_like(hidden))


def test_a_forward_of_someone_elses_is_no_override_and_comes_back():
    """Kernels and accelerate put a forward on the instance too."""
    module = nn.Linear(3, 3)
    own = types.MethodType(lambda self, x: 2 * x, module)
    module.forward = own
    assert override_of(module) is None
    install(module, zero_branch())
    with lifted(module):
        assert module(torch.ones(3)).tolist() == [2, 2, 2]
    uninstall(module)
    assert module(torch.ones(3)).tolist() == [2, 2, 2]


def test_overridden_finds_every_override_and_lifted_hides_them(hidden):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    dense = model(hidden)
    overrides = [(model[0], zero_branch()), (model[1], PassThrough(SUBLAYER))]
    for module, override in overrides:
        install(module, override)
    assert list(overridden(model)) == overrides
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
    assert list(overridden(model)) == overrides


def test_a_module_says_that_it_is_bypassed():
    module = nn.Linear(2, 3)
    before = repr(module)
    install(module, zero_branch())
    assert repr(module) == "Linear(bypassed)"
    uninstall(module)
    assert repr(module) == before


def test_a_cache_that_a_bypassed_attention_filled_holds_no_memory_to_speak_of(tokens):
    model = build_model("llama")
    install(model.model.layers[0].self_attn, zero_branch(outputs=2, layer_idx=0))
    cache = DynamicCache(config=model.config)
    model(input_ids=tokens, past_key_values=cache, use_cache=True)
    own, other = (cache.layers[i].keys for i in (0, 1))
    assert own.shape[2] == other.shape[2] == tokens.shape[1]
    assert own.numel() * 8 <= other.numel()
