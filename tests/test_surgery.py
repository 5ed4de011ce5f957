"""Bypass, restore and remove against an independent reference: a hook that zeroes the branch."""

import copy
import pickle
from contextlib import contextmanager

import pytest
import torch
from transformers import DynamicCache, StaticCache

from layershed.discovery.find import dissect, find_sublayers
from layershed.errors import AmbiguousModelError, PlanError, StandInError
from layershed.planning.plan import Sublayer
from layershed.spellings import cache_name, layer_overrides, recompute_activations
from layershed.stand_ins.install import MARK
from layershed.surgery import (
    bypass,
    bypassed_sublayers,
    dense,
    dropped_sublayers,
    remove,
    removed_sublayers,
    restore,
)
from tests.support.architectures import tiny_model
from tests.support.conformance import Case, reference
from tests.support.models import build_model, some


@contextmanager
def zeroed(model, sublayers):
    """The reference: the branches compute as ever, and hooks multiply what they give by zero."""

    def zero(_module, _args, output):
        return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

    handles = [model.get_submodule(sublayer.path).register_forward_hook(zero) for sublayer in sublayers]
    yield
    for handle in handles:
        handle.remove()


def logits(model, tokens, **kwargs):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False, **kwargs).logits


@pytest.fixture(params=["llama", "mistral", "qwen3", "gpt2", "gpt_neox", "phi", "olmo2", "gemma3_text"])
def any_model(request):
    return build_model(request.param)


def test_bypass_of_each_sublayer_equals_a_zeroed_branch(any_model, tokens):
    for sublayer in find_sublayers(any_model):
        with zeroed(any_model, [sublayer]):
            expected = logits(any_model, tokens)
        bypass(any_model, [sublayer])
        assert torch.equal(logits(any_model, tokens), expected), sublayer
        restore(any_model)


def test_bypass_and_remove_of_several_equal_zeroed_branches(any_model, tokens):
    chosen = some(any_model)
    before = logits(any_model, tokens)
    with zeroed(any_model, chosen):
        expected = logits(any_model, tokens)
    bypass(any_model, chosen)
    assert torch.equal(logits(any_model, tokens), expected)
    assert not torch.allclose(before, expected)
    remove(any_model)
    assert torch.equal(logits(any_model, tokens), expected)
    assert removed_sublayers(any_model) == tuple(sorted(chosen))


def test_restored_model_is_bit_identical(model, tokens):
    before, state = logits(model, tokens), copy.deepcopy(model.state_dict())
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    bypass(model, some(model))
    assert [name for name in model.state_dict() if not name.endswith(MARK)] == list(state)
    restore(model)
    assert list(model.state_dict()) == list(state)
    assert torch.equal(logits(model, tokens), before)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert not any("forward" in module.__dict__ or "extra_repr" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("model_type", ["llama", "phi"])
def test_restore_of_some_equals_bypass_of_the_others(model_type, tokens):
    model, reference = build_model(model_type), build_model(model_type)
    found = find_sublayers(model)
    bypass(model, found[:3])
    restore(model, found[1:2])
    bypass(reference, [found[0], found[2]])
    assert torch.equal(logits(model, tokens), logits(reference, tokens))
    assert bypassed_sublayers(model) == (found[0], found[2])


def test_second_bypass_adds_to_the_first(llama, tokens):
    found = find_sublayers(llama)
    reference = copy.deepcopy(llama)
    bypass(llama, found[:1])
    bypass(llama, found[:2])
    bypass(reference, found[:2])
    assert torch.equal(logits(llama, tokens), logits(reference, tokens))
    restore(llama)
    assert all(parameter.requires_grad for parameter in llama.parameters())


def test_dense_lifts_the_bypass_and_puts_it_back_even_after_an_error(llama, tokens):
    before = logits(llama, tokens)
    bypass(llama, some(llama))
    dropped = logits(llama, tokens)
    with dense(llama):
        assert torch.equal(logits(llama, tokens), before)
    assert torch.equal(logits(llama, tokens), dropped)
    with pytest.raises(KeyError), dense(llama):
        raise KeyError
    assert torch.equal(logits(llama, tokens), dropped)
    remove(llama)
    with pytest.raises(PlanError, match=r"attention\.0.*were removed"), dense(llama):
        pass


@pytest.mark.parametrize(
    "carry", [copy.deepcopy, pytest.param(lambda model: pickle.loads(pickle.dumps(model)), id="pickle")]
)
def test_copied_model_has_its_own_bypass(llama, tokens, carry):
    bypass(llama, some(llama))
    dropped = logits(llama, tokens)
    twin = carry(llama)
    restore(llama)
    assert torch.equal(logits(twin, tokens), dropped)
    assert bypassed_sublayers(twin) == tuple(sorted(some(llama)))


def cached_logits(model, tokens, cache, **kwargs):
    """Prefill four tokens, then one at a time."""
    steps = []
    with torch.no_grad():
        for start, stop in [(0, 4), *((i, i + 1) for i in range(4, tokens.shape[1]))]:
            mask = kwargs["attention_mask"][:, :stop] if "attention_mask" in kwargs else None
            step = model(
                tokens[:, start:stop], use_cache=True, attention_mask=mask, **{cache_name(model.forward): cache}
            )
            steps.append(step.logits)
    return torch.cat(steps, dim=1)


@pytest.mark.parametrize(
    ("how", "static"),
    [
        pytest.param(bypass, False, id="bypass-dynamic"),
        pytest.param(remove, True, id="remove-static"),
        pytest.param(bypass, True, id="bypass-static", marks=pytest.mark.slow),
        pytest.param(remove, False, id="remove-dynamic", marks=pytest.mark.slow),
    ],
)
def test_cached_logits_equal_uncached_ones_with_block_0_attention_dropped(any_model, tokens, how, static):
    how(any_model, some(any_model))
    config = any_model.config
    cache = StaticCache(config=config, max_cache_len=32) if static else DynamicCache(config=config)
    torch.testing.assert_close(cached_logits(any_model, tokens, cache), logits(any_model, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kinds", [{"attention"}, {"mlp"}])
def test_generate_with_cache_equals_generate_without(model, tokens, kinds):
    bypass(model, [s for s in find_sublayers(model) if s.kind in kinds and s.block != 2])
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0  # left padding
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask, "eos_token_id": None}
    expected = model.generate(tokens, use_cache=False, **settings)
    assert torch.equal(model.generate(tokens, use_cache=True, **settings), expected)
    beams = {**settings, "num_beams": 3}
    assert torch.equal(
        model.generate(tokens, use_cache=True, **beams), model.generate(tokens, use_cache=False, **beams)
    )


def test_model_without_any_attention_generates_with_cache_as_without(llama, tokens):
    bypass(llama, [s for s in find_sublayers(llama) if s.kind == "attention"])
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
        "attention_mask": torch.ones_like(tokens),
    }
    assert torch.equal(
        llama.generate(tokens, use_cache=True, **settings), llama.generate(tokens, use_cache=False, **settings)
    )


def test_bypassed_sublayer_gets_no_gradient_and_the_others_do(model, tokens):
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    chosen = some(model)
    bypass(model, chosen)
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    branches = {b.sublayer: b for b in dissect(model).branches}
    gone = tuple(path for s in chosen for path in (s.path, branches[s].entry.path))
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(gone), name
        assert parameter.requires_grad == (not name.startswith(gone)), name


def test_gradients_under_checkpointing_equal_those_without(llama, tokens):
    bypass(llama, some(llama))
    llama.train()
    llama(input_ids=tokens, labels=tokens).loss.backward()
    expected = {name: p.grad.clone() for name, p in llama.named_parameters() if p.grad is not None}
    llama.zero_grad()
    recompute_activations(llama)
    llama(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(llama.get_parameter(name).grad, gradient)


def test_bypass_after_compile_changes_the_compiled_logits(tokens):
    llama = build_model("llama", num_hidden_layers=3)
    compiled = torch.compile(llama, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, tokens), logits(llama, tokens))
    bypass(compiled, some(llama))
    torch.testing.assert_close(logits(compiled, tokens), logits(llama, tokens))


def test_print_shows_bypassed_and_removed_sublayers(llama):
    assert "bypassed" not in repr(llama)
    chosen = find_sublayers(llama)[:1]
    bypass(llama, chosen)
    assert "bypassed" in repr(llama.model.layers[0].self_attn)
    assert "bypassed" not in repr(llama.model.layers[1])
    remove(llama)
    assert "attention.0, removed" in repr(llama)


def test_remove_frees_the_weights_and_marks_the_config(llama):
    total = llama.num_parameters()
    found = find_sublayers(llama)
    bypass(llama, found[2:3])
    block = llama.model.layers[1]
    expected = sum(p.numel() for m in (block.mlp, block.post_attention_layernorm) for p in m.parameters())
    remove(llama, found[3:4])
    assert total - llama.num_parameters() == expected
    assert layer_overrides(llama.config)[1]["skip"] == ["mlp"]
    assert bypassed_sublayers(llama) == found[2:3]
    assert dropped_sublayers(llama) == found[2:4]
    assert find_sublayers(llama) == (*found[:3], *found[4:])
    remove(llama)
    assert layer_overrides(llama.config)[1]["skip"] == ["attention", "mlp"]


@pytest.mark.parametrize("act", [bypass, remove])
def test_sublayer_that_is_not_in_the_model_is_refused(llama, act):
    with pytest.raises(PlanError, match=r"no sublayer attention\.9 at 'model\.layers\.9\.self_attn'.*another model"):
        act(llama, [Sublayer(9, "attention", "model.layers.9.self_attn")])
    with pytest.raises(PlanError, match="No sublayer was given"):
        act(llama, [])


def test_restoring_a_sublayer_that_is_not_bypassed_is_refused(llama):
    with pytest.raises(PlanError, match=r"attention\.0 is not bypassed\. Bypassed are: none"):
        restore(llama, find_sublayers(llama)[:1])


@pytest.mark.default_cases(3)
@pytest.mark.parametrize("model_type", ["falcon", "phi", "bert", "granitemoeshared", "bart", "jamba"])
def test_sublayers_left_after_a_removal_can_still_be_dropped(model_type):
    """One kind removed, then one of the other kind bypassed: the reference has zero weights for both."""
    case = Case(tiny_model(model_type))
    for first, second in (("mlp", "attention"), ("attention", "mlp")):
        branches = case.anatomy.branches
        gone = [branch for branch in branches if branch.sublayer.kind == first]
        later = next(branch for branch in branches if branch.sublayer.kind == second)
        model = copy.deepcopy(case.model)
        remove(model, [branch.sublayer for branch in gone])
        assert later.sublayer in find_sublayers(model)
        bypass(model, [later.sublayer])
        torch.testing.assert_close(case.logits(model), case.logits(reference(case, [*gone, later])))


def test_sublayers_of_one_of_two_transformers_are_restored_by_name(llama):
    both = torch.nn.ModuleDict({"a": llama, "b": build_model("llama")})
    found = find_sublayers(llama)[:2]
    for name in both:
        bypass(both, found, name=name)
    with pytest.raises(AmbiguousModelError):
        restore(both, found[:1])
    assert bypassed_sublayers(both["a"]) == bypassed_sublayers(both["b"]) == found, "an error restores nothing"
    restore(both, found[:1], name="a")
    assert (bypassed_sublayers(both["a"]), bypassed_sublayers(both["b"])) == (found[1:], found)
    restore(both)
    assert bypassed_sublayers(both) == ()


def test_dropped_attention_with_unknown_cache_slot_refuses_the_cache(llama, tokens, monkeypatch):
    monkeypatch.setattr("layershed.discovery.find.watch_cache", lambda model: None)
    chosen = find_sublayers(llama)[:1]
    expected = build_model("llama")
    bypass(llama, chosen)
    with zeroed(expected, chosen):
        assert torch.equal(logits(llama, tokens), logits(expected, tokens))
    with pytest.raises(StandInError, match=r"past dropped attention\.0: its slot is unknown"):
        llama(input_ids=tokens, use_cache=True)


@pytest.mark.filterwarnings("ignore:The `use_cache` argument is deprecated:FutureWarning")  # of transformers 4.57
def test_dropped_attention_refuses_a_second_stream_that_was_not_proven():
    """XLNet decodes with a query stream beside the content, which a forward pass over plain tokens does not have."""
    model = tiny_model("xlnet")
    tokens = torch.arange(3, 9)[None]
    bypass(model, find_sublayers(model)[:1])
    model(input_ids=tokens)
    query = {"perm_mask": torch.zeros(1, 6, 6), "target_mapping": torch.eye(6)[None]}
    with pytest.raises(StandInError, match=r"attention\.0 is dropped, .* second stream"):
        model(input_ids=tokens, **query)
