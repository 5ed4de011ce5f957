"""Never a wrong answer in silence: a random plan on a random tiny model gives an error or the reference's logits."""

import copy
import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import layershed as ls
from tests.support.architectures import tiny_model
from tests.support.conformance import Case, reference

MODEL_TYPES = (
    "llama",
    "gpt2",
    "phi",
    "falcon",
    "bert",
    "opt",
    "bloom",
    "jamba",
    "gemma4_text",
    "minimax",
    "olmo2",
    "doge",
)


@functools.cache
def case(model_type, blocks):
    try:
        return Case(tiny_model(model_type, blocks))
    except ls.LayershedError:
        assert (model_type, blocks) == ("jamba", 1), "its first block alone has no attention"
        return None


def check_any_plan(data):
    tried = case(data.draw(st.sampled_from(MODEL_TYPES)), data.draw(st.integers(1, 4)))
    if tried is None:
        return
    branches = tried.anatomy.branches
    chosen = data.draw(st.lists(st.sampled_from(branches), min_size=1, unique_by=lambda branch: branch.sublayer))
    first = data.draw(st.integers(0, len(chosen)))
    expected = tried.logits(reference(tried, chosen))
    # in two rounds, in any order, as an iterative schedule would
    for part in (chosen[:first], chosen[first:]):
        if part:
            ls.bypass(tried.model, [branch.sublayer for branch in part])
    try:
        torch.testing.assert_close(tried.logits(), expected, rtol=1e-4, atol=1e-5)
        if data.draw(st.booleans()):
            removed = copy.deepcopy(tried.model)
            ls.remove(removed, data.draw(st.sampled_from([None, ls.bypassed_sublayers(removed)[:1]])))
            torch.testing.assert_close(tried.logits(removed), expected, rtol=1e-4, atol=1e-5)
    finally:
        ls.restore(tried.model)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_plan_on_any_model_gives_the_references_logits(data):
    check_any_plan(data)


@pytest.mark.slow
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_many_more_plans_give_the_references_logits(data):
    check_any_plan(data)


@settings(max_examples=25, deadline=None)
@given(block=st.integers(-2, 6), kind=st.sampled_from(["attention", "mlp", "cross_attention"]), index=st.integers(0, 3))
def test_bypass_of_an_unknown_sublayer_is_refused_and_changes_nothing(block, kind, index):
    tried = case("jamba", 3)
    path = ("model.layers.0.mamba", "model.layers.1.self_attn", "model.layers.2.feed_forward", "lm_head")[index]
    sublayer = ls.Sublayer(block, kind, path)
    if sublayer in {branch.sublayer for branch in tried.anatomy.branches}:
        return
    before = tried.logits()
    with pytest.raises(ls.LayershedError, match="has no sublayer"):
        ls.bypass(tried.model, [sublayer])
    assert torch.equal(tried.logits(), before)
