"""A plan for another model is refused where plan and model meet, and all that make plans record their model."""

import copy
import json

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import layershed as ls
from layershed.callbacks import SublayerDrop
from layershed.cli.plan import _planned as planned
from layershed.discovery.model_record import model_record
from layershed.errors import CheckpointError, PlanError
from layershed.planning.plan import Drop, DropPlan
from layershed.saving.load_model import build_model as build_or_load
from tests.support.models import SIZES, build_model, some
from tests.support.runs import Foreign, fit_foreign, val_loader

FOUR = "LlamaForCausalLM with 4 blocks (attention: 0-3; mlp: 0-3)"
BOTH = r"was made for LlamaForCausalLM with 4 blocks \(attention: 0-3; mlp: 0-3\), but this model is LlamaForCausalLM "
BOTH += r"with 6 blocks \(attention: 0-5; mlp: 0-5\)"


@pytest.fixture
def plan(llama, tokens):
    scores = ls.estimate_importance(llama, [tokens])
    return ls.select_sublayers(scores, count=3)


@pytest.fixture
def six():
    return build_model(num_hidden_layers=6)


@pytest.mark.parametrize("act", [ls.bypass, ls.remove])
def test_plan_of_four_blocks_is_refused_by_six_and_taken_with_a_warning_if_not_strict(plan, six, act):
    before = copy.deepcopy(six.state_dict())
    with pytest.raises(PlanError, match=BOTH):
        act(six, plan)
    assert ls.dropped_sublayers(six) == ()
    assert six.state_dict().keys() == before.keys()
    with pytest.warns(UserWarning, match=BOTH):
        act(six, plan, strict=False)
    assert ls.dropped_sublayers(six) == tuple(sorted(plan))


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [("mistral", {}), ("qwen3", {}), ("llama", {"num_hidden_layers": 5}), ("llama", {"num_hidden_layers": 3})],
)
def test_plan_is_refused_by_another_class_and_by_another_size(plan, model_type, overrides):
    other = build_model(model_type, **overrides)
    few = DropPlan(plan.drops[:1], model=plan.model)
    with pytest.raises(PlanError, match=f"but this model is {type(other).__name__} with "):
        ls.bypass(other, few)


def test_same_class_and_size_with_other_kinds_of_sublayers_is_refused(llama, plan):
    """As of a hybrid whose attention is in other blocks."""
    ls.remove(llama, [s for s in ls.find_sublayers(llama) if s.block == 3])
    assert str(model_record(llama)) == FOUR  # removed sublayers count
    fewer = DropPlan(plan.drops, model=ls.ModelRecord("LlamaForCausalLM", 4, "attention: 0-2; mlp: 0-3"))
    with pytest.raises(PlanError, match=r"attention: 0-2; mlp: 0-3\), but this model"):
        ls.bypass(llama, fewer)


def test_plan_without_a_record_and_plain_sublayers_are_taken_as_before(plan, six):
    ls.bypass(six, DropPlan(plan.drops))
    ls.restore(six)
    ls.bypass(six, list(plan))
    assert ls.dropped_sublayers(six) == tuple(sorted(plan))


def test_record_is_the_same_dense_dropped_removed_adapted_and_on_the_meta_device(llama, tmp_path):
    assert str(model_record(llama)) == FOUR
    ls.bypass(llama, some(llama))
    assert str(model_record(llama)) == FOUR
    ls.save_pretrained(llama, tmp_path / "saved", plan=DropPlan(tuple(map(Drop, some(llama)))))
    assert str(ls.load_plan(tmp_path / "saved").model) == FOUR
    assert str(model_record(ls.load_pretrained(tmp_path / "saved"))) == FOUR
    with torch.device("meta"):
        assert str(model_record(build_or_load(str(tmp_path / "saved")))) == FOUR
        assert str(model_record(build_or_load(config={"model_type": "llama", **SIZES}))) == FOUR
    ls.inject_lora(llama)
    assert str(model_record(llama)) == FOUR
    ls.remove_lora(llama)
    ls.remove(llama, [s for s in ls.find_sublayers(llama) if s.block == 3])
    assert str(model_record(llama)) == FOUR
    assert str(model_record(copy.deepcopy(llama))) == FOUR


def test_subclass_takes_the_plan_of_its_base(llama, plan):
    class Tuned(type(llama)):
        pass

    llama.__class__ = Tuned
    ls.bypass(llama, plan)
    assert ls.dropped_sublayers(llama) == tuple(sorted(plan))


def test_drop_sublayers_and_saved_folders_record_their_model(llama, tokens, tmp_path, six):
    plan = ls.drop_sublayers(llama, [tokens], count=2)
    assert str(plan.model) == FOUR
    ls.save_pretrained(llama, tmp_path / "saved", plan=plan)
    with pytest.raises(PlanError, match=BOTH):
        ls.bypass(six, ls.load_plan(tmp_path / "saved"))
    ls.bypass(six, list(plan))
    with pytest.raises(PlanError, match=f"save_pretrained: .*{BOTH}"):
        ls.save_pretrained(six, tmp_path / "six", plan=plan)
    assert not (tmp_path / "six").exists()


def test_adapter_records_its_base_and_is_refused_by_another(llama, six, tmp_path):
    names = {s.name for s in some(llama)}
    for model in (llama, six):
        ls.bypass(model, [s for s in ls.find_sublayers(model) if s.name in names])
    ls.inject_lora(llama)
    ls.save_adapter(llama, tmp_path / "adapter")
    with pytest.raises(PlanError, match=f"load_adapter: .*{BOTH}"):
        ls.load_adapter(six, tmp_path / "adapter")


def test_checkpoint_of_four_blocks_is_refused_by_six(make_trainer, tmp_path):
    drop, saving = SublayerDrop(2, count=2, quality_batches=0), ModelCheckpoint(tmp_path, every_n_train_steps=4)
    fit_foreign(make_trainer(drop, saving, enable_checkpointing=True, max_steps=4))
    assert str(drop.plan.model) == FOUR
    written = json.loads((tmp_path / "run" / "drop_plan.json").read_text())
    assert written["model"]["blocks"] == 4
    with pytest.raises(CheckpointError, match=BOTH):
        ls.load_checkpoint(Foreign(num_hidden_layers=6), saving.best_model_path)
    resumed = make_trainer(SublayerDrop(2, count=2, quality_batches=0), name="resumed", max_steps=6)
    with pytest.raises(CheckpointError, match=BOTH):
        resumed.fit(Foreign(num_hidden_layers=6), val_loader(), val_loader(), ckpt_path=saving.best_model_path)


def test_rounds_of_an_iterative_drop_keep_the_record(make_trainer):
    drop = SublayerDrop(2, count=1, every_n_steps=2, rounds=2, quality_batches=0)
    fit_foreign(make_trainer(drop, max_steps=6))
    assert len(drop.plan) == 2
    assert str(drop.plan.model) == FOUR


def test_bypass_by_hand_is_recorded_in_a_checkpoint(make_trainer, tmp_path):
    module = Foreign()
    ls.bypass(module, some(module.net))
    trainer = make_trainer(ls.callbacks.ExactResume(), max_steps=1)
    fit_foreign(trainer, module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    noted = torch.load(tmp_path / "a.ckpt", weights_only=True)["layershed"]["dropped"]
    assert DropPlan.from_dict(noted).model == model_record(module.net)


def test_plan_command_refuses_a_plan_of_another_model(plan, six, tmp_path):
    plan.save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match=BOTH):
        planned(six, "joint", None, None, str(tmp_path / "plan.json"))
    assert planned(build_model(), "joint", None, None, str(tmp_path / "plan.json")) == plan
