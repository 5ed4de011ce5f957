"""``train.py prune`` with searches and linear maps, against the function called by hand; what is refused."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import layershed as ls
from layershed.drop import method_of
from tests.support.command_line import DATA, SPEED, run

pytestmark = pytest.mark.usefixtures("own_world", "one_parser")


@torch.no_grad()
def test_the_best_method_writes_a_folder_with_maps_that_loads_to_the_measured_loss(saved, capsys):
    words = ["--count=2", "--batches=6", "--quality_batches=2", "--method=best", "--standalone", *SPEED]
    assert run(["prune", f"--model.pretrained={saved}", *DATA, *words]) == 0
    folder = Path("runs/version_0")
    assert "a linear map runs in place of 2" in " ".join(capsys.readouterr().out.split())
    plan = ls.DropPlan.load(folder / "drop_plan.json")
    assert [drop.action for drop in plan.drops] == ["linear"] * 2
    assert plan.metric == "kl"
    pruned = ls.load_pretrained(folder / "pruned")
    assert set(ls.linear_maps(pruned)) == set(plan)
    ids = torch.arange(5, 21)[None]
    alone = AutoModelForCausalLM.from_pretrained(folder / "pruned", trust_remote_code=True)
    assert torch.equal(alone(ids).logits, pruned(ids).logits)
    assert "| linear map |" in (folder / "pruned" / "README.md").read_text()
    assert json.loads((folder / "speed.json").read_text())["parameters_dropped"] == pruned.num_parameters()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--search=greedy"], "Choose kl or loss"),
        (["--rank=4"], "Set replace='linear'"),
        (["--method=best", "--metric=angular"], "sets metric itself"),
        (["--method=best", "--objective=speed"], "objective='speed'"),
        (["--replace=linear", "--rank=0"], "must be positive"),
    ],
)
def test_methods_that_contradict_themselves_are_one_sentence(saved, capsys, words, says):
    assert run(["prune", f"--model.pretrained={saved}", *DATA, "--count=1", *words, *SPEED]) != 0
    told = capsys.readouterr().err
    assert says in " ".join(told.split())
    assert told.count("error:") == 1
    assert not Path("runs").exists()


def test_the_best_method_takes_a_rank():
    assert method_of("best", "cosine", "one-shot", None, 8) == ls.DropMethod("kl", "greedy", "linear", 8)
    assert method_of("best", "kl", "greedy", "linear", None) == ls.DropMethod("kl", "greedy", "linear")
