"""recommend: from a real sweep and from real scores; the command that it prints does what it says."""

import copy
import json
import shlex
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from transformers import ByT5Tokenizer

from layershed.cli import trainer as running
from layershed.cli.recommend import recommend
from layershed.errors import ResultError
from layershed.planning.plan import Drop, DropPlan, Sublayer
from tests.support.command_line import DATA, FILES, SPEED, TRAINER, run
from tests.support.models import build_model
from tests.support.small_world import TINY

pytestmark = pytest.mark.usefixtures("own_seed", "one_parser")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A sweep (version_0) and a score (version_1) of one model."""
    folder = tmp_path_factory.mktemp("recommend")
    fields = {name: value for name, value in TINY.items() if name != "model_type"}
    build_model("llama", **{**fields, "head_dim": 8, "num_hidden_layers": 4}).save_pretrained(folder / "a model")
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder / "a model")
    with chdir(folder), pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            patch.setenv(name, "0")
        Path("text.txt").write_text(FILES["text.txt"])
        words = ["--model.pretrained=a model", *DATA, *TRAINER[:1], "--batches=2", "--metric=angular"]
        sweep = ["--counts=[1,2,3]", "--scopes=[attention]", "--quality_batches=2", *SPEED]
        assert run(["benchmark", *words, *sweep]) == 0
        assert run(["score", *words]) == 0
        yield folder


def edited(losses, speedups=(1.1, 1.2, 1.3), measurable=True):
    """The sweep with other losses of attention 1, 2, 3, and once more as joint, which loses one more."""
    content = json.loads(Path("runs/version_0/benchmark.json").read_text())
    content["dense"]["loss"] = 3.0
    content["measurements"] += [{**copy.deepcopy(one), "scope": "joint"} for one in content["measurements"]]
    for one in content["measurements"]:
        one["quality"]["loss"] = losses[one["count"] - 1] + (one["scope"] == "joint")
        decode = one["speed"]["phases"]["decode"]
        decode["speedup"]["median"], decode["measurable"] = speedups[one["count"] - 1], measurable
    folder = Path("runs/edited")
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(Path("runs/version_0/config.yaml").read_text())
    (folder / "benchmark.json").write_text(json.dumps(content))
    return str(folder)


def command_of(told):
    (line,) = (line for line in told.splitlines() if line.startswith("python train.py"))
    return shlex.split(line)[2:]


def test_printed_prune_command_drops_the_largest_count_within_the_budget(place, capsys):
    recommend(edited([3.01, 3.04, 3.3]), max_loss_increase=0.05)
    told = capsys.readouterr().out
    assert "2 (loss +0.0400, decode x1.20); 3 would be +0.3000" in told
    words = command_of(told)
    assert words[:3] == ["prune", "--model.pretrained", "a model"]
    assert run([*words, *SPEED, "--trainer.accelerator=cpu", "--trainer.default_root_dir=pruned"]) == 0
    plan = DropPlan.load("pruned/version_0/drop_plan.json")
    assert (plan.scope, len(plan), plan.metric) == ("attention", 2, "angular")
    scored = Path("pruned/version_0/importance.csv").read_text()
    assert scored == Path("runs/version_1/importance.csv").read_text(), "on the text and the batches of the sweep"


def test_knee_is_recommended_without_a_budget_and_its_definition_is_said(place, capsys):
    recommend(edited([3.01, 3.04, 3.3]))
    told = capsys.readouterr().out
    words = command_of(told)
    assert words[words.index("--scope") + 1 :][:3] == ["attention", "--count", "2"]
    assert "Kneedle" in told
    recommend(edited([3.1, 3.2, 3.25]), scope="attention")
    told = capsys.readouterr().out
    assert "no curve has a knee" in told
    assert "joint" not in told
    assert "python" not in told


def test_budget_that_nothing_meets_gives_no_command(place, capsys):
    recommend(edited([3.1, 3.2, 3.3]), max_loss_increase=0.05)
    told = capsys.readouterr().out
    assert "no measured count is within the budget" in told
    assert "python" not in told


def test_speedup_that_is_not_measurable_is_said(place, capsys):
    recommend(edited([3.01, 3.04, 3.3], measurable=False), max_loss_increase=0.05)
    assert "decode x1.20, not measurable" in capsys.readouterr().out


def test_scores_alone_say_that_no_loss_is_known_and_the_command_measures_it(place, capsys, monkeypatch):
    recommend("runs/version_1")
    told = capsys.readouterr().out
    assert "do not tell the loss" in told
    seen = {}
    monkeypatch.setattr(running, "benchmark", lambda _trainer, model, data, **given: seen.update(given, model=model))
    assert run(command_of(told)) == 0
    assert seen["scopes"] == ["attention", "mlp", "block", "joint"]
    assert seen["metric"] == "angular"
    assert set(seen["counts"]) <= {1, 2, 3}, "every scope has so many"
    assert seen["model"].hparams.pretrained == "a model"
    with pytest.raises(
        ResultError, match=r"within max_loss_increase=0.1. Measure losses first: python train.py benchmark"
    ):
        recommend("runs/version_1", max_loss_increase=0.1)


def fitted(steps, drop=6):
    """The importances of a fit: attention 2 of 3 is far more important, until it is the dropped one at step 6."""
    folder = Path("runs/fitted")
    folder.mkdir(exist_ok=True)
    rows = [f"{step},{block},attention,cosine,{value}" for step, values in steps.items() for block, value in values]
    (folder / "importance.csv").write_text("\n".join(["step,block,kind,metric,value", *rows]) + "\n")
    plan = DropPlan((Drop(Sublayer(0, "attention", "a.0"), 0.1, drop),), scope="attention", metric="cosine")
    (folder / "drop_plan.json").write_text(plan.to_json())
    return str(folder)


WHOLE, LEFT = list(enumerate((0.1, 0.11, 0.12, 0.9))), [(1, 0.3), (2, 0.5), (3, 0.7)]


@pytest.mark.parametrize(
    ("steps", "used"),
    [
        ({2: LEFT, 4: WHOLE, 8: LEFT}, 4),
        ({4: LEFT, 6: WHOLE, 8: LEFT}, 6),  # RedundancyMonitor is listed before SublayerDrop
        ({4: WHOLE, 6: LEFT, 8: LEFT}, 4),  # after it
    ],
)
def test_fit_that_dropped_is_judged_by_its_last_importances_of_the_dense_model(place, steps, used, capsys):
    recommend(fitted(steps))
    told = " ".join(capsys.readouterr().out.split())
    assert f"cosine, step {used}, the last of the dense model; the run drops at step 6" in told
    assert "attention 4 3: importance up to 0.12; the next has 0.9" in told


def test_fit_without_importances_of_the_dense_model_is_refused(place):
    with pytest.raises(ResultError, match="no importance from before the drop at step 6"):
        recommend(fitted({6: LEFT, 8: LEFT}))


def test_run_that_names_no_saved_model_gets_a_place_for_it(place, capsys):
    """Of a model from scratch the config alone would give random weights."""
    folder = Path(edited([3.01, 3.04, 3.3]))
    for config in (None, (folder / "config.yaml").read_text().replace("pretrained: a model", "pretrained: null")):
        (folder / "config.yaml").unlink()
        if config is not None:
            (folder / "config.yaml").write_text(config)
        recommend(str(folder))
        told = capsys.readouterr().out
        words = command_of(told)
        assert words[words.index("--model.pretrained") + 1] == "MODEL"
        assert "put the dense one in the place of MODEL" in told
        (folder / "config.yaml").touch()


BAD = {
    "nothing": ("nope", None, "there is no 'nope'"),
    "folder of something else": ("a model", None, "neither benchmark.json"),
    "no JSON": ("{", None, "cannot be read as JSON"),
    "a list": ("[]", None, "is no result of benchmark"),
    "no losses": ('{"dense": {}}', None, "is no result of benchmark .KeyError"),
    "one model": ('{"dense": {"loss": 1}, "measurements": [{"scope": null, "count": null}]}', None, "is no sweep"),
    "another scope": ("runs/version_0", {"scope": "mlp"}, "measured attention, and not scope mlp"),
    "scope without scores": ("runs/version_1", {"scope": "cross_attention"}, "no importances of scope cross"),
    "negative budget": ("runs/version_0", {"max_loss_increase": -1.0}, "at least 0"),
    "damaged scores": ("importance.csv", None, "line 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_results_are_refused_in_one_sentence(case, place):
    source, options, message = BAD[case]
    if source[0] in "{[":
        Path("bad.json").write_text(source)
        source = "bad.json"
    Path("importance.csv").write_text("x,y\n")
    with pytest.raises(ResultError, match=message):
        recommend(source, **(options or {}))


def test_command_line_of_recommend_reads_words_and_refuses_others(place, capsys):
    assert run(["recommend", edited([3.01, 3.04, 3.3]), "--max_loss_increase", "0.02", "--scope=attention"]) == 0
    assert "1 (loss +0.0100" in capsys.readouterr().out
    assert run(["recommend"]) == 2
    assert run(["recommend", "runs/version_0", "--max_loss_incraese=1"]) == 2
    assert "max_loss_increase" in capsys.readouterr().err
    assert run(["recommend", "nope"]) == 1
    assert (
        capsys.readouterr().err
        == "error: recommend: there is no 'nope'. Give the folder of a benchmark or of a score.\n"
    )
