"""Arguments of the wrong kind: a typed error that shows what was given, and no raw one of torch."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import layershed as ls
from layershed.callbacks import LoRARecovery
from tests.support.models import build_model, some

TOKENS = {"input_ids": torch.arange(1, 9)[None]}
WRONG = (5, None, "x", b"y", [], {}, 3.5, True, object(), torch.ones(3), torch.nn.Linear, ("a", "b"))
OF_A_MODEL = [
    "adapters_off",
    "bypassed_sublayers",
    "dense",
    "dequantize",
    "dropped_sublayers",
    "find_left_alone",
    "find_sublayers",
    "find_transformer",
    "inject_lora",
    "measure_latency",
    "measure_speed",
    "merge_lora",
    "quantization_of",
    "quantize",
    "remove",
    "remove_lora",
    "removed_sublayers",
    "restore",
    "CostModel",
    "ImportanceTracker",
]
OF_MORE = {
    "bypass": ([],),
    "drop_to_speedup": ({}, 1.5),
    "estimate_importance": ([TOKENS],),
    "evaluate_quality": ([TOKENS],),
    "load_adapter": ("folder",),
    "save_adapter": ("folder",),
    "save_pretrained": ("folder",),
    "self_distillation_loss": (TOKENS,),
}


def call(function, /, *args, **kwargs):
    result = getattr(ls, function)(*args, **kwargs)
    if hasattr(result, "__enter__"):
        with result:
            pass


@pytest.mark.parametrize("name", [*OF_A_MODEL, *OF_MORE])
def test_wrong_model_is_refused_and_shown(name):
    for wrong in WRONG:
        with pytest.raises(ls.LayershedError, match=f"torch module, got .*{type(wrong).__name__}"):
            call(name, wrong, *OF_MORE.get(name, ()))


def test_wrong_model_of_a_drop_is_refused():
    with pytest.raises(ls.LayershedError, match="torch module, got 5"):
        ls.drop_sublayers(5, [TOKENS], count=1)


@pytest.fixture(scope="module")
def dropped():
    model = build_model()
    ls.bypass(model, some(model))
    return model


@pytest.mark.parametrize("name", ["load_adapter", "load_plan", "load_pretrained", "save_pretrained", "load_checkpoint"])
def test_wrong_path_is_refused_and_shown(name, dropped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = () if name in ("load_plan", "load_pretrained") else (dropped,)
    for wrong in WRONG:
        if not isinstance(wrong, str):
            with pytest.raises(ls.LayershedError, match=f"path .*got .*{type(wrong).__name__}"):
                call(name, *first, wrong)
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("name", "args", "argument"),
    [
        ("DropSchedule", (), "start"),
        ("DropPlan", (), "drops"),
        ("ImportanceScores", (), "scores"),
        ("Distillation", (), "weight"),
        ("Distillation", (), "temperature"),
        ("speedup_degradation_ratio", (1.0,), "speedup"),
        ("cosine_importance", (torch.ones(1, 2),), "branch"),
        ("angular", (torch.ones(1, 2),), "branch"),
        ("CosineImportance", (), "num_branches"),
        ("measure_ceilings", (), "device"),
        ("measure_ceilings", (), "dtype"),
        ("accelerator", (), "name"),
    ],
)
def test_wrong_value_is_refused(name, args, argument):
    for wrong in (b"y", {"a": 1}, object(), lambda: 1, {1, 2}):
        if not (argument == "scores" and wrong == {"a": 1}):
            with pytest.raises(ls.LayershedError):
                call(name, *args, **{argument: wrong})


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("inject_lora", "rank"),
        ("inject_lora", "alpha"),
        ("inject_lora", "dropout"),
        ("inject_lora", "seed"),
        ("inject_lora", "target_modules"),
        ("measure_speed", "prompt_tokens"),
        ("measure_speed", "ceilings"),
        ("measure_latency", "runs"),
        ("quantize", "skip_modules"),
        ("bypass", "name"),
        ("bypass", "sublayers"),
        ("drop_sublayers", "protect"),
        ("drop_sublayers", "metric"),
        ("drop_to_speedup", "settings"),
        ("drop_to_speedup", "target_speedup"),
        ("save_pretrained", "plan"),
        ("save_pretrained", "tokenizer"),
    ],
)
def test_wrong_option_is_refused_and_leaves_the_model_as_it_was(name, argument, dropped, tmp_path):
    good = {
        "bypass": {"sublayers": some(dropped)},
        "drop_sublayers": {"batches": [TOKENS], "count": 1},
        "drop_to_speedup": {"scores": dict.fromkeys(some(dropped), 1.0), "target_speedup": 1.1},
        "save_pretrained": {"folder": tmp_path / "saved"},
    }
    before = ls.dropped_sublayers(dropped), copy.deepcopy(list(dropped.state_dict()))
    for wrong in (5.5, b"y", {"a": 1}, object(), torch.ones(3), ("a", 1)):
        if isinstance(wrong, float) and argument in ("alpha", "target_speedup"):
            continue
        with pytest.raises(ls.LayershedError):
            call(name, dropped, **{**good.get(name, {}), argument: wrong})
    assert (ls.dropped_sublayers(dropped), list(dropped.state_dict())) == before
    assert not (tmp_path / "saved").exists()


def test_whole_numbers_of_numpy_are_numbers():
    assert ls.DropSchedule(start=torch.arange(4).numpy()[2]).steps == (2,)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_alpha_that_is_not_finite_is_refused(value):
    with pytest.raises(ls.LayershedError, match=rf"alpha={value}: both must be at least 1, and finite"):
        ls.inject_lora(build_model("llama"), alpha=value)


def test_numbers_of_numpy_count_as_those_of_python():
    model = build_model("llama")
    one = np.int64(1)
    scores = ls.estimate_importance(model, [TOKENS, TOKENS], max_batches=one)
    assert ls.evaluate_quality(model, [TOKENS, TOKENS], max_batches=one).tokens == 7
    plan = ls.select_sublayers(scores, count=one, protect=[np.int64(0), np.int64(-1)])
    assert {sublayer.block for sublayer in plan} <= {1, 2}
    config = ls.inject_lora(model, rank=np.int64(2), alpha=np.int64(4), seed=one)
    assert (type(config.r), type(config.lora_alpha)) == (int, int)


@pytest.mark.parametrize(
    "options", [{"count": True}, {"ratio": True}, {"count": 1, "protect": [True]}, {"count": 1, "max_batches": True}]
)
def test_true_is_no_number(options):
    with pytest.raises(ls.LayershedError, match="True"):
        ls.drop_sublayers(build_model("llama"), [TOKENS], **options)


def test_names_may_come_from_an_iterator():
    model = build_model("llama")
    adapted = ls.inject_lora(model, target_modules=(name for name in ["q_proj", "v_proj"])).target_modules
    assert {path.rpartition(".")[2] for path in adapted} == {"q_proj", "v_proj"}
    assert LoRARecovery(target_modules=iter(["q_proj"])).options["target_modules"] == ("q_proj",)
    quantized = build_model("llama")
    ls.quantize(quantized, skip_modules=(name for name in ["down_proj"]))
    assert type(quantized.model.layers[0].mlp.down_proj) is torch.nn.Linear


@pytest.mark.parametrize(
    "name", ["load_adapter", "load_plan", "load_pretrained", "load_weights", "save_pretrained", "load_checkpoint"]
)
def test_empty_path_is_refused(name, dropped):
    first = () if name in ("load_plan", "load_pretrained") else (dropped,)
    with pytest.raises(ls.LayershedError, match="must be a path, got an empty one"):
        call(name, *first, "")


def test_home_folder_is_meant_by_a_tilde(dropped, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    plan = ls.DropPlan(tuple(map(ls.Drop, ls.dropped_sublayers(dropped))))
    ls.save_pretrained(dropped, "~/saved", plan=plan)
    assert ls.dropped_sublayers(ls.load_pretrained("~/saved")) == ls.dropped_sublayers(dropped)
    ls.load_plan("~/saved").save("~/plan.json")
    assert ls.DropPlan.load("~/plan.json") == ls.load_plan(tmp_path / "saved")
    assert not (tmp_path / "~").exists()
