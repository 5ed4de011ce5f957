"""The command line: runs from a saved config, score and prune compared with plain formulas."""

import inspect
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, ByT5Tokenizer

import layershed as ls
from layershed.callbacks import SpeedMonitor
from layershed.cli import prune
from layershed.cli.trainer import Trainer
from layershed.performance.intervals import ENOUGH
from layershed.performance.latency import Latency
from layershed.performance.stopwatch import SpeedSettings
from layershed.planning.plan import DropPlan, Sublayer, count_by_kind
from tests.support.command_line import (
    DATA,
    DROPPING,
    FIT,
    KEEP,
    SCORE,
    SPEED,
    TRAINER,
    callbacks,
    run,
)
from tests.support.command_results import batches_of, plain_importance, plain_quality, read_importance

pytestmark = pytest.mark.usefixtures("own_world", "one_parser")


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # it has: each run has a directory of its own
def test_fit_repeats_and_resumes_from_its_saved_config(capsys):
    Path("run.yaml").write_text(
        callbacks({"class_path": "RedundancyMonitor", "init_args": {"every_n_steps": 1}}, DROPPING, KEEP)
    )
    assert run([*FIT, "--trainer.max_steps=6", "--config=run.yaml"]) == 0
    first = Path("runs/version_0")
    assert run(["fit", f"--config={first}/config.yaml"]) == 0
    assert run(["fit", f"--config={first}/config.yaml", f"--ckpt_path={first}/checkpoints/epoch=0-step=2.ckpt"]) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["version_0", "version_1", "version_2"]
    for name in ("importance.csv", "drop_plan.json"):
        contents = [(Path("runs") / f"version_{number}" / name).read_text() for number in range(3)]
        assert contents[0] == contents[1], f"{name}: repeated from its config.yaml"
        assert contents[0] == contents[2], f"{name}: resumed before the drop"
    assert DropPlan.load(first / "drop_plan.json").drops[0].step == 3

    capsys.readouterr()
    last = first / "checkpoints" / "last.ckpt"
    assert run(["validate", *DATA, *TRAINER, f"--config={first}/config.yaml", f"--ckpt_path={last}"]) == 0
    assert "val_loss" in capsys.readouterr().out
    weights = torch.load(last, weights_only=True)
    torch.save(weights["state_dict"], "weights.ckpt")
    assert run([*FIT, "--ckpt_path=weights.ckpt"]) == 1
    assert "not a checkpoint that Lightning wrote" in capsys.readouterr().err


def test_score_prints_and_writes_the_importances_of_the_formula(saved, capsys):
    assert run(["score", f"--model.pretrained={saved}", *DATA, "--batches=3"]) == 0
    told = capsys.readouterr().out
    folder = Path("runs/version_0")
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "importance.csv", "importance.png"}
    assert (folder / "importance.png").read_bytes().startswith(b"\x89PNG")
    importance = read_importance(folder / "importance.csv")

    batches = batches_of(saved, "train", 3)
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert importance == pytest.approx(plain_importance(model, batches), rel=1e-4)
    scores = ls.estimate_importance(model, batches)
    assert importance == {(block, kind): value for block, kind, value in scores.rows()}

    least = min((value, block, kind) for (block, kind), value in importance.items() if kind != "block")
    rows = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in told.splitlines() if "\u2502" in line]
    column = {"attention": 1, "mlp": 2}[least[2]]
    assert rows[least[1]][column] == f"{least[0]:#.3g}  #1"
    assert sorted(int(cell.split("#")[1]) for row in rows for cell in row[1:3]) == list(range(1, 9))
    assert f"{3 * 2 * 16} tokens" in told


def test_score_of_random_weights_prints_a_note(saved, capsys):
    assert run([*SCORE, "--batches=1"]) == 0
    assert capsys.readouterr().out.startswith("note: without --model.pretrained the weights are random")
    assert run(["score", f"--model.pretrained={saved}", *DATA, "--batches=1"]) == 0
    assert "note" not in capsys.readouterr().out


def test_score_can_be_repeated_from_its_config(saved):
    assert run(["score", f"--model.pretrained={saved}", *DATA, "--batches=2", "--metric=angular"]) == 0
    assert run(["score", "--config=runs/version_0/config.yaml"]) == 0
    first, second = (Path("runs", f"version_{number}", "importance.csv").read_text() for number in (0, 1))
    assert first == second
    assert ",angular," in first


def test_prune_writes_the_results_of_the_functions(saved, capsys):
    words = ["--ratio=0.25", "--batches=3", "--quality_batches=2", "--standalone", *SPEED]
    assert run(["prune", f"--model.pretrained={saved}", *DATA, *words]) == 0
    told = " ".join(capsys.readouterr().out.split())
    folder = Path("runs/version_0")
    names = {"config.yaml", "importance.csv", "drop_plan.json", "speed.json", "quality.json", "pruned", "report.html"}
    assert {path.name for path in folder.iterdir()} == names

    model = AutoModelForCausalLM.from_pretrained(saved)
    importance = plain_importance(model, batches_of(saved, "train", 3))
    ranked = sorted((value, *key) for key, value in importance.items() if key[1] != "block")[:2]
    plan = DropPlan.load(folder / "drop_plan.json")
    assert [(drop.sublayer.block, drop.sublayer.kind) for drop in plan.drops] == [
        (block, kind) for _, block, kind in ranked
    ]
    assert [drop.score for drop in plan.drops] == pytest.approx([value for value, _, _ in ranked], rel=1e-4)
    assert read_importance(folder / "importance.csv") == pytest.approx(importance, rel=1e-4)

    held_out = batches_of(saved, "val", 2)
    before = plain_quality(model, held_out)
    pruned = ls.load_pretrained(folder / "pruned")
    after = plain_quality(pruned, held_out)
    for moment, (loss, accuracy) in (("before", before), ("right after", after)):
        assert f"Validation loss {moment} the drop {loss:.4f} (next-token accuracy {accuracy:.1%}".replace("%", "") in (
            told.replace(" %)", "").replace("%", "")
        )
    noted = json.loads((folder / "quality.json").read_text())
    for moment, quality in (("before", before), ("after", after)):
        assert [noted[moment]["loss"], noted[moment]["accuracy"]] == pytest.approx(quality, rel=1e-4)
    assert (folder / "pruned" / "modeling_dropped.py").is_file(), "standalone"
    assert f"{before[0]:.4f}" in (folder / "pruned" / "README.md").read_text()
    ls.bypass(model, plan)
    tokens = held_out[0]["input_ids"]
    assert torch.equal(pruned(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert set(ls.dropped_sublayers(pruned)) == set(plan)
    assert DropPlan.load(folder / "pruned" / "drop_plan.json") == plan
    assert len(ByT5Tokenizer.from_pretrained(folder / "pruned")) == 259

    speed = json.loads((folder / "speed.json").read_text())
    assert speed["parameters_dense"] == model.num_parameters()
    assert speed["parameters_dropped"] == pruned.num_parameters()
    attentions = 4 - count_by_kind(plan)["attention"]
    assert (speed["kv_bytes_dense"], speed["kv_bytes_dropped"]) == (4 * 2 * 8 * 4, attentions * 2 * 8 * 4)
    assert (speed["prompt_tokens"], speed["new_tokens"], speed["runs"]) == (4, 2, 2)
    page = (folder / "report.html").read_text()
    assert f"{before[0]:.4f}" in page
    assert f"{after[0]:.4f}" in page


def test_default_number_of_pairs_is_enough_for_an_interval():
    measuring = [Trainer.prune, Trainer.benchmark, SpeedMonitor, ls.measure_speed, ls.measure_forward, SpeedSettings]
    defaults = [inspect.signature(each).parameters["runs"].default for each in measuring]
    assert min(defaults) >= ENOUGH
    assert len(set(defaults)) == 1


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    ("words", "kinds", "free"),
    [
        (["--scope=attention", "--count=2"], {"attention": 2, "mlp": 0}, range(4)),
        (["--scope=mlp", "--ratio=0.5"], {"attention": 0, "mlp": 2}, range(4)),
        (["--scope=block", "--count=1", "--protect=[0, -1]"], {"attention": 1, "mlp": 1}, (1, 2)),
        # without protection it would be these two that go
        (["--scope=mlp", "--count=2", "--protect=[1, -1]"], {"attention": 0, "mlp": 2}, (0, 2)),
    ],
    ids=["attention by count", "mlp by ratio", "block with protection", "mlp with protection"],
)
def test_prune_applies_scope_count_ratio_and_protection(words, kinds, free, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(prune, "write_report", lambda record, path: path)  # half of the time, and not the question
    output = tmp_path / "elsewhere" / "small"
    words = [*words, "--batches=1", "--quality_batches=1", f"--output={output}", *SPEED]
    assert run(["prune", f"--model.pretrained={saved}", *DATA, *words]) == 0
    dropped = ls.dropped_sublayers(ls.load_pretrained(output))
    assert count_by_kind(dropped) == kinds
    assert {sublayer.block for sublayer in dropped} <= set(free)


def test_pruned_folder_works_as_model_and_tokenizer_source(saved, capsys):
    prune = ["prune", f"--model.pretrained={saved}", *DATA, "--count=2", "--batches=1", "--quality_batches=1", *SPEED]
    assert run(prune) == 0
    pruned = Path("runs/version_0/pruned")
    gone = {(sublayer.block, sublayer.kind) for sublayer in ls.dropped_sublayers(ls.load_pretrained(pruned))}
    assert run(["score", f"--model.pretrained={pruned}", *DATA, "--batches=1"]) == 0
    kept = {key for key in read_importance(Path("runs/version_1/importance.csv")) if key[1] != "block"}
    assert kept == {(block, kind) for block in range(4) for kind in ("attention", "mlp")} - gone
    assert run(["fit", f"--model.pretrained={pruned}", *DATA, *TRAINER, "--trainer.enable_checkpointing=false"]) == 0
    capsys.readouterr()
    assert run(["prune", f"--model.pretrained={pruned}", *DATA, "--count=1", *SPEED]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: prune: the model already lacks ")
    assert all(f"{kind}.{block}" in told for block, kind in gone)


def test_score_uses_the_precision_of_the_trainer(saved):
    words = [f"--model.pretrained={saved}", *DATA, "--batches=1"]
    assert run(["score", *words]) == 0
    assert run(["score", *words, "--trainer.precision=bf16-mixed"]) == 0
    exact, rounded = (read_importance(Path("runs", f"version_{number}", "importance.csv")) for number in (0, 1))
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=0.1)


def test_prune_by_speed_drops_least_importance_per_millisecond(saved, monkeypatch):
    asked = []

    def latency(model, **settings):
        asked.append(settings)
        return Latency({s: 0.1 if s.kind == "attention" else 0.001 for s in ls.find_sublayers(model)}, 1.0)

    monkeypatch.setattr(prune, "measure_latency", latency)
    monkeypatch.setattr(prune, "write_report", lambda record, path: path)
    words = ["--count=3", "--batches=2", "--quality_batches=1", "--objective=speed", *SPEED]
    assert run(["prune", f"--model.pretrained={saved}", *DATA, *words]) == 0
    assert asked == [{"prompt_tokens": 4, "new_tokens": 2, "runs": 2}]
    importance = plain_importance(AutoModelForCausalLM.from_pretrained(saved), batches_of(saved, "train", 2))
    price = {key: value / (100 if key[1] == "attention" else 1) for key, value in importance.items()}
    ranked = sorted((key for key in price if key[1] != "block"), key=price.__getitem__)[:3]
    plan = DropPlan.load("runs/version_0/drop_plan.json")
    assert [(s.block, s.kind) for s in plan] == ranked
    assert [drop.score for drop in plan.drops] == pytest.approx([importance[key] for key in ranked], rel=1e-4)
    plain = sorted((key for key in price if key[1] != "block"), key=importance.__getitem__)[:3]
    assert set(ranked) != set(plain), "by importance alone others would have gone"


@pytest.mark.pretrained
def test_score_and_prune_run_on_a_real_model_without_a_config(tmp_path):
    model = os.environ["LAYERSHED_SMOLLM2"]
    few = ["--batches=1", "--data.batch_size=2", "--data.block_size=64"]
    assert run(["score", "--model.pretrained", model, *few]) == 0
    importance = read_importance(tmp_path / "runs/version_0/importance.csv")
    assert len(importance) == 90
    assert importance[0, "mlp"] > 10 * importance[26, "attention"], "the first block matters, late attention hardly"
    assert run(["prune", "--model.pretrained", model, "--ratio", "0.25", *few, "--quality_batches=1", *SPEED]) == 0
    plan = DropPlan.load(tmp_path / "runs/version_1/drop_plan.json")
    assert len(plan) == 15
    assert Sublayer(0, "mlp", "model.layers.0.mlp") not in plan
    pruned = ls.load_pretrained(tmp_path / "runs/version_1/pruned")
    assert set(ls.dropped_sublayers(pruned)) == set(plan)
