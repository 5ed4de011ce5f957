"""Plans record the model that they were made for; JSON and repr keep the record, and malformed ones are refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layershed.errors import PlanError
from layershed.planning.model_record import ModelRecord, compact
from layershed.planning.plan import KINDS, Drop, DropPlan, ImportanceScores, Sublayer
from layershed.planning.selection import select_sublayers

LLAMA = ModelRecord("LlamaForCausalLM", 4, "attention: 0-3; mlp: 0-3")
M1 = Sublayer(1, "mlp", "model.layers.1.mlp")

places = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 60)))


def expanded(text):
    """The inverse of compact, written independently."""
    found = set()
    for part in filter(None, text.split("; ")):
        kind, ranges = part.split(": ")
        for each in ranges.split(", "):
            first, _, last = each.partition("-")
            found |= {(kind, block) for block in range(int(first), int(last or first) + 1)}
    return found


@given(places)
def test_compact_form_names_every_place_once_and_is_accepted(given_places):
    text = compact(given_places)
    assert expanded(text) == set(given_places)
    assert compact(sorted(set(given_places))) == text
    assert ModelRecord("M", 61, text).sublayers == text


@given(places, st.integers(0, 99))
def test_plan_with_a_record_survives_json_and_repr(given_places, blocks):
    plan = DropPlan(
        (Drop(M1, 0.5, 3),), "mlp", "cosine", ModelRecord("LlamaForCausalLM", blocks, compact(given_places))
    )
    assert DropPlan.from_json(plan.to_json()) == plan
    names = {"DropPlan": DropPlan, "Drop": Drop, "Sublayer": Sublayer, "ModelRecord": ModelRecord}
    assert eval(repr(plan), names) == plan
    scores = ImportanceScores({M1: 0.5}, model=plan.model)
    again = eval(repr(scores), {**names, "ImportanceScores": ImportanceScores})
    assert (again, again.model) == (scores, scores.model)


def test_record_in_json_is_readable():
    content = json.loads(DropPlan((Drop(M1),), "mlp", None, LLAMA).to_json())
    assert content["model"] == {"class": "LlamaForCausalLM", "blocks": 4, "sublayers": "attention: 0-3; mlp: 0-3"}
    assert str(LLAMA) == "LlamaForCausalLM with 4 blocks (attention: 0-3; mlp: 0-3)"


def test_plan_file_without_a_record_loads():
    plan = DropPlan.from_dict({"format": "layershed.drop_plan.v1", "scope": "mlp", "metric": None, "drops": []})
    assert plan.model is None


VALID = {"class": "LlamaForCausalLM", "blocks": 4, "sublayers": "mlp: 0-3"}


@pytest.mark.parametrize(
    ("model", "names"),
    [
        pytest.param([], "model must be of type dict", id="a list"),
        pytest.param({}, r"model\.class must be of type str", id="empty"),
        pytest.param({**VALID, "class": 3}, r"model\.class must be of type str", id="class as a number"),
        pytest.param({**VALID, "class": "a b\n"}, r"model\.class must be the name of a class", id="class with a space"),
        pytest.param({**VALID, "blocks": 4.0}, r"model\.blocks must be of type int", id="blocks as a float"),
        pytest.param({**VALID, "blocks": True}, r"model\.blocks must be of type int", id="blocks as a bool"),
        pytest.param({**VALID, "blocks": -1}, r"model\.blocks must not be negative", id="negative blocks"),
        pytest.param({**VALID, "sublayers": ["mlp"]}, r"model\.sublayers must be of type str", id="sublayers listed"),
        pytest.param({**VALID, "sublayers": "mlp 0-3"}, r"model\.sublayers must be like", id="other form"),
        pytest.param({**VALID, "sublayers": "mlp: 0" + ", 1" * 9999}, r"model\.sublayers must be", id="too long"),
    ],
)
def test_malformed_record_is_refused_with_its_field_name(model, names):
    content = {"format": "layershed.drop_plan.v1", "scope": "mlp", "metric": None, "drops": [], "model": model}
    with pytest.raises(PlanError, match=names):
        DropPlan.from_json(json.dumps(content))


def test_selection_passes_the_record_of_the_scores_on():
    scores = ImportanceScores({M1: 0.5}, blocks={1: 0.5}, model=LLAMA)
    for scope in ("mlp", "block", "joint"):
        assert select_sublayers(scores, scope, count=1).model == LLAMA
    assert select_sublayers({M1: 0.5}, "mlp", count=1).model is None


def test_rounds_keep_the_record_and_rounds_of_two_models_are_refused():
    first, later = DropPlan((Drop(M1),), "mlp", None, LLAMA), DropPlan((Drop(Sublayer(2, "mlp", "m")),), "mlp")
    assert (first + later).model == (later + first).model == first.at_step(3).model == LLAMA
    other = DropPlan(later.drops, "mlp", None, ModelRecord("LlamaForCausalLM", 6, "mlp: 0-5"))
    with pytest.raises(PlanError, match=r"different models: .* 4 blocks .* 6 blocks"):
        first + other
