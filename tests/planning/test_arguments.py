"""Arguments of the wrong type are refused in a sentence, and the model stays as it is."""

from pathlib import Path

import pytest
import torch

import layershed as ls
from layershed.errors import BatchError, NoSublayersFoundError, PlanError, SelectionError, UnknownNameError
from layershed.planning.plan import Sublayer
from tests.support.models import build_model

ONE = Sublayer(1, "mlp", "model.layers.1.mlp")
IDS = torch.arange(1, 9)[None]
SCORES = {ONE: 0.5, Sublayer(0, "mlp", "model.layers.0.mlp"): 0.2}

SUBLAYERS = {
    "path": ("plan.json", r"DropPlan\.load"),
    "Path": (Path("plan.json"), r"DropPlan\.load"),
    "names": (["mlp.1"], "'mlp.1' is no Sublayer"),
    "numbers": ([1], "1 is no Sublayer"),
    "one sublayer": (ONE, r"Give \[sublayer\]"),
    "nothing": (3, "got a int"),
}


@pytest.mark.parametrize("act", [ls.bypass, ls.remove, ls.restore], ids=["bypass", "remove", "restore"])
@pytest.mark.parametrize("what", SUBLAYERS)
def test_surgery_refuses_what_are_no_sublayers(what, act):
    given, words = SUBLAYERS[what]
    model = build_model()
    before = model(IDS).logits
    with pytest.raises(PlanError, match=words):
        act(model, given)
    assert torch.equal(model(IDS).logits, before)


SELECTIONS = {
    "count as text": ({"count": "1"}, "count must be an int"),
    "count as float": ({"count": 1.0}, "count must be an int"),
    "ratio as text": ({"ratio": "half"}, "ratio must be a number"),
    "protect as a number": ({"count": 1, "protect": 0}, r"Give \[0\]"),
    "protect by name": ({"count": 1, "protect": ["mlp.1"]}, "neither a block's index nor a Sublayer"),
}


@pytest.mark.parametrize("what", SELECTIONS)
def test_selection_refuses_amounts_of_the_wrong_type(what):
    settings, words = SELECTIONS[what]
    with pytest.raises(SelectionError, match=words):
        ls.select_sublayers(SCORES, "mlp", **settings)


@pytest.mark.parametrize("scores", [None, tuple(SCORES), {"mlp.1": 0.5}], ids=["none", "sublayers", "names"])
def test_selection_refuses_scores_that_map_no_sublayers(scores):
    with pytest.raises(SelectionError, match="estimate_importance"):
        ls.select_sublayers(scores, "mlp", count=1)


@pytest.mark.parametrize("model", ["gpt2", None, torch.nn.Linear], ids=["name", "none", "class"])
def test_model_that_is_no_module_is_refused(model):
    with pytest.raises(NoSublayersFoundError, match="must be a torch module"):
        ls.find_sublayers(model)


def test_metric_that_is_no_name_is_refused():
    with pytest.raises(UnknownNameError):
        ls.estimate_importance(build_model(), [IDS], None)


@pytest.mark.parametrize("read", [ls.estimate_importance, ls.evaluate_quality], ids=["importance", "quality"])
def test_skeleton_is_refused_where_batches_are_read(read):
    with torch.device("meta"):
        skeleton = type(build_model())(build_model().config)
    with pytest.raises(BatchError, match="a skeleton on the meta device"):
        read(skeleton, [IDS])
