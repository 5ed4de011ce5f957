"""Drop plans survive JSON unchanged, and malformed ones are refused."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layershed.errors import PlanError
from layershed.planning.plan import Drop, DropPlan, ImportanceScores, Sublayer, count_by_kind

A0, A1 = (Sublayer(block, "attention", f"model.layers.{block}.self_attn") for block in (0, 1))
M0, M1 = (Sublayer(block, "mlp", f"model.layers.{block}.mlp") for block in (0, 1))

sublayers = st.builds(Sublayer, st.integers(0, 200), st.sampled_from(["attention", "mlp"]), st.text(max_size=20))
scores = st.none() | st.floats(allow_nan=False)
steps = st.none() | st.integers(0, 10**9)
drops = st.lists(st.builds(Drop, sublayers, scores, steps), max_size=8, unique_by=lambda d: d.sublayer.name)
plans = st.builds(
    DropPlan,
    drops.map(tuple),
    st.sampled_from(["attention", "mlp", "block", "joint"]),
    st.none() | st.text(max_size=10),
)


@given(plans)
def test_plan_survives_json(plan):
    again = DropPlan.from_json(plan.to_json())
    assert again == plan
    assert [drop.score for drop in again.drops] == [drop.score for drop in plan.drops]
    assert DropPlan.from_dict(plan.to_dict()) == plan


@given(plans)
def test_plan_repr_evaluates_back(plan):
    assert eval(repr(plan), {"DropPlan": DropPlan, "Drop": Drop, "Sublayer": Sublayer, "inf": math.inf}) == plan


def test_plan_json_is_plain_and_readable():
    plan = DropPlan((Drop(M1, 0.25, 100), Drop(A0)), scope="joint", metric="cosine")
    assert json.loads(plan.to_json()) == {
        "format": "layershed.drop_plan.v1",
        "scope": "joint",
        "metric": "cosine",
        "drops": [
            {"block": 1, "kind": "mlp", "path": "model.layers.1.mlp", "score": 0.25, "step": 100},
            {"block": 0, "kind": "attention", "path": "model.layers.0.self_attn", "score": None, "step": None},
        ],
    }


def test_saved_plan_loads_equal(tmp_path):
    plan = DropPlan((Drop(Sublayer(0, "mlp", "Schicht.0.größe"), 1 / 3),), scope="mlp")
    plan.save(tmp_path / "plan.json")
    assert DropPlan.load(tmp_path / "plan.json") == plan
    assert DropPlan.load(str(tmp_path / "plan.json")) == plan


ENTRY = {"block": 1, "kind": "mlp", "path": "m", "score": 0.5, "step": 3}
CONTENT = {"format": "layershed.drop_plan.v1", "scope": "mlp", "metric": "cosine", "drops": [ENTRY]}


def test_valid_content_loads_as_a_plan():
    assert DropPlan.from_dict(CONTENT) == DropPlan((Drop(Sublayer(1, "mlp", "m"), 0.5, 3),), "mlp", "cosine")
    assert DropPlan.from_dict({**CONTENT, "drops": [{**ENTRY, "score": 1}]}).drops[0].score == 1.0


def without(mapping, key):
    return {name: value for name, value in mapping.items() if name != key}


@pytest.mark.parametrize(
    ("content", "names"),
    [
        pytest.param([], "the plan must be of type dict", id="a list"),
        pytest.param(None, "the plan must be of type dict", id="null"),
        pytest.param(without(CONTENT, "format"), "format is None", id="without format"),
        pytest.param(
            {**CONTENT, "format": "layershed.drop_plan.v2"},
            "format is 'layershed.drop_plan.v2', expected",
            id="newer format",
        ),
        pytest.param(without(CONTENT, "scope"), "scope must be of type str", id="without scope"),
        pytest.param({**CONTENT, "scope": ["mlp"]}, "scope must be of type str", id="scope as a list"),
        pytest.param(
            {**CONTENT, "scope": "layers"}, "scope='layers'.*attention, mlp, block, joint", id="unknown scope"
        ),
        pytest.param({**CONTENT, "metric": 3}, "metric must be of type str", id="metric as a number"),
        pytest.param(without(CONTENT, "drops"), "drops must be of type list", id="without drops"),
        pytest.param({**CONTENT, "drops": {}}, "drops must be of type list", id="drops as a mapping"),
        pytest.param({**CONTENT, "drops": ["mlp.1"]}, "an entry of drops must be of type dict", id="entry as a name"),
        pytest.param({**CONTENT, "drops": [ENTRY, ENTRY]}, r"mlp\.1 appears twice", id="entry twice"),
        pytest.param(
            {**CONTENT, "drops": [ENTRY, {**ENTRY, "path": "other"}]}, r"mlp\.1 appears twice", id="sublayer twice"
        ),
        *(
            pytest.param({**CONTENT, "drops": [{**ENTRY, **change}]}, names, id=str(change)[:24])
            for change, names in [
                ({"block": -1}, "block must not be negative"),
                ({"block": 1.0}, "block must be of type int"),
                ({"block": True}, "block must be of type int"),
                ({"block": "1"}, "block must be of type int"),
                ({"kind": "norm"}, "kind 'norm'"),
                ({"kind": None}, "kind must be of type str"),
                ({"path": 7}, "path must be of type str"),
                ({"score": "low"}, "score must be a number"),
                ({"score": True}, "score must be a number"),
                ({"score": [0.5]}, "score must be a number"),
                ({"score": 10**400}, "score"),
                ({"step": 1.5}, "step must be of type int"),
                ({"step": False}, "step must be of type int"),
            ]
        ),
        *(
            pytest.param({**CONTENT, "drops": [without(ENTRY, key)]}, f"{key} must be of type", id=f"without {key}")
            for key in ("block", "kind", "path")
        ),
    ],
)
def test_malformed_plan_is_refused_with_its_field_name(content, names):
    with pytest.raises(PlanError, match=names):
        DropPlan.from_json(json.dumps(content))


@pytest.mark.parametrize(
    "text",
    ["", "{", "plan", "[" * 100_000, '{"format": ' + "1" * 5000 + "}"],
    ids=["empty", "torn", "word", "nested too deep", "number too long"],
)
def test_plan_text_that_is_not_json_is_refused(text):
    with pytest.raises(PlanError, match="not JSON"):
        DropPlan.from_json(text)


def test_plan_load_error_names_the_file(tmp_path):
    with pytest.raises(PlanError, match=r"no file '.*missing\.json'"):
        DropPlan.load(tmp_path / "missing.json")
    with pytest.raises(PlanError, match="no file"):
        DropPlan.load(tmp_path)
    for name, content in [("torn.json", b"{"), ("bytes.json", b"\xff\xfe\x00"), ("list.json", b"[]")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PlanError, match=name):
            DropPlan.load(tmp_path / name)


def test_plan_with_a_repeated_sublayer_is_refused():
    with pytest.raises(PlanError, match=r"mlp\.0 appears twice"):
        DropPlan((Drop(M0), Drop(A0), Drop(M0)))
    with pytest.raises(PlanError, match=r"mlp\.0 appears twice"):
        DropPlan((Drop(M0),)) + DropPlan((Drop(A0), Drop(M0)))


def test_plan_constructor_checks_scope_and_kind():
    with pytest.raises(PlanError, match="scope='all'"):
        DropPlan((), scope="all")
    with pytest.raises(PlanError, match="kind 'norm'"):
        DropPlan((Drop(Sublayer(0, "norm", "model.norm")),))


def test_at_step_sets_the_step_of_every_entry():
    plan = DropPlan((Drop(M1, 0.1), Drop(A0, 0.2, 7)), "joint", "angular")
    assert plan.at_step(50) == DropPlan((Drop(M1, 0.1, 50), Drop(A0, 0.2, 50)), "joint", "angular")
    assert plan.drops[1].step == 7


def test_sum_of_plans_appends_the_later_round():
    first, second = DropPlan((Drop(M1, 0.1, 10),), "mlp", "cosine"), DropPlan((Drop(A0, 0.2, 20),), "joint", "angular")
    assert first + second == DropPlan((Drop(M1, 0.1, 10), Drop(A0, 0.2, 20)), "joint", "angular")
    assert first.at_step(3) + DropPlan((), "mlp", "cosine") == first.at_step(3)


def test_plan_is_an_ordered_collection_of_sublayers():
    plan = DropPlan((Drop(M1, 0.1), Drop(A0, 0.2)))
    assert list(plan) == [M1, A0]
    assert len(plan) == 2
    assert M1 in plan
    assert A1 not in plan
    assert M1.name not in plan


def test_sublayers_sort_in_forward_order():
    assert sorted([M1, A1, M0, A0]) == [A0, M0, A1, M1]
    assert A1.name == "attention.1"


def test_count_by_kind_includes_zeros():
    assert count_by_kind([A0, M0, A1]) == {"attention": 2, "mlp": 1}
    assert count_by_kind([]) == {"attention": 0, "mlp": 0}


def test_importance_scores_are_a_mapping_with_provenance():
    given = {M0: 0.5, A0: 0.25}
    own = ImportanceScores(given, blocks={0: 0.75}, metric="angular", tokens=9)
    assert own == given
    assert (own.blocks, own.metric, own.tokens) == ({0: 0.75}, "angular", 9)
    assert list(own.rows()) == [(0, "attention", 0.25), (0, "mlp", 0.5), (0, "block", 0.75)]
    again = eval(repr(own), {"ImportanceScores": ImportanceScores, "Sublayer": Sublayer})
    assert (again, again.blocks, again.metric, again.tokens) == (own, own.blocks, own.metric, own.tokens)
