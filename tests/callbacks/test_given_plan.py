"""SublayerDrop with a given plan: dropped at its step, checked before training, the same in a resumed run."""

import inspect

import pytest
import torch

import layershed as ls
from layershed.callbacks import ExactResume, SublayerDrop
from layershed.errors import LayershedError, PlanError, SelectionError
from layershed.importance.tracker import ImportanceTracker
from layershed.performance.stopwatch import SpeedSettings
from tests.support.models import build_model
from tests.support.runs import (
    Foreign,
    HandRun,
    Interrupt,
    Interrupted,
    Save,
    fit_foreign,
    loader,
    same,
    state_of,
)


def plan_of(model, *places):
    found = {(sublayer.block, sublayer.kind): sublayer for sublayer in ls.find_sublayers(model)}
    scores = dict.fromkeys(found.values(), 1.0)
    scores.update({found[place]: number / 100 for number, place in enumerate(places)})
    record = ls.estimate_importance(model, [torch.arange(6)[None]]).model
    plan = ls.select_sublayers(scores, "joint", count=len(places))
    return ls.DropPlan(plan.drops, plan.scope, "cosine", record)


@pytest.fixture
def given(tmp_path):
    """Three sublayers that no importance would choose first."""
    path = tmp_path / "given.json"
    plan_of(build_model(), (2, "mlp"), (0, "attention"), (3, "mlp")).save(path)
    return path


def test_given_plan_is_dropped_at_the_start_without_scoring(make_trainer, tmp_path, given, monkeypatch):
    monkeypatch.setattr(ImportanceTracker, "__init__", lambda *_, **__: pytest.fail("importance was measured"))
    drop = SublayerDrop(5, plan=str(given))
    module = fit_foreign(make_trainer(drop, max_steps=8))
    plan = ls.DropPlan.load(given)
    assert [entry.sublayer for entry in drop.plan.drops] == [entry.sublayer for entry in plan.drops]
    assert [entry.score for entry in drop.plan.drops] == [entry.score for entry in plan.drops]
    assert {entry.step for entry in drop.plan.drops} == {5}
    assert ls.dropped_sublayers(module) == tuple(sorted(plan))
    assert tuple(ls.DropPlan.load(tmp_path / "run" / "drop_plan.json")) == tuple(plan)


def test_run_with_a_given_plan_equals_training_with_zeroed_branches(make_trainer, given):
    module = fit_foreign(make_trainer(SublayerDrop(3, plan=given), max_steps=6))
    hand = HandRun()
    for step in hand.train(loader()):
        if step == 3:
            hand.drop([(2, "mlp"), (0, "attention"), (3, "mlp")])
    weights = dict(hand.module.named_parameters())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter, weights[name], msg=name)


def test_plan_that_a_run_has_written_gives_the_same_run(make_trainer, tmp_path):
    first = fit_foreign(make_trainer(SublayerDrop(4, count=3), max_steps=7, name="first"))
    again = SublayerDrop(4, plan=tmp_path / "first" / "drop_plan.json")
    second = fit_foreign(make_trainer(again, max_steps=7, name="second"))
    assert same(first.state_dict(), second.state_dict())
    assert ls.dropped_sublayers(first) == ls.dropped_sublayers(second)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("at", [2, 5])
def test_resumed_run_with_a_given_plan_equals_the_uninterrupted_one(make_trainer, tmp_path, text_data, given, at):
    """Cut before and after the drop; after it, the file is needed no longer."""

    def run(name, *more, ckpt_path=None):
        drop = SublayerDrop(3, plan=given)
        trainer = make_trainer(ExactResume(), drop, *more, name=name, max_steps=6)
        module = Foreign(vocab_size=259)
        torch.manual_seed(7)
        trainer.fit(module, datamodule=text_data(), ckpt_path=ckpt_path)
        return state_of(trainer, module), drop.plan

    whole = run("whole")
    cut = tmp_path / "cut.ckpt"
    with pytest.raises(Interrupted):
        run("cut", Save(cut, at), Interrupt(at))
    if at > 3:
        given.unlink()
    resumed = run("resumed", ckpt_path=cut)
    assert same(whole[0]["weights"], resumed[0]["weights"])
    assert resumed[1] == whole[1]


def refused(make_trainer, match, error=LayershedError, **arguments):
    steps = []

    class Watched(Foreign):
        def training_step(self, batch, batch_idx):
            steps.append(batch_idx)
            return super().training_step(batch, batch_idx)

    with pytest.raises(error, match=match):
        fit_foreign(make_trainer(SublayerDrop(2, **arguments), max_steps=4), arguments.pop("module", None) or Watched())
    assert steps == []


def test_plan_for_another_model_is_refused_before_training(make_trainer, tmp_path, given):
    other = tmp_path / "other.json"
    plan_of(build_model(num_hidden_layers=6), (5, "mlp")).save(other)
    refused(make_trainer, "with 6 blocks.*but this model is LlamaForCausalLM with 4 blocks", PlanError, plan=other)
    plan = ls.DropPlan((ls.Drop(ls.Sublayer(9, "mlp", "model.layers.9.mlp")),))
    plan.save(other)
    refused(make_trainer, "has no sublayer mlp.9", PlanError, plan=other)
    refused(make_trainer, "there is no file", PlanError, plan=tmp_path / "missing.json")
    other.write_text("{}")
    refused(make_trainer, "Drop plan: format is None", PlanError, plan=other)
    refused(make_trainer, "drops mlp.2, which is protected", SelectionError, plan=given, protect=[2])


def test_plan_that_is_dropped_already_is_refused_before_training(make_trainer, given):
    module = Foreign()
    ls.bypass(module, ls.DropPlan.load(given))
    with pytest.raises(PlanError, match="holds nothing that is not dropped already"):
        fit_foreign(make_trainer(SublayerDrop(2, plan=given), max_steps=4), module)


def test_rest_of_a_plan_is_dropped_if_a_part_is_dropped_already(make_trainer, given):
    module, plan = Foreign(), ls.DropPlan.load(given)
    ls.bypass(module, tuple(plan)[:1])
    drop = SublayerDrop(2, plan=given)
    fit_foreign(make_trainer(drop, max_steps=4), module)
    assert set(ls.dropped_sublayers(module)) == set(plan)
    assert tuple(drop.plan) == tuple(plan)[1:]


@pytest.mark.parametrize("other", [{"count": 2}, {"ratio": 0.5}, {"target_speedup": 1.3}])
def test_plan_beside_another_amount_is_refused(given, other):
    with pytest.raises(SelectionError, match="give exactly one of count, ratio, target_speedup and plan"):
        SublayerDrop(2, plan=given, **other)


def test_plan_in_several_rounds_is_refused(given):
    with pytest.raises(SelectionError, match=r"a plan is dropped at once\. Leave rounds out"):
        SublayerDrop(2, plan=given, every_n_steps=2, rounds=2)


UNUSED = {
    "objective": "speed",
    "phase": "prefill",
    "speed": SpeedSettings(runs=11),
    "calibrate_on": "val",
    "calibration_batches": 3,
}


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("name", UNUSED)
def test_option_that_has_no_effect_beside_a_plan_is_refused_unless_it_is_the_default(given, name):
    with pytest.raises(SelectionError, match=rf"{name}=.*, plan=.*Leave {name} out"):
        SublayerDrop(2, plan=given, **{name: UNUSED[name]})
    default = inspect.signature(SublayerDrop).parameters[name].default
    SublayerDrop(2, plan=given, **{name: default})


def test_scope_and_metric_beside_a_plan_are_refused_where_they_contradict_it(make_trainer, tmp_path, given):
    refused(make_trainer, "scope 'joint' and drops attention, mlp. Leave scope out", plan=given, scope="mlp")
    refused(make_trainer, "was made with metric 'cosine'.*Leave metric out", plan=given, metric="angular")
    mlp = tmp_path / "mlp.json"
    plan_of(build_model(), (2, "mlp"), (1, "mlp")).save(mlp)
    refused(make_trainer, "drops mlp. Leave scope out", plan=mlp, scope="block")
    drop = SublayerDrop(2, plan=mlp, scope="mlp", metric="cosine")
    fit_foreign(make_trainer(drop, max_steps=4))
    assert len(drop.plan) == 2
