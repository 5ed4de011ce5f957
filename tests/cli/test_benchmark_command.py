"""The command benchmark: what it measures and writes, compared with plain formulas."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import layershed as ls
from layershed.cli import benchmark as benchmark_command
from layershed.planning.plan import DropPlan, count_by_kind
from tests.support.command_line import (
    DATA,
    DROPPING,
    FIT,
    KEEP,
    SPEED,
    TINY,
    TRAINER,
    callbacks,
    run,
)
from tests.support.command_results import batches_of, plain_importance, plain_quality, read_importance
from tests.support.runs import unmarked
from tests.support.thinned import one_of

pytestmark = pytest.mark.usefixtures("own_world", "one_parser")


def read_benchmark(number=0, *, extra=()):
    """Read the file that a benchmark wrote."""
    folder = Path(f"runs/version_{number}")
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "benchmark.json", *extra}
    return json.loads((folder / "benchmark.json").read_text())


def check_measurement(told, dense, after, sizes, caches, runs=2, comparable=True):
    """Check the known values of a measurement and the consistency of the others."""
    assert (told["quality"]["loss"], told["quality"]["accuracy"]) == pytest.approx(after, rel=1e-5)
    assert told["quality"]["perplexity"] == pytest.approx(math.exp(after[0]), rel=1e-5)
    speed = told["speed"]
    assert (speed["parameters_dense"], speed["parameters_dropped"]) == sizes
    assert (speed["file_bytes_dense"], speed["file_bytes_dropped"]) == tuple(4 * size for size in sizes)
    held = [attentions * 2 * 8 * 4 for attentions in caches]  # keys and values of 8 numbers of 4 bytes
    assert speed["kv_bytes_dense"] == held[0]
    assert held[1] <= speed["kv_bytes_dropped"] < held[1] + 4, "of a dropped one a number is left for all tokens"
    assert (speed["prompt_tokens"], speed["new_tokens"], speed["batch_size"], speed["runs"]) == (4, 2, 1, runs)
    phases = speed["phases"]
    speedup = phases["decode"]["speedup"]
    gained = 100 * (speedup["median"] - 1)
    assert phases["decode"]["measurable"] == (runs > 5 and not speedup["low"] <= 1 <= speedup["high"])
    if comparable and phases["decode"]["measurable"] and gained > 0:
        assert told["sdr"] == pytest.approx(100 * (dense[1] - after[1]) / gained, rel=1e-4, abs=1e-9)
    else:
        assert told["sdr"] is None
    for phase, tokens in (("prefill", 4), ("decode", 1)):
        assert phases[phase]["dense_ms"] == pytest.approx(1000 * tokens / phases[phase]["dense"])
        assert phases[phase]["predicted"] > 1


def cells(told, name):
    """The cells of the rows that begin with a name, one row for each of the three tables."""
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in told.splitlines()]
    return [row[1:] for row in rows if row[:1] == [name]]


def test_benchmark_measures_a_dropped_folder_against_its_base(saved, without_two, capsys):
    words = [f"--base={saved}", *DATA, *SPEED, "--quality_batches=2", "--runs=7"]
    assert run(["benchmark", f"--model.pretrained={without_two}", *words]) == 0
    told, content = capsys.readouterr().out, read_benchmark()
    held_out = batches_of(saved, "val", 2)
    models = AutoModelForCausalLM.from_pretrained(saved), ls.load_pretrained(without_two)
    before, after = (plain_quality(model, held_out) for model in models)
    assert before != after
    assert (content["model"], content["base"]) == (str(without_two), str(saved))
    assert (content["dense"]["loss"], content["dense"]["accuracy"]) == pytest.approx(before, rel=1e-5)
    assert content["settings"]["quality_batches"] == 2
    assert content["ceilings"]["name"] == "cpu (float32, 1 threads)"
    assert content["ceilings"]["flops"] > content["ceilings"]["bandwidth"] > 0
    (measured,) = content["measurements"]
    sizes = tuple(model.num_parameters() for model in models)
    assert sizes[0] - sizes[1] == 2 * 16 * 16 + 2 * 16 * 8 + 16 + 3 * 16 * 16 + 16
    check_measurement(measured, before, after, sizes, (4, 3), runs=7)
    assert (measured["scope"], measured["count"]) == (None, None)
    assert [s.name for s in DropPlan.from_dict(measured["plan"])] == ["attention.1", "mlp.2"]

    first, *phases = cells(told, "dense")
    loss, accuracy = f"{before[0]:.4f}", f"{100 * before[1]:.1f} %"
    assert first[:2] + first[3:6] == [f"{sizes[0]:,}", f"{4 * sizes[0] / 1000:.1f} kB", "256 B", loss, accuracy]
    assert [len(row) for row in phases] == [2, 2]
    first, prefill, decode = cells(told, "1 attention, 1 mlp")
    assert first[4:6] == [f"{after[0]:.4f}", f"{100 * after[1]:.1f} %"]
    for row, phase in ((prefill, "prefill"), (decode, "decode")):
        speedup = measured["speed"]["phases"][phase]["speedup"]
        assert row[2] == "x{median:.2f} [{low:.2f}, {high:.2f}]".format(**speedup)
        assert row[3].startswith(f"x{measured['speed']['phases'][phase]['predicted']:.2f} (")
    assert f"Dense: {saved}." in told
    assert "Measurements: runs/version_0/benchmark.json" in told


def test_benchmark_uses_the_precision_for_both_models(saved, without_two, made_up):
    words = [f"--base={saved}", *DATA, *SPEED, "--quality_batches=1", "--trainer.precision=bf16-true"]
    assert run(["benchmark", f"--model.pretrained={without_two}", *words]) == 0
    content = read_benchmark()
    assert content["machine"]["dtype"] == "bfloat16"
    speed = content["measurements"][0]["speed"]
    for side in ("dense", "dropped"):
        assert speed[f"file_bytes_{side}"] == 2 * speed[f"parameters_{side}"]
    assert speed["kv_bytes_dense"] == 4 * 2 * 8 * 2


def trained(path, *, scale=0):
    """The dense model of a checkpoint, with scale * B A added to the weights that have an adapter."""
    state = torch.load(path, weights_only=True)["state_dict"]
    weights = {}
    for name, weight in state.items():
        if name.startswith("model.") and "lora_" not in name:
            adapter = {key.rsplit(".", 3)[1]: state[key] for key in state if key.startswith(adapters_of(name))}
            if adapter:
                weight = weight + scale * adapter["lora_B"] @ adapter["lora_A"]
            weights[name.removeprefix("model.").replace(".base_layer.", ".")] = weight
    model = LlamaForCausalLM(LlamaConfig(**{name: value for name, value in TINY.items() if name != "model_type"}))
    model.load_state_dict(unmarked(weights))
    return model.eval()


def adapters_of(name):
    """Prefix of the names of a weight's adapters; matches nothing if it cannot have any."""
    return name.replace("base_layer.weight", "lora_") if name.endswith("base_layer.weight") else "nothing"


@pytest.mark.parametrize("adapted", one_of([True, False]))
def test_benchmark_compares_a_checkpoint_with_its_bypass_lifted(adapted, capsys, made_up):
    recovery = [{"class_path": "LoRARecovery", "init_args": {"rank": 2, "alpha": 16}}] if adapted else []
    dropping = {"class_path": "SublayerDrop", "init_args": {**DROPPING["init_args"], "start": 2, "scope": "attention"}}
    Path("run.yaml").write_text(callbacks(dropping, *recovery, KEEP))
    assert run([*FIT, "--trainer.max_steps=6", "--model.optimizer.lr=0.01", "--config=run.yaml"]) == 0
    capsys.readouterr()
    last = "runs/version_0/checkpoints/last.ckpt"
    words = [f"--ckpt_path={last}", *SPEED, "--quality_batches=2"]
    assert run(["benchmark", "--config=runs/version_0/config.yaml", *words]) == 0
    told, content = capsys.readouterr().out, read_benchmark(1)
    assert "note:" not in told, "what was trained is not random"
    lifted = "the same weights with the bypass lifted" + (" and the adapters off" if adapted else "")
    assert (content["model"], content["base"]) == (last, lifted)

    held_out = batches_of("bytes", "val", 2)
    model, plan = trained(last), DropPlan.load("runs/version_0/drop_plan.json")
    before = plain_quality(model, held_out)
    recovered = trained(last, scale=16 / 2)
    ls.bypass(recovered, plan)
    after = plain_quality(recovered, held_out)
    ls.bypass(model, plan)
    assert (plain_quality(model, held_out) != after) == adapted, (
        "adapters are trained for what is left, and count there"
    )
    assert (content["dense"]["loss"], content["dense"]["accuracy"]) == pytest.approx(before, rel=1e-5)
    (measured,) = content["measurements"]
    assert tuple(DropPlan.from_dict(measured["plan"])) == tuple(plan)
    size = model.num_parameters()
    sizes = size, size - (2 * 16 * 16 + 2 * 16 * 8 + 16)
    check_measurement(measured, before, after, sizes, (2, 1), comparable=adapted)


@pytest.mark.slow
def test_benchmark_takes_the_model_from_the_checkpoint_and_compares_with_another_base(saved, made_up):
    Path("run.yaml").write_text(callbacks(DROPPING, KEEP))
    fit = ["fit", f"--model.pretrained={saved}", *DATA, *TRAINER, "--trainer.max_steps=4", "--config=run.yaml"]
    assert run(fit) == 0
    last = "--ckpt_path=runs/version_0/checkpoints/last.ckpt"
    words = [*DATA, *SPEED, "--quality_batches=2", last]
    assert run(["benchmark", *words]) == 0
    assert run(["benchmark", *words, f"--base={saved}"]) == 0
    own, other = read_benchmark(1), read_benchmark(2)
    assert own["measurements"][0]["quality"] == other["measurements"][0]["quality"]
    assert own["dense"]["loss"] != other["dense"]["loss"], "it was trained since"
    before = plain_quality(AutoModelForCausalLM.from_pretrained(saved), batches_of(saved, "val", 2))
    assert (other["dense"]["loss"], other["dense"]["accuracy"]) == pytest.approx(before, rel=1e-5)


def test_benchmark_refuses_unfit_checkpoint_and_base_with_too_few_embeddings(capsys):
    Path("run.yaml").write_text(callbacks(DROPPING, KEEP))
    assert run([*FIT, "--trainer.max_steps=4", "--config=run.yaml"]) == 0
    last = Path("runs/version_0/checkpoints/last.ckpt")
    checkpoint = torch.load(last, weights_only=True)
    name = next(name for name in checkpoint["state_dict"] if name.endswith("q_proj.weight"))
    checkpoint["state_dict"][name] = torch.zeros(3, 3)
    torch.save(checkpoint, "other.ckpt")
    fields = {**TINY, "vocab_size": 100}
    LlamaForCausalLM(LlamaConfig(**{key: fields[key] for key in fields if key != "model_type"})).save_pretrained("few")
    for words, fragments in (
        (["--ckpt_path=other.ckpt"], ["weights do not fit"]),
        ([f"--ckpt_path={last}", "--base=./few"], ["./few", "259 ids", "only 100"]),
    ):
        capsys.readouterr()
        assert run(["benchmark", *words, *DATA, *SPEED]) == 1
        told = capsys.readouterr().err
        assert told.startswith("error: ")
        assert all(fragment in told for fragment in fragments), told


def test_benchmark_sweep_measures_and_draws_the_frontier(saved, capsys, monkeypatch, made_up):
    drawn = []

    def draw(points, dense, label, **options):
        drawn.append((points, dense, label, options))
        return frontier_figure(points, dense, label, **options)

    frontier_figure = benchmark_command.frontier_figure
    monkeypatch.setattr(benchmark_command, "frontier_figure", draw)
    words = ["--counts=[1, 3]", "--scopes=[attention, joint, block]", "--batches=3", "--quality_batches=2"]
    assert run(["benchmark", f"--model.pretrained={saved}", *DATA, *SPEED, *words]) == 0
    told, content = capsys.readouterr().out, read_benchmark(extra=("importance.csv", "frontier.png"))
    assert (content["model"], content["base"]) == (str(saved), str(saved))
    model, held_out = AutoModelForCausalLM.from_pretrained(saved), batches_of(saved, "val", 2)
    importance = plain_importance(model, batches_of(saved, "train", 3))
    assert read_importance(Path("runs/version_0/importance.csv")) == pytest.approx(importance, rel=1e-4)
    dense, size = plain_quality(model, held_out), model.num_parameters()
    assert (content["dense"]["loss"], content["dense"]["accuracy"]) == pytest.approx(dense, rel=1e-5)
    asked = [(scope, count) for scope in ("attention", "joint", "block") for count in (1, 3)]
    assert [(one["scope"], one["count"]) for one in content["measurements"]] == asked
    weights = {"attention": 2 * 16 * 16 + 2 * 16 * 8 + 16, "mlp": 3 * 16 * 16 + 16}
    for one, (scope, count) in zip(content["measurements"], asked, strict=True):
        kinds = {"joint": ("attention", "mlp")}.get(scope, (scope,))
        ranked = sorted((value, *key) for key, value in importance.items() if key[1] in kinds)[:count]
        plan = DropPlan.from_dict(one["plan"])
        gone = [(s.block, s.kind) for s in plan]
        if scope == "block":
            assert gone == [(block, kind) for _, block, _ in ranked for kind in ("attention", "mlp")]
        else:
            assert gone == [(block, kind) for _, block, kind in ranked]
        ls.bypass(model, plan)
        after = plain_quality(model, held_out)
        ls.restore(model)
        caches = 4, 4 - count_by_kind(plan)["attention"]
        check_measurement(one, dense, after, (size, size - sum(weights[kind] for _, kind in gone)), caches)
        assert cells(told, f"{scope} {count}")[0][4:6] == [f"{after[0]:.4f}", f"{100 * after[1]:.1f} %"]

    ((points, height, label, options),) = drawn
    assert (height, label) == (pytest.approx(100 * dense[1]), "next-token accuracy (%)")
    assert options == {"title": f"{saved} on cpu (1 threads)", "log_scale": False}
    for point, one in zip(points, content["measurements"], strict=True):
        assert (point.scope, point.count) == (one["scope"], one["count"])
        assert point.quality == 100 * one["quality"]["accuracy"]
        for phase in ("prefill", "decode"):
            speedup = getattr(point, phase)
            told_of_it = one["speed"]["phases"][phase]["speedup"]
            assert [speedup.median, speedup.low, speedup.high] == [told_of_it[key] for key in ("median", "low", "high")]
    assert Path("runs/version_0/frontier.png").read_bytes().startswith(b"\x89PNG")
    assert (
        content["settings"].items() >= {"metric": "cosine", "objective": "importance", "batches": 3, "runs": 2}.items()
    )
