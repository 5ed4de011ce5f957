"""Fitted maps against a weighted ridge regression on stored activations, and what is refused."""

import pytest
import torch

import layershed as ls
from layershed.compensation.normal_equations import NormalEquations, fitted_map
from layershed.errors import CompensationError
from tests.support.linear_maps import PLACES, model_and_inputs, places_of
from tests.support.models import build_model

RIDGE = 1e-2


def make_batches(number=6):
    generator = torch.Generator().manual_seed(5)
    batches = [{"input_ids": torch.randint(3, 97, (3, 9), generator=generator)} for _ in range(number)]
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    batches[1]["attention_mask"] = mask
    return batches


def stored(model, model_type, sublayer, batches):
    """h, b and 1 / |X + b|^2 of the real tokens, in float64, read by plain hooks."""
    before, read, write = places_of(model, model_type, sublayer)
    rows, seen = [], {}

    def note(name):
        return lambda _module, args, kwargs: seen.update({name: args[0] if args else kwargs["hidden_states"]})

    hooks = [
        before.register_forward_pre_hook(note("x"), with_kwargs=True),
        read.register_forward_pre_hook(note("h"), with_kwargs=True),
        write.register_forward_hook(lambda _m, _a, out: seen.update(b=out[0] if isinstance(out, tuple) else out)),
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
            ids = batch.get("input_ids", seen["x"][..., 0])
            real = batch.get("attention_mask", torch.ones_like(ids)).bool()
            rows.append([seen[name].view(*real.shape, -1)[real].double() for name in "hxb"])
    for hook in hooks:
        hook.remove()
    h, x, b = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return h, b, 1 / (x + b).square().sum(-1)


def ridge_regression(h, b, weights):
    """W and c by the normal equations of centred, weighted data."""
    weights = weights / weights.sum()
    mean_h, mean_b = weights @ h, weights @ b
    root = weights.sqrt().unsqueeze(-1)
    left, right = root * (h - mean_h), root * (b - mean_b)
    strength = RIDGE * left.square().sum(0).mean()
    # ridge as more rows of data, solved by another routine
    rows = torch.cat([left, strength.sqrt() * torch.eye(h.shape[1], dtype=h.dtype)])
    targets = torch.cat([right, torch.zeros(h.shape[1], b.shape[1], dtype=h.dtype)])
    weight = torch.linalg.lstsq(rows, targets).solution.T
    return weight, mean_b - weight @ mean_h


def test_a_refit_reads_h_where_the_maps_run():
    model, batches = build_model("llama"), make_batches()
    sublayers = ls.find_sublayers(model)[2:5]
    first = ls.fit_linear_maps(model, batches, sublayers, refits=0)
    found = ls.fit_linear_maps(model, batches, sublayers, refits=1)
    dense = {s: stored(model, "llama", s, batches) for s in sublayers}
    ls.bypass(model, sublayers, maps=first)
    for sublayer in sublayers:
        h, _, _ = stored(model, "llama", sublayer, batches)
        weight, _ = ridge_regression(h, *dense[sublayer][1:])
        torch.testing.assert_close(found[sublayer].up.weight.double(), weight, rtol=1e-4, atol=1e-5)


def test_fitting_changes_nothing_in_the_model():
    model, batches = build_model("llama"), make_batches()
    sublayers = ls.find_sublayers(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    ls.bypass(model, sublayers[:1])
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    ls.fit_linear_maps(model, batches, sublayers[:4])
    assert model.training
    assert ls.dropped_sublayers(model) == sublayers[:1]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    ls.restore(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_sublayer_that_is_linear_is_replaced_exactly():
    model, batches = build_model("opt", num_hidden_layers=2, ffn_dim=48, word_embed_proj_dim=32), make_batches(24)
    sublayer = next(s for s in ls.find_sublayers(model) if s.kind == "mlp")
    layer = model.get_submodule(sublayer.path.rpartition(".")[0])
    layer.activation_fn = torch.nn.Identity()
    ids = batches[0]["input_ids"]
    with torch.no_grad():
        dense = model(ids).logits
        maps = ls.fit_linear_maps(model, batches, [sublayer], ridge=1e-9)
        ls.bypass(model, [sublayer], maps=maps)
        torch.testing.assert_close(model(ids).logits, dense, rtol=1e-3, atol=1e-3)
    assert maps.residual[sublayer] < 1e-6


@pytest.mark.parametrize("model_type", PLACES)
@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_maps_of_every_topology_are_that_regression(model_type, kind):
    model, inputs = model_and_inputs(model_type)
    sublayer = next(s for s in ls.find_sublayers(model) if s.block == 1 and s.kind == kind)
    generator = torch.Generator().manual_seed(7)
    images = [{"pixel_values": torch.randn(4, 3, 32, 32, generator=generator)} for _ in range(6)]
    batches = images if "pixel_values" in inputs else make_batches()
    maps = ls.fit_linear_maps(model, batches, [sublayer], refits=0)
    weight, bias = ridge_regression(*stored(model, model_type, sublayer, batches))
    torch.testing.assert_close(maps[sublayer].up.weight.double(), weight, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(maps[sublayer].up.bias.double(), bias, rtol=1e-3, atol=1e-5)


def test_a_map_makes_up_for_the_mlp_that_is_bypassed_after_it():
    model, batches = build_model("llama"), make_batches()
    attention, mlp = ls.find_sublayers(model)[2:4]
    plan = ls.DropPlan((ls.Drop(attention), ls.Drop(mlp))).with_action("linear", [attention])
    maps = ls.fit_linear_maps(model, batches, plan, refits=0)
    h, b, weights = stored(model, "llama", attention, batches)
    _, other, _ = stored(model, "llama", mlp, batches)
    weight, bias = ridge_regression(h, b + other, weights)
    assert list(maps) == [attention]
    torch.testing.assert_close(maps[attention].up.weight.double(), weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(maps[attention].up.bias.double(), bias, rtol=1e-4, atol=1e-5)


def test_a_low_rank_map_is_reduced_rank_regression():
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(400, 6, generator=generator, dtype=torch.float64)
    b = h @ torch.randn(6, 6, generator=generator, dtype=torch.float64) + torch.randn(400, 6, generator=generator)
    sums = NormalEquations(6, 6, torch.device("cpu"))
    sums.add(h, b, torch.ones(400))
    found = fitted_map(sums, 1e-9, 2)
    # the fit of full rank, projected on the leading right singular vectors of its predictions
    centred = h - h.mean(0)
    full = torch.linalg.lstsq(centred, b - b.mean(0)).solution
    _, _, right = torch.linalg.svd(centred @ full)
    expected = full @ right[:2].T @ right[:2]
    torch.testing.assert_close((found.up.weight @ found.down.weight).double().T, expected, rtol=1e-3, atol=1e-4)
    assert found.rank == 2


def test_the_residual_is_measured_on_batches_that_the_map_does_not_know():
    model, batches = build_model("llama"), make_batches(8)
    sublayer = ls.find_sublayers(model)[2]
    maps = ls.fit_linear_maps(model, batches, [sublayer], refits=0)
    known = [batch for place, batch in enumerate(batches) if place % 4 != 3]
    weight, bias = ridge_regression(*stored(model, "llama", sublayer, known))
    h, b, weights = stored(model, "llama", sublayer, [batches[3], batches[7]])
    missed = weights @ (h @ weight.T + bias - b).square().sum(-1)
    energy = weights @ (b - (weights @ b) / weights.sum()).square().sum(-1)
    assert maps.residual[sublayer] == pytest.approx(float(missed / energy), rel=1e-4)


@pytest.mark.parametrize(("options", "says"), [({"rank": 0}, "must be positive"), ({"refits": -1}, "at least 0")])
def test_arguments_out_of_range_are_refused(options, says):
    model = build_model("llama")
    with pytest.raises(CompensationError, match=says):
        ls.fit_linear_maps(model, make_batches(), ls.find_sublayers(model)[:1], **options)


def test_no_batch_is_an_error():
    model = build_model("llama")
    with pytest.raises(CompensationError, match="ran in no batch"):
        ls.fit_linear_maps(model, [], ls.find_sublayers(model)[:1])
