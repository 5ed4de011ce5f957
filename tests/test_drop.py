"""drop_sublayers against doing it by hand: stored hidden states, float64 cosines, a sort, and branches set to zero."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from layershed.discovery.find import find_sublayers
from layershed.drop import drop_sublayers
from layershed.errors import AmbiguousModelError, CalibrationError, LayershedError, SelectionError, UnknownNameError
from layershed.planning.plan import DropPlan
from layershed.surgery import bypass, bypassed_sublayers, restore
from tests.support.models import build_model, hooks_of

# path of the blocks, and in each: attention, MLP, and the last linear map of either
PATHS = {
    "llama": ("model.layers", "self_attn", "mlp", "o_proj", "down_proj"),
    "gpt2": ("transformer.h", "attn", "mlp", "c_proj", "c_proj"),
}


def make_batches():
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 97, shape, generator=generator) for shape in ((2, 12), (3, 7))]
    masks = [torch.ones_like(part) for part in ids]
    masks[0][0, :5] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, masks, strict=True)]


def importances(model, batches):
    """(block, kind) to importance, "block" being a kind: 1 - mean over real tokens of cos(X, Y), in float64."""
    path, attention, mlp, *_ = PATHS[model.config.model_type]
    model = copy.deepcopy(model).double()
    seen, sums = {}, {}

    def see(i, kind):
        return lambda _m, _args, out: seen.update({(i, kind): out[0] if isinstance(out, tuple) else out})

    def add(key, x, y, real):
        sums.setdefault(key, []).append((1 - cosine_similarity(x, y, dim=-1))[real])

    blocks = model.get_submodule(path)
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda _m, args, i=i: seen.update({(i, "in"): args[0]}))
        block.register_forward_hook(see(i, "out"))
        block.get_submodule(attention).register_forward_hook(see(i, "attention"))
        block.get_submodule(mlp).register_forward_hook(see(i, "mlp"))
    for batch in batches:
        with torch.no_grad():
            model(**batch, use_cache=False)
        real = batch["attention_mask"].bool()
        for i in range(len(blocks)):
            start, middle, end = seen[i, "in"], seen[i, "in"] + seen[i, "attention"], seen[i, "out"]
            torch.testing.assert_close(middle + seen[i, "mlp"], end)
            add((i, "attention"), start, middle, real)
            add((i, "mlp"), middle, end, real)
            add((i, "block"), start, end, real)
    return {key: torch.cat(parts).mean().item() for key, parts in sums.items()}


def ranking(scores, kinds):
    return sorted((key for key in scores if key[1] in kinds), key=scores.get)


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def zero(model, sublayers):
    """The same model with the last map of each branch set to zero."""
    path, attention, mlp, *last = PATHS[model.config.model_type]
    model = copy.deepcopy(model)
    for block, kind in sublayers:
        name, final = (attention, last[0]) if kind == "attention" else (mlp, last[1])
        for parameter in model.get_submodule(f"{path}.{block}.{name}.{final}").parameters():
            nn.init.zeros_(parameter)
    return model


SCOPES = {"attention": {"attention"}, "mlp": {"mlp"}, "joint": {"attention", "mlp"}}


@pytest.mark.parametrize("model_type", PATHS)
@pytest.mark.parametrize("scope", SCOPES)
def test_drop_least_important_bypasses_the_lowest_scores(model_type, scope, tokens):
    model = build_model(model_type)
    scores = importances(model, make_batches())
    lowest = ranking(scores, SCOPES[scope])[:3]
    expected = logits(zero(model, lowest), tokens)
    plan = drop_sublayers(model, make_batches(), scope, count=3)
    assert [(s.block, s.kind) for s in plan] == lowest
    assert [drop.score for drop in plan.drops] == pytest.approx([scores[key] for key in lowest], rel=1e-4)
    assert (plan.scope, plan.metric) == (scope, "cosine")
    assert bypassed_sublayers(model) == tuple(sorted(plan))
    assert torch.equal(logits(model, tokens), expected)


def test_drop_of_block_scope_bypasses_the_least_important_blocks_whole(llama, tokens):
    scores = importances(llama, make_batches())
    lowest = ranking(scores, {"block"})[:2]
    both = [(block, kind) for block, _ in lowest for kind in ("attention", "mlp")]
    expected = logits(zero(llama, both), tokens)
    plan = drop_sublayers(llama, make_batches(), "block", ratio=0.5)
    assert [(s.block, s.kind) for s in plan] == both
    assert [drop.score for drop in plan.drops] == pytest.approx([scores[b, "block"] for b, _ in both], rel=1e-4)
    assert torch.equal(logits(llama, tokens), expected)


def test_drop_ratio_is_rounded_down_and_restore_undoes_the_drop(llama, tokens):
    dense = logits(llama, tokens)
    lowest = ranking(importances(llama, make_batches()), SCOPES["joint"])
    plan = drop_sublayers(llama, make_batches(), ratio=0.49)  # of 8
    assert [(s.block, s.kind) for s in plan] == lowest[:3]
    restore(llama)
    assert torch.equal(logits(llama, tokens), dense)


def test_drop_keeps_protected_blocks(llama):
    lowest = ranking(importances(llama, make_batches()), SCOPES["joint"])
    found = {(s.block, s.kind): s for s in find_sublayers(llama)}
    spared, block = found[lowest[0]], lowest[1][0]
    plan = drop_sublayers(llama, make_batches(), count=2, protect=[spared, block])
    assert [(s.block, s.kind) for s in plan] == [key for key in lowest[1:] if key[0] != block][:2]


def test_drop_uses_max_batches_and_the_given_metric(llama):
    passes = []
    llama.get_input_embeddings().register_forward_hook(lambda _m, args, _o: passes.append(tuple(args[0].shape)))
    plan = drop_sublayers(llama, make_batches(), count=1, metric="angular", max_batches=1)
    assert passes.count((2, 12)) == 1
    assert (3, 7) not in passes
    assert plan.metric == "angular"


def test_second_drop_ranks_the_sublayers_left(llama):
    first = drop_sublayers(llama, make_batches(), count=2)
    gone = [(s.block, s.kind) for s in first]
    left = importances(zero(build_model(), gone), make_batches())
    lowest = [key for key in ranking(left, SCOPES["joint"]) if key not in gone][:2]
    second = drop_sublayers(llama, make_batches(), count=2)
    assert [(s.block, s.kind) for s in second] == lowest
    assert bypassed_sublayers(llama) == tuple(sorted(first + second))


def test_drop_takes_one_of_two_transformers_by_name(llama):
    both = nn.ModuleDict({"student": llama, "teacher": build_model("gpt2")})
    with pytest.raises(AmbiguousModelError):
        drop_sublayers(both, make_batches(), count=1)
    plan = drop_sublayers(both, make_batches(), count=1, name="student")
    assert bypassed_sublayers(llama) == tuple(plan)
    assert bypassed_sublayers(both["teacher"]) == ()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"ratio": 1.2}, SelectionError),
        ({"ratio": 0.01}, SelectionError),
        ({"count": 9}, SelectionError),
        ({"count": 0}, SelectionError),
        ({}, SelectionError),
        ({"count": 1, "ratio": 0.5}, SelectionError),
        ({"scope": "layer", "count": 1}, SelectionError),
        ({"count": 1, "protect": [4]}, SelectionError),
        ({"count": 8, "protect": [0]}, SelectionError),
        ({"count": 1, "metric": "cosin"}, UnknownNameError),
        ({"count": 1, "batches": []}, CalibrationError),
        pytest.param({"count": 1, "batches": [{"labels": torch.ones(2, 3)}]}, CalibrationError, id="no input_ids"),
        ({"count": 1, "max_batches": 0}, CalibrationError),
    ],
)
def test_failed_drop_leaves_the_model_unchanged(llama, tokens, settings, error):
    earlier = find_sublayers(llama)[5:6]
    bypass(llama, earlier)
    llama.train()
    before, hooks = logits(llama, tokens), hooks_of(llama)
    settings = {"batches": make_batches(), **settings}
    with pytest.raises(error) as caught:
        drop_sublayers(llama, **settings)
    assert isinstance(caught.value, LayershedError)
    assert bypassed_sublayers(llama) == earlier
    assert torch.equal(logits(llama, tokens), before)
    assert all(module.training for module in llama.modules())
    assert hooks_of(llama) == hooks


def test_drop_refuses_a_model_that_gives_nan_and_leaves_it_unchanged(llama):
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(LayershedError):
        drop_sublayers(llama, make_batches(), count=1)
    assert bypassed_sublayers(llama) == ()


def test_drop_refuses_invalid_arguments_before_it_reads_data(llama):
    def stream():
        pytest.fail("a batch was read")
        yield

    with pytest.raises(SelectionError, match=r"ratio=1\.2"):
        drop_sublayers(llama, stream(), ratio=1.2)
    with pytest.raises(UnknownNameError, match="Did you mean 'cosine'"):
        drop_sublayers(llama, stream(), count=1, metric="cosin")
    with pytest.raises(CalibrationError, match="max_batches=-1: it must be at least 1"):
        drop_sublayers(llama, stream(), count=1, max_batches=-1)
    with pytest.raises(SelectionError, match="asked to drop 9, but there are only 8 candidates"):
        drop_sublayers(llama, stream(), count=9)
    with pytest.raises(SelectionError, match="no block 4"):
        drop_sublayers(llama, stream(), count=1, protect=[4])
    bypass(llama, find_sublayers(llama)[:2])
    with pytest.raises(SelectionError, match="asked to drop 4, but there are only 3 candidates"):
        drop_sublayers(llama, stream(), "block", count=4)


def test_returned_plan_reproduces_the_drop(llama, tokens):
    plan = drop_sublayers(llama, make_batches(), count=3)
    again = build_model()
    bypass(again, DropPlan.from_json(plan.to_json()))
    assert torch.equal(logits(again, tokens), logits(llama, tokens))
