"""Damage of sublayers against the divergence of two whole passes, of the model and of a copy with zero weights."""

import copy

import pytest
import torch

import layershed as ls
from layershed.errors import CalibrationError, MeasurementError, UnknownNameError
from layershed.importance.damage import DamageMeter
from layershed.importance.divergence import Reference, divergence
from tests.support.damage import damage, make_batches, without
from tests.support.linear_maps import hooked, random_maps
from tests.support.models import build_model


@pytest.mark.parametrize("metric", ["kl", "loss"])
def test_the_importance_of_a_sublayer_is_the_damage_without_it(metric):
    model, batches = build_model("llama"), make_batches()
    scores = ls.estimate_importance(model, batches, metric)
    assert scores.metric == metric
    for sublayer in ls.find_sublayers(model):
        expected = damage(model, without(model, [sublayer]), metric, batches)
        assert scores[sublayer] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for block, found in scores.blocks.items():
        members = [s for s in ls.find_sublayers(model) if s.block == block]
        assert found == pytest.approx(damage(model, without(model, members), metric, batches), rel=1e-4, abs=1e-6)


def test_a_sublayer_with_a_map_is_scored_with_its_map():
    model, batches = build_model("llama"), make_batches()
    sublayer, other = ls.find_sublayers(model)[2:4]
    maps = random_maps([sublayer], 32)
    scores = ls.estimate_importance(model, batches, "kl", maps=maps)
    twin = copy.deepcopy(model)
    with hooked(twin, "llama", maps):
        assert scores[sublayer] == pytest.approx(damage(model, twin, "kl", batches), rel=1e-4)
    assert scores[other] == pytest.approx(damage(model, without(model, [other]), "kl", batches), rel=1e-4)


def test_sets_are_measured_together_with_what_is_gone():
    model, batches = build_model("gpt2"), make_batches()
    sublayers = ls.find_sublayers(model)
    meter = DamageMeter(model, batches)
    found = meter.of([sublayers[5:6], sublayers[1:3]], gone=sublayers[3:5])
    for value, group in zip(found, (sublayers[3:6], sublayers[1:5]), strict=True):
        twin = copy.deepcopy(model)
        ls.bypass(twin, group)
        assert value == pytest.approx(damage(model, twin, "kl", batches), rel=1e-4)
    assert ls.dropped_sublayers(model) == ()


def test_earlier_blocks_do_not_run_again():
    model, batches = build_model("llama"), make_batches()
    meter = DamageMeter(model, batches)
    before_last, last = ls.find_sublayers(model)[-2:]
    meter.of([[last]])  # checks once that reuse is exact
    runs = []
    blocks = enumerate(model.model.layers)
    hooks = [block.mlp.register_forward_hook(lambda *_, i=i: runs.append(i)) for i, block in blocks]
    before = meter.passes
    meter.of([[last], [before_last]])
    for hook in hooks:
        hook.remove()
    # blocks 0 to 2 once for each batch, and the last one for each batch and sublayer; a stand-in counts, too
    assert sorted(runs) == sorted([0, 1, 2] * 2 + [3] * 4)
    assert meter.passes - before == pytest.approx(3 / 4 + 2 / 4)


def test_dropped_sublayers_stay_out_and_the_reference_stays_dense():
    model, batches = build_model("llama"), make_batches()
    first, second = ls.find_sublayers(model)[2:4]
    dense = copy.deepcopy(model)
    ls.bypass(model, [first])
    scores = ls.estimate_importance(model, batches, "kl")
    assert first not in scores
    assert scores[second] == pytest.approx(damage(dense, without(dense, [first, second]), "kl", batches), rel=1e-4)


def test_the_top_tokens_give_a_lower_bound():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 1, 5, 300, generator=generator) * 3
    counted, targets = torch.ones(1, 5, dtype=torch.bool), torch.zeros(1, 5, dtype=torch.long)
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    exact = float((log_p.exp() * (log_p - log_q)).sum())
    few = float(divergence(Reference.of(p, targets, counted, top=50), q))
    assert 0.8 * exact < few < exact
    assert float(divergence(Reference.of(p, targets, counted, top=300), q)) == pytest.approx(exact, rel=1e-5)


def test_refusals():
    model, batches = build_model("llama"), make_batches()
    with pytest.raises(UnknownNameError, match="kl"):
        ls.estimate_importance(model, batches, "k1")
    with pytest.raises(CalibrationError, match="does not depend on linear maps"):
        ls.estimate_importance(model, batches, "cosine", maps=random_maps(ls.find_sublayers(model)[:1], 32))
    with pytest.raises(CalibrationError, match="no token to predict"):
        ls.estimate_importance(model, [], "kl")
    with pytest.raises(MeasurementError, match="does not predict the next token"):
        ls.estimate_importance(model.model, batches, "kl")
