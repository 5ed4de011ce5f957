"""Folding against a regression on streams that plain hooks read; what it leaves alone; refusals."""

import copy

import pytest
import torch

import layershed as ls
from layershed.compensation import fold
from layershed.errors import CompensationError
from tests.support.models import build_model

WRITERS = {
    "llama": {"attention": "o_proj", "mlp": "down_proj"},
    "gpt2": {"attention": "c_proj", "mlp": "c_proj"},
    "opt": {"attention": "out_proj", "mlp": ""},
}


def make_batches(number=8, rows=4, tokens=24):
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(3, 97, (rows, tokens), generator=generator)} for _ in range(number)]


def hidden_after(model, block, batches):
    """The stream behind a block, in float64, batch by batch."""
    with torch.no_grad():
        return [model(**batch, output_hidden_states=True).hidden_states[block + 1].double() for batch in batches]


def distance(model, dense, block, batches):
    pairs = zip(hidden_after(model, block, batches), hidden_after(dense, block, batches), strict=True)
    return sum(float(((a - b).square().sum(-1) / b.square().sum(-1)).sum()) for a, b in pairs)


@pytest.mark.parametrize("model_type", WRITERS)
def test_folding_brings_the_stream_nearer_on_text_that_it_did_not_see(model_type):
    dense = build_model(model_type, **({"ffn_dim": 48} if model_type == "opt" else {}))
    model = copy.deepcopy(dense)
    batches = make_batches(9)
    gone = ls.find_sublayers(model)[1:3]
    ls.bypass(model, gone)
    unseen = batches[8:]
    before = distance(model, dense, 2, unseen)
    folds = ls.compensate(model, batches[:8])
    assert folds
    assert all(each.sublayer > min(gone) and each.sublayer not in gone and 0 <= each.left < 1 for each in folds)
    assert distance(model, dense, 2, unseen) < before
    assert ls.dropped_sublayers(model) == gone


def test_the_first_fold_is_a_ridge_regression_on_both_streams():
    dense = build_model("llama")
    model = copy.deepcopy(dense)
    batches = make_batches(8)
    attention, mlp = ls.find_sublayers(model)[2:4]
    ls.bypass(model, [attention])
    dropped = copy.deepcopy(model)
    folds = ls.compensate(model, batches)
    assert folds[0].sublayer == mlp
    # the input of down_proj in the dropped model, and the streams behind block 1
    rows = []
    hook = dropped.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda _m, args: rows.append(args[0].double())
    )
    left, right = hidden_after(dropped, 1, batches), hidden_after(dense, 1, batches)
    hook.remove()
    known = [place for place in range(8) if place % 4 != 3]
    a = torch.cat([rows[place].flatten(0, 1) for place in known])
    target = torch.cat([right[place].flatten(0, 1) for place in known])
    difference = target - torch.cat([left[place].flatten(0, 1) for place in known])
    weights = 1 / target.square().sum(-1)
    root = (weights / weights.sum()).sqrt().unsqueeze(-1)
    strength = folds[0].strength * (root * a).square().sum(0).mean()
    ridge = torch.cat([root * a, strength.sqrt() * torch.eye(a.shape[1], dtype=a.dtype)])
    change = torch.linalg.lstsq(
        ridge, torch.cat([root * difference, torch.zeros(a.shape[1], 32, dtype=a.dtype)])
    ).solution.T
    found = model.model.layers[1].mlp.down_proj.weight - dropped.model.layers[1].mlp.down_proj.weight
    torch.testing.assert_close(found.double(), change, rtol=1e-3, atol=1e-5)


def test_the_dense_stream_is_that_of_the_weights_before(monkeypatch):
    """Also behind sublayers whose weights were folded before, in the same block and in earlier ones."""
    dense = build_model("llama")
    batches = make_batches(4)
    gone = ls.find_sublayers(dense)[:1]
    model = copy.deepcopy(dense)
    ls.bypass(model, gone)
    aims = []
    ends = fold._Folding._ends

    def noted(self, stream, place, branch):
        found = ends(self, stream, place, branch)
        aims.append((branch.sublayer, found))
        return found

    monkeypatch.setattr(fold._Folding, "_ends", noted)
    monkeypatch.setattr(fold, "_LEAST", 100)  # fold everywhere
    folds = ls.compensate(model, batches)
    assert len(folds) > 2
    for sublayer, found in aims:
        if sublayer.kind == "mlp":
            expected = [own.flatten(0, 1) for own in hidden_after(dense, sublayer.block, batches)]
            if sublayer.block < 3:  # behind the last block transformers gives the stream after its norm
                torch.testing.assert_close(torch.cat(found), torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_what_lies_before_the_drop_and_what_is_quantized_stays():
    model = build_model("llama")
    last = ls.find_sublayers(model)[5]
    ls.bypass(model, [last])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folds = ls.compensate(model, make_batches(4))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[2] for name in changed} <= {"3"}
    assert len(changed) == len(folds)
    quantized = build_model("llama")
    ls.bypass(quantized, ls.find_sublayers(quantized)[:1])
    ls.quantize(quantized, "nf4")
    assert ls.compensate(quantized, make_batches(4)) == ()


def test_what_cannot_be_compensated_is_refused():
    model = build_model("llama")
    with pytest.raises(CompensationError, match="nothing is bypassed"):
        ls.compensate(model, make_batches(4))
    ls.bypass(model, ls.find_sublayers(model)[:1])
    with pytest.raises(CompensationError, match="3 batches are too few"):
        ls.compensate(model, make_batches(3))


def test_a_stream_that_overflows_changes_no_weight():
    model = build_model("llama")
    ls.bypass(model, ls.find_sublayers(model)[:1])
    last = model.model.layers[3].mlp.down_proj.weight.clone()

    def overflow(_module, args):
        if ls.bypassed_sublayers(model):  # in the dropped stream alone
            return (args[0] * torch.inf,)
        return None

    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(overflow)
    folds = ls.compensate(model, make_batches(4))
    hook.remove()
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert not [each for each in folds if each.sublayer.block >= 1 and each.sublayer.kind == "mlp"]
    assert torch.equal(model.model.layers[3].mlp.down_proj.weight, last)


def test_batches_of_padding_alone_change_no_weight():
    model = build_model("llama")
    ls.bypass(model, ls.find_sublayers(model)[:1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = make_batches(4)
    for place, batch in enumerate(batches):
        batch["attention_mask"] = torch.full_like(batch["input_ids"], int(place == 3))
    assert ls.compensate(model, batches) == ()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
