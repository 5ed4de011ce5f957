"""Linear maps in place of sublayers: what runs, what is refused, and that nothing loses a map."""

import copy
import io

import pytest
import torch
from transformers import AutoModelForCausalLM

import layershed as ls
from layershed.errors import PlanError, RevivedSublayerError
from layershed.performance.model_size import weight_sizes
from layershed.saving.checkpoint import apply_structure, write_structure
from layershed.stand_ins.linear_map import LinearMap
from tests.support.linear_maps import IDS, PLACES, hooked, model_and_inputs, random_maps
from tests.support.models import build_model


def some_of(sublayers):
    """An attention, an MLP, and a whole block."""
    return [s for s in sublayers if (s.block, s.kind) in {(0, "attention"), (1, "mlp"), (2, "attention"), (2, "mlp")}]


def llama_with_maps(rank=None):
    model = build_model("llama")
    maps = random_maps(some_of(ls.find_sublayers(model)), 32, rank)
    ls.bypass(model, maps, maps=maps)
    return model, maps


@pytest.mark.parametrize("model_type", PLACES)
def test_a_map_gives_what_hooks_on_the_dense_model_give(model_type):
    model, inputs = model_and_inputs(model_type)
    maps = random_maps(some_of(ls.find_sublayers(model)), 32)
    with torch.no_grad():
        dense = model(**inputs).logits
        with hooked(model, model_type, maps):
            expected = model(**inputs).logits
        ls.bypass(model, maps, maps=maps)
        found = model(**inputs).logits
    assert (expected - dense).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert ls.linear_maps(model) == maps
    assert ls.dropped_sublayers(model) == tuple(sorted(maps))


def test_a_map_and_a_deletion_in_one_model():
    model = build_model("llama")
    attention, mlp = ls.find_sublayers(model)[2:4]
    maps = random_maps([attention], 32)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.get_submodule(mlp.path).down_proj.weight.zero_()
        with hooked(reference, "llama", maps):
            expected = reference(IDS).logits
        ls.bypass(model, [attention, mlp], maps=maps)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_parallel_block_keeps_the_shared_norm_for_the_map():
    model = build_model("phi")
    attention, mlp = ls.find_sublayers(model)[2:4]
    maps = random_maps([attention], 32)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.get_submodule(mlp.path).fc2.weight.zero_()
        reference.get_submodule(mlp.path).fc2.bias.zero_()
        with hooked(reference, "phi", maps):
            expected = reference(IDS).logits
        ls.bypass(model, [attention, mlp], maps=maps)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [None, 3])
def test_restore_gives_the_dense_model_bit_for_bit(rank):
    dense = build_model("llama")
    model, _ = llama_with_maps(rank)
    with torch.no_grad():
        replaced = model(IDS).logits
        with ls.dense(model):
            assert torch.equal(model(IDS).logits, dense(IDS).logits)
        assert torch.equal(model(IDS).logits, replaced)
    ls.restore(model)
    assert model.state_dict().keys() == dense.state_dict().keys()
    assert all(map(torch.equal, model.state_dict().values(), dense.state_dict().values()))
    assert ls.linear_maps(model) == {}


def test_restoring_one_sublayer_keeps_the_maps_of_the_others():
    model, maps = llama_with_maps()
    first, *others = maps
    ls.restore(model, [first])
    assert ls.linear_maps(model) == {s: maps[s] for s in others}


def test_a_second_bypass_keeps_the_maps_of_the_first():
    model, maps = llama_with_maps()
    ls.bypass(model, [ls.find_sublayers(model)[-1]])
    assert ls.linear_maps(model) == maps


def test_cached_generation_equals_uncached_generation():
    model, _ = llama_with_maps()
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.generate(IDS, **options), model.generate(IDS, use_cache=False, **options))


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("removed", [False, True])
def test_a_saved_folder_gives_the_same_logits_with_and_without_layershed(tmp_path, rank, removed):
    model, maps = llama_with_maps(rank)
    with torch.no_grad():
        expected = model(IDS).logits
    if removed:
        ls.remove(model)
        assert torch.equal(model(IDS).logits, expected)
        assert ls.find_sublayers(model) == tuple(s for s in ls.find_sublayers(build_model()) if s not in maps)
    ls.save_pretrained(model, tmp_path / "folder", standalone=True)
    with torch.no_grad():
        loaded = ls.load_pretrained(tmp_path / "folder")
        assert torch.equal(loaded(IDS).logits, expected)
        assert {s: m.rank for s, m in ls.linear_maps(loaded).items()} == dict.fromkeys(maps, rank)
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", trust_remote_code=True)
        assert torch.equal(alone(IDS).logits, expected)


def test_a_folder_that_transformers_saved_gives_the_same_logits(tmp_path):
    model, _ = llama_with_maps()
    model.save_pretrained(tmp_path)
    assert torch.equal(ls.load_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("before", ["dense", "deleted", "replaced"])
def test_a_checkpoint_brings_a_model_to_its_maps(before):
    model, maps = llama_with_maps(rank=3)
    checkpoint = {"state_dict": model.state_dict()}
    write_structure(checkpoint, model)
    stream = io.BytesIO()
    torch.save(checkpoint, stream)
    stream.seek(0)
    checkpoint = torch.load(stream, weights_only=True)
    fresh = build_model("llama")
    if before == "deleted":
        ls.bypass(fresh, maps)
    if before == "replaced":
        ls.bypass(fresh, maps, maps=random_maps(maps, 32))
    apply_structure(checkpoint, fresh)
    fresh.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)


def test_a_checkpoint_of_deleted_sublayers_takes_maps_away():
    model, maps = llama_with_maps()
    deleted = build_model("llama")
    ls.bypass(deleted, maps)
    checkpoint = {"state_dict": deleted.state_dict()}
    write_structure(checkpoint, deleted)
    apply_structure(checkpoint, model)
    model.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(model(IDS).logits, deleted(IDS).logits)


def test_gradients_reach_the_map_and_no_hidden_weight():
    model, maps = llama_with_maps()
    model(IDS).logits.sum().backward()
    for sublayer, linear_map in maps.items():
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in linear_map.parameters())
        hidden = [p for n, p in model.get_submodule(sublayer.path).named_parameters() if "linear_stand_in" not in n]
        assert hidden
        assert not any(p.requires_grad for p in hidden)


def test_a_stand_in_that_others_take_off_comes_back_with_its_map():
    model, maps = llama_with_maps()
    expected = model(IDS).logits
    del model.get_submodule(next(iter(maps)).path).forward
    assert torch.equal(model(IDS).logits, expected)


def test_a_map_lost_with_its_block_is_an_error():
    model, _ = llama_with_maps()
    model.model.layers[2] = copy.deepcopy(build_model("llama").model.layers[2])
    with pytest.raises(RevivedSublayerError, match=r"attention\.2, mlp\.2: replaced by a linear map"):
        ls.dropped_sublayers(model)


def test_a_copy_has_maps_of_its_own():
    model, maps = llama_with_maps()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for linear_map in maps.values():
            linear_map.up.bias.add_(1)
    assert (twin(IDS).logits - model(IDS).logits).abs().max() > 1e-3


def test_a_compiled_model_runs_the_maps():
    model, _ = llama_with_maps()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits)


def test_the_weights_that_count_are_those_of_the_map():
    model = build_model("llama")
    sublayer = ls.find_sublayers(model)[0]
    dense = sum(p.numel() for p in model.parameters())
    own = sum(p.numel() for p in model.get_submodule(sublayer.path).parameters())
    ls.bypass(model, [sublayer], maps=random_maps([sublayer], 32, rank=3))
    assert weight_sizes(model).parameters == dense - own + 7 * 32
    assert weight_sizes(model, lifted=True).parameters == dense


@pytest.mark.parametrize("removed", [False, True])
def test_the_theory_counts_the_map_and_not_what_it_replaces(removed):
    model = build_model("llama")
    sublayer = ls.find_sublayers(model)[1]
    settings = {"batch_size": 1, "tokens": 5}
    costs = ls.CostModel(model).of_pass(**settings)
    own = sum(cost.flops for s, cost in costs.sublayers.items() if s != sublayer) + costs.rest.flops
    ls.bypass(model, [sublayer], maps=random_maps([sublayer], 32, rank=3))
    if removed:
        ls.remove(model)
    found = ls.CostModel(model).of_pass(**settings).without([sublayer])
    assert sum(cost.flops for cost in found) == own + 2 * 5 * (2 * 3 * 32)


def test_a_plan_with_linear_actions_needs_maps():
    model = build_model("llama")
    sublayer, other = ls.find_sublayers(model)[:2]
    plan = ls.DropPlan((ls.Drop(sublayer), ls.Drop(other))).with_action("linear", [other])
    with pytest.raises(PlanError, match=r"replaces mlp\.0 by linear maps, but no maps are given"):
        ls.bypass(model, plan)
    assert ls.dropped_sublayers(model) == ()
    ls.bypass(model, plan, maps=random_maps([other], 32))
    assert list(ls.linear_maps(model)) == [other]


def test_a_map_of_another_width_is_refused_before_the_model_changes():
    model = build_model("llama")
    sublayer = ls.find_sublayers(model)[0]
    with pytest.raises(PlanError, match=r"map of attention\.0 has width 16, .* width 32"):
        ls.bypass(model, [sublayer], maps={sublayer: LinearMap(16)})
    assert ls.dropped_sublayers(model) == ()


def test_a_plan_keeps_its_actions_in_a_file():
    sublayers = ls.find_sublayers(build_model("llama"))
    plan = ls.DropPlan(tuple(map(ls.Drop, sublayers[:3]))).with_action("linear", sublayers[:1], rank=4)
    assert ls.DropPlan.from_json(plan.to_json()) == plan
    assert "attention.0, linear of rank 4" in str(plan)


def test_half_precision_takes_the_maps_along():
    model = build_model("llama").bfloat16()
    maps = random_maps(ls.find_sublayers(model)[:1], 32)
    ls.bypass(model, maps, maps=maps)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(model(IDS).logits).all()


def test_removing_by_a_plan_with_linear_actions_needs_the_maps():
    model = build_model("llama")
    sublayer = ls.find_sublayers(model)[0]
    plan = ls.DropPlan((ls.Drop(sublayer, action="linear"),))
    with pytest.raises(PlanError, match="no maps are given"):
        ls.remove(model, plan)
    ls.bypass(model, plan, maps=random_maps([sublayer], 32))
    ls.remove(model, plan)
    assert list(ls.linear_maps(model)) == [sublayer]


def test_the_plan_beside_saved_weights_says_what_runs(tmp_path):
    model, maps = llama_with_maps(rank=3)
    plan = ls.DropPlan(tuple(map(ls.Drop, maps)))
    ls.save_pretrained(model, tmp_path / "folder", plan=plan)
    assert {(d.action, d.rank) for d in ls.load_plan(tmp_path / "folder").drops} == {("linear", 3)}


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_a_quantized_model_runs_quantized_maps_and_saves_them(tmp_path, mode):
    model, maps = llama_with_maps()
    with torch.no_grad():
        whole = model(IDS).logits
        ls.quantize(model, mode)
        quantized = model(IDS).logits
        assert 0 < (quantized - whole).abs().max() < 0.5 * whole.abs().max()
        ls.save_pretrained(model, tmp_path / "folder")
        loaded = ls.load_pretrained(tmp_path / "folder")
        torch.testing.assert_close(loaded(IDS).logits, quantized)
        ls.dequantize(loaded)
    assert set(ls.linear_maps(loaded)) == set(maps)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_maps_survive_peft_that_replaces_the_module_that_holds_them():
    from peft import LoraConfig, get_peft_model

    model = build_model("opt", ffn_dim=48, word_embed_proj_dim=32)
    peft = get_peft_model(model, LoraConfig(target_modules=["fc1", "fc2"], init_lora_weights=False))
    mlp = next(s for s in ls.find_sublayers(model) if s.kind == "mlp")
    maps = random_maps([mlp], 32)
    ls.bypass(model, [mlp], maps=maps)
    expected = model(IDS).logits
    merged = peft.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert ls.linear_maps(merged) == maps
