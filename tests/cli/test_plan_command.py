"""The command plan: what it predicts from a config alone."""

import json
import os
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import layershed as ls
from layershed.cli import plan as plan_command
from layershed.performance.roofline import ACCELERATORS
from layershed.planning.plan import Drop, DropPlan
from layershed.training.text_data import TextData
from tests.support.command_line import (
    PLAN,
    run,
)

pytestmark = pytest.mark.usefixtures("own_world", "one_parser")


def read_prediction(number=0):
    """Read the file that a plan wrote."""
    folder = Path(f"runs/version_{number}")
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "prediction.json"}
    return json.loads((folder / "prediction.json").read_text())


@pytest.fixture
def planned(monkeypatch):
    """The models passed to ``predict``. Fails if one has weights or if text is read."""
    seen = []
    predict = plan_command.predict

    def watched(model, *args):
        assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        seen.append(model)
        return predict(model, *args)

    monkeypatch.setattr(plan_command, "predict", watched)
    for name in ("setup", "prepare_data"):
        monkeypatch.setattr(TextData, name, lambda *_: pytest.fail("it looked for a text"))
    return seen


def test_plan_needs_only_the_config_of_the_model(saved, capsys, planned):
    Path("bare").mkdir()
    shutil.copy(saved / "config.json", "bare")
    words = [
        "--scope=attention",
        "--count=3",
        "--device=A100",
        "--batch_size=5",
        "--prompt_tokens=20",
        "--new_tokens=4",
    ]
    assert run(["plan", "--model.pretrained=./bare", *words]) == 0
    told, content = capsys.readouterr().out, read_prediction()
    assert len(planned) == 1
    size, attention = AutoModelForCausalLM.from_pretrained(saved).num_parameters(), 2 * 16 * 16 + 2 * 16 * 8 + 16
    for side, attentions in (("dense", 4), ("dropped", 1)):
        assert content[side]["parameters"] == size - (4 - attentions) * attention
        assert content[side]["weight_bytes"] == 2 * content[side]["parameters"]
        assert content[side]["kv_bytes"] == attentions * 2 * 8 * 2 * 5 * 24
        assert content[side]["devices"] == 1
    assert [s.name for s in DropPlan.from_dict(content["plan"])] == ["attention.3", "attention.2", "attention.1"]
    assert (content["dtype"], content["ceilings"]["name"]) == ("bfloat16", "NVIDIA A100 SXM 80 GB")
    assert (content["batch_size"], content["prompt_tokens"], content["new_tokens"]) == (5, 20, 4)
    assert "./bare: 3 attention dropped" in told
    assert "The deepest sublayers go first" in told
    assert "Prediction: runs/version_0/prediction.json" in told
    assert run(["plan", "--config=runs/version_0/config.yaml"]) == 0
    assert read_prediction(1) == content


def test_plan_defaults_to_half_of_the_attention_on_this_machine(monkeypatch):
    monkeypatch.setattr("layershed.performance.prediction.measure_ceilings", lambda *asked: ACCELERATORS["l4"])
    assert run([*PLAN, "--model.dtype=float32"]) == 0
    content = read_prediction()
    assert [s.name for s in DropPlan.from_dict(content["plan"])] == ["attention.1"]
    assert content["dtype"] == "float32"
    assert content["ceilings"]["memory"] == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_plan_of_a_dropped_model_predicts_its_missing_sublayers(saved, without_two, capsys, planned):
    assert run(["plan", f"--model.pretrained={without_two}", "--device=h100", *PLAN[2:]]) == 0
    told, lacking = capsys.readouterr().out, read_prediction()
    assert [s.name for s in DropPlan.from_dict(lacking["plan"])] == ["attention.1", "mlp.2"]
    assert "The deepest sublayers go first" not in told, "it is known which are gone"
    assert lacking["dense"]["parameters"] == AutoModelForCausalLM.from_pretrained(saved).num_parameters()
    assert lacking["dropped"]["parameters"] == ls.load_pretrained(without_two).num_parameters()

    # the same of the dense model, by a plan that a run wrote
    model = ls.load_pretrained(saved)
    DropPlan(tuple(Drop(s) for s in ls.find_sublayers(model) if s.name in ("attention.1", "mlp.2"))).save("plan.json")
    assert run(["plan", f"--model.pretrained={saved}", "--device=h100", "--plan=plan.json", *PLAN[2:]]) == 0
    assert "The deepest sublayers go first" not in capsys.readouterr().out
    assert read_prediction(1) == lacking
