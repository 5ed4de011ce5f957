"""The table of benchmarks/by_others.py: what others do to a model never undoes a drop without a word."""

import pytest
import torch
from torch import nn

import layershed as ls
from tests.support.by_others import trial
from tests.support.by_others.action import Action, Case
from tests.support.by_others.trial import ACTIONS, CASES, HarnessError, expectations, try_case
from tests.support.by_others.world import ARCHITECTURES, dense_model, logits, make_reference, wanted

# One of each library; make test-all tries all of them.
BY_DEFAULT = {
    "opt: peft merges all-linear LoRA and unloads, drop after step 1",
    "bart: peft injects LoRA, drop first",
    "mixtral: accelerate dispatches with hooks everywhere, drop first",
    "llama: accelerate saves, load_checkpoint_in_model, drop first",
    "bert: transformers saves, layershed loads, drop first",
    "llama: transformers saves and loads, drop first",
    "gpt2: generate, drop first",
    "opt: Trainer.save_model, layershed loads, drop first",
    "llama: state dict, net. cut off, drop first",
    "opt: AveragedModel, drop first",
    "llama: load_from_checkpoint(strict=False), drop first",
    "bart: a sublayer's module is replaced by a copy (setattr), drop first",
    "gpt2: hooks record all outputs, drop first",
}
ALL = [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name", ALL)
def test_drop_is_kept_or_refused_whatever_others_do(name):
    verdict = try_case(CASES[name])
    assert verdict.kind in ("right", "refused"), verdict.what


def test_table_is_large_and_holds_every_default_case():
    assert set(CASES) >= BY_DEFAULT
    assert len(ACTIONS) >= 60
    assert {case.architecture for case in CASES.values()} == set(ARCHITECTURES)
    for name in ARCHITECTURES:
        assert len({case.action.name for case in CASES.values() if case.architecture == name}) >= 30, name


# ---- the harness itself ----


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bypassed_model_equals_the_zero_weight_reference(name):
    model, reference = dense_model(name), dense_model(name)
    dense = logits(model, ARCHITECTURES[name].inputs())
    make_reference(reference, ARCHITECTURES[name])
    expected = logits(reference, ARCHITECTURES[name].inputs())
    sublayers = wanted(name, model)
    assert len(sublayers) == len(ARCHITECTURES[name].dropped)
    ls.bypass(model, sublayers)
    assert torch.allclose(logits(model, ARCHITECTURES[name].inputs()), expected, atol=1e-5)
    assert (expected - dense).abs().max() > 0.1


def judged(do, moment=0, **options):
    fields = {"steps": 1, "moments": (0, 1), "follows": False, "trains": False, "named": True, "tolerance": 1e-4}
    return try_case(Case("llama", Action("a trial", do, ("llama",), **{**fields, **options}), moment))


def untouched(world):
    yield world.model


def dense_in_silence(world):
    yield dense_model(world.name)


@pytest.mark.parametrize("moment", [0, 1])
def test_harness_takes_an_untouched_drop_for_right(moment):
    assert judged(untouched, moment).kind == "right"


def test_harness_reports_a_dense_model():
    verdict = judged(dense_in_silence)
    assert verdict.kind == "wrong"
    assert "computes the dense model" in verdict.what


def test_harness_reports_other_logits():
    def negative(world):
        world.model.lm_head.weight.data.neg_()
        yield world.model

    assert "computes another model" in judged(negative).what


def test_harness_reports_a_model_that_does_not_say_what_is_dropped():
    def mute(world):
        other = dense_model("llama")
        if ls.dropped_sublayers(world.model):
            make_reference(other, ARCHITECTURES["llama"])
        yield other

    assert judged(mute).what == "says that 0 sublayers are dropped"


def test_harness_reports_a_crash():
    def crash(world):
        yield world.model if not ls.dropped_sublayers(world.model) else nn.Linear(1, 1)("no tensor")

    verdict = judged(crash)
    assert verdict.kind == "wrong"
    assert verdict.what.startswith("crash: TypeError")


def test_harness_reports_what_layershed_would_save(monkeypatch):
    monkeypatch.setattr(trial.ls, "load_pretrained", lambda _: dense_model("llama"))
    assert "layershed saves another model" in judged(untouched).what


def test_harness_reports_a_restore_that_changes_nothing(monkeypatch):
    monkeypatch.setattr(trial.ls, "restore", lambda _: None)
    assert judged(untouched).what == "restoring does not give the dense model"


def test_harness_takes_a_report_that_names_the_drop_for_a_refusal():
    def reported(world):
        world.told.append(str(world.model.state_dict().keys()))
        yield dense_model(world.name)

    assert judged(reported).kind == "refused"


def test_harness_refuses_an_action_that_fails_on_a_dense_model():
    def broken(_world):
        raise RuntimeError
        yield

    with pytest.raises(HarnessError, match="fails without any drop: RuntimeError"):
        judged(broken)


def test_harness_refuses_an_action_after_which_a_drop_changes_nothing():
    def constant(world):
        nn.init.zeros_(world.model.lm_head.weight)
        yield world.model

    with pytest.raises(HarnessError, match="compute the same"):
        judged(constant, follows=True)


def test_harness_prints_the_counts_in_its_last_line(monkeypatch, capsys):
    fields = (1, (0,), False, False, True, 1e-4)
    cases = {name: Case("llama", Action(name, do, ("llama",), *fields), 0) for name, do in TWO.items()}
    monkeypatch.setattr(trial, "CASES", cases)
    assert trial.main([]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "2 tried, 1 right or refused"
    assert trial.main(["good"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 tried, 1 right or refused"


TWO = {"good": untouched, "bad": dense_in_silence}


def test_expectations_of_an_action_are_computed_once():
    action = CASES["llama: AveragedModel, drop first"].action
    assert expectations("llama", action, 0) is expectations("llama", action, 0)
