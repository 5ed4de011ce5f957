"""Selection against a brute-force reference that takes one candidate at a time."""

import copy
import math
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from layershed.errors import SelectionError
from layershed.planning.plan import Drop, DropPlan, ImportanceScores, Sublayer
from layershed.planning.selection import (
    check_selection,
    plan_of_groups,
    protected_sublayers,
    rank_sublayers,
    select_sublayers,
)

NAMES = {"attention": "self_attn", "mlp": "mlp"}


def sublayer(block, kind):
    return Sublayer(block, kind, f"model.layers.{block}.{NAMES[kind]}")


def make_scores(attention, mlp, blocks=None):
    """Scores from lists by block; None where a sublayer is already dropped."""
    by_kind = {"mlp": mlp, "attention": attention}  # deliberately not in forward order, which must not matter
    content = {sublayer(i, kind): s for kind, own in by_kind.items() for i, s in enumerate(own) if s is not None}
    return ImportanceScores(content, blocks=dict(enumerate(blocks or [])))


def brute_force(scores, scope, count, protected_blocks=()):
    """Take the least important candidate ``count`` times, scanning in forward order."""
    ranked = scores.blocks if scope == "block" else scores
    left = [c for c in sorted(ranked) if (c if scope == "block" else c.block) not in protected_blocks]
    if scope in ("attention", "mlp"):
        left = [candidate for candidate in left if candidate.kind == scope]
    drops = []
    for _ in range(count):
        best = left[0]
        for candidate in left[1:]:
            if ranked[candidate] < ranked[best]:
                best = candidate
        left.remove(best)
        members = [best] if scope != "block" else [s for s in sorted(scores) if s.block == best]
        drops += [Drop(member, ranked[best]) for member in members]
    return drops


@st.composite
def cases(draw):
    blocks = draw(st.integers(1, 6))
    # few distinct values, so that ties are common
    values = st.lists(st.sampled_from([0.0, 0.1, 0.2, 1.5]), min_size=blocks, max_size=blocks)
    protected = draw(st.sets(st.integers(0, blocks - 1), max_size=blocks - 1))
    scope = draw(st.sampled_from(["attention", "mlp", "block", "joint"]))
    free = (blocks - len(protected)) * (2 if scope == "joint" else 1)
    scores = make_scores(draw(values), draw(values), draw(values))
    return scores, scope, draw(st.integers(1, free)), protected, draw(st.permutations(list(scores.items())))


@given(cases())
def test_selection_equals_brute_force(case):
    scores, scope, count, protected, shuffled = case
    expected = brute_force(scores, scope, count, protected)
    assert list(select_sublayers(scores, scope, count=count, protect=protected).drops) == expected
    again = ImportanceScores(dict(shuffled), blocks=scores.blocks)
    assert list(select_sublayers(again, scope, count=count, protect=protected).drops) == expected


@given(cases())
def test_selection_leaves_scores_unchanged(case):
    scores, scope, count, protected, _ = case
    before, blocks = list(copy.deepcopy(scores).items()), list(scores.blocks.items())
    select_sublayers(scores, scope, count=count, protect=protected)
    assert list(scores.items()) == before
    assert list(scores.blocks.items()) == blocks


@given(st.integers(1, 100), st.integers(1, 99))
@example(100, 29)
def test_ratio_drops_its_share_of_candidates_rounded_down(candidates, percent):
    scores = make_scores([float(i) for i in range(candidates)], [])
    expected = math.floor(Fraction(percent, 100) * candidates)  # exact: 0.29 * 100 must be 29, not 28
    if expected == 0:
        with pytest.raises(SelectionError, match=rf"less than one of {candidates} candidates"):
            select_sublayers(scores, "attention", ratio=percent / 100)
    else:
        assert len(select_sublayers(scores, "attention", ratio=percent / 100)) == expected


def test_ratio_counts_protected_sublayers_as_candidates():
    scores = make_scores([0.1, 0.2, 0.3, 0.4], [])
    plan = select_sublayers(scores, "attention", ratio=0.5, protect=[0])
    assert [s.block for s in plan] == [1, 2]


@pytest.mark.parametrize(("candidates", "least"), [(3, 0.3334), (8, 0.125), (32, 0.0313)])
def test_tiny_ratio_error_names_the_smallest_working_ratio(candidates, least):
    scores = make_scores([0.1] * candidates, [])
    with pytest.raises(SelectionError, match=f"smallest ratio that drops something is {least}"):
        select_sublayers(scores, "attention", ratio=1e-6)
    assert len(select_sublayers(scores, "attention", ratio=least)) == 1


def test_joint_scope_ranks_both_kinds_in_one_array():
    plan = select_sublayers(make_scores([0.5, 0.1], [0.2, 0.6]), count=3)
    assert [s.name for s in plan] == ["attention.1", "mlp.0", "attention.0"]
    assert plan.scope == "joint"


def test_equal_scores_are_dropped_in_forward_order():
    plan = select_sublayers(make_scores([0.1] * 3, [0.1] * 3), count=5)
    assert [s.name for s in plan] == ["attention.0", "mlp.0", "attention.1", "mlp.1", "attention.2"]


def test_block_drop_ranks_by_block_importance():
    scores = make_scores([0.1, 0.9, 0.9], [0.1, 0.9, 0.9], blocks=[0.8, 0.3, 0.5])
    plan = select_sublayers(scores, "block", count=2)
    assert [s.name for s in plan] == ["attention.1", "mlp.1", "attention.2", "mlp.2"]
    assert [drop.score for drop in plan.drops] == [0.3, 0.3, 0.5, 0.5]


def test_block_drop_takes_the_remaining_sublayer_of_a_block():
    scores = make_scores([None, 0.9], [0.1, 0.9], blocks=[0.1, 0.3])
    assert [s.name for s in select_sublayers(scores, "block", count=1)] == ["mlp.0"]


@pytest.mark.parametrize("blocks", [None, []], ids=["none", "empty"])
def test_block_drop_without_block_importances_is_refused(blocks):
    scores = make_scores([0.1], [0.2], blocks)
    for given_scores in (scores, dict(scores)):
        with pytest.raises(SelectionError, match=r"needs block importances.*estimate_importance"):
            select_sublayers(given_scores, "block", count=1)


@pytest.mark.parametrize(
    ("protect", "left"),
    [
        pytest.param([0], ["attention.1", "mlp.1", "attention.2", "mlp.2"], id="first"),
        pytest.param([-1], ["attention.0", "mlp.0", "attention.1", "mlp.1"], id="last"),
        pytest.param([0, -1, 2], ["attention.1", "mlp.1"], id="last twice"),
        pytest.param([-3, -2], ["attention.2", "mlp.2"], id="from the end"),
        pytest.param(
            [sublayer(1, "mlp")], ["attention.0", "mlp.0", "attention.1", "attention.2", "mlp.2"], id="sublayer"
        ),
        pytest.param([sublayer(0, "attention"), 2], ["mlp.0", "attention.1", "mlp.1"], id="sublayer and block"),
        pytest.param((block for block in (0, 1)), ["attention.2", "mlp.2"], id="generator"),
    ],
)
def test_protect_accepts_sublayers_and_block_indices(protect, left):
    scores = make_scores([0.1] * 3, [0.1] * 3)
    assert [s.name for s in select_sublayers(scores, count=len(left), protect=protect)] == left


def test_protected_sublayer_protects_its_block_from_block_drop():
    scores = make_scores([0.1, 0.2], [0.1, 0.2], blocks=[0.1, 0.2])
    plan = select_sublayers(scores, "block", count=1, protect=[sublayer(0, "mlp")])
    assert [s.block for s in plan] == [1, 1]


@pytest.mark.parametrize("block", [3, -4, 99])
def test_protecting_a_missing_block_is_refused(block):
    with pytest.raises(SelectionError, match=rf"no block {block}; blocks go from 0 to 2"):
        select_sublayers(make_scores([0.1] * 3, [0.1] * 3), count=1, protect=[block])


@pytest.mark.parametrize(("protect", "left"), [([2], {0, 1}), ([-2], {0}), ([-1], {0, 1})], ids=str)
def test_protected_blocks_stay_protected_in_later_rounds(protect, left):
    """Block 2 of three is bypassed and has no scores. Resolved anew, -2 would mean another block."""
    model = make_scores([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    kept = protected_sublayers(iter(model), protect)
    later = make_scores([0.1, 0.2], [0.1, 0.2])
    assert {s.block for s in select_sublayers(later, count=2 * len(left), protect=kept)} == left
    with pytest.raises(SelectionError, match="only"):
        select_sublayers(later, count=2 * len(left) + 1, protect=kept)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"scope": "layers", "count": 1}, "scope='layers'.*attention, mlp, block, joint"),
        ({}, "count=None, ratio=None: give exactly one"),
        ({"count": 1, "ratio": 0.5}, r"count=1, ratio=0\.5: give exactly one"),
        ({"count": 0}, "count=0: count must be at least 1"),
        ({"count": -2}, "count=-2"),
        *(({"ratio": ratio}, rf"ratio={ratio}: ratio must be in \(0, 1\)") for ratio in (0, 1, 1.2, -0.1, math.nan)),
    ],
    ids=str,
)
def test_invalid_selection_is_refused_without_scores(arguments, names):
    with pytest.raises(SelectionError, match=names):
        check_selection(**{"scope": "joint", "count": None, "ratio": None, **arguments})
    with pytest.raises(SelectionError, match=names):
        select_sublayers(make_scores([0.1], [0.2]), **arguments)


@pytest.mark.parametrize(("scope", "count"), [("attention", 2), ("mlp", 1), ("joint", 9), ("block", 1)])
def test_check_selection_accepts_valid_counts_and_ratios(scope, count):
    assert check_selection(scope, count=count, ratio=None) is None
    assert check_selection(scope, count=None, ratio=0.01) is None


@pytest.mark.parametrize(("scope", "exist"), [("attention", 3), ("mlp", 2), ("joint", 5), ("block", 3)])
def test_count_above_the_number_of_candidates_is_refused(scope, exist):
    scores = make_scores([0.1, 0.2, 0.3], [0.1, 0.2], blocks=[0.1, 0.2, 0.3])
    select_sublayers(scores, scope, count=exist)
    with pytest.raises(SelectionError, match=rf"asked to drop {exist + 1}, but there are only {exist} candidates\."):
        select_sublayers(scores, scope, count=exist + 1)


def test_count_error_names_the_number_of_protected_sublayers():
    scores = make_scores([0.1, 0.2, 0.3], [])
    with pytest.raises(SelectionError, match=r"drop 3, but there are only 1 candidates \(2 more are protected\)"):
        select_sublayers(scores, "attention", count=3, protect=[0, 1])


@pytest.mark.parametrize("scores", [{}, {sublayer(0, "mlp"): 0.5}], ids=["no scores", "other scope"])
def test_scope_without_scores_is_refused(scores):
    with pytest.raises(SelectionError, match=f"none of the {len(scores)} scores are of that scope"):
        select_sublayers(scores, "attention", count=1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_score_is_refused_with_its_sublayer_name(bad):
    with pytest.raises(SelectionError, match=r"importance of attention\.1 is .*calibration data"):
        select_sublayers(make_scores([0.1, bad], [0.1, 0.2]), count=1)
    with pytest.raises(SelectionError, match=r"importance of attention\.1 is"):
        select_sublayers(make_scores([0.1, 0.2], [0.1, 0.2], blocks=[0.1, bad]), "block", count=1)
    # not ranked, so it does not matter
    assert [s.name for s in select_sublayers(make_scores([0.1, bad], [0.1, 0.2]), "mlp", count=1)] == ["mlp.0"]


def test_plan_records_scope_and_metric():
    scores = ImportanceScores(make_scores([0.3], [0.25]), metric="angular", tokens=10)
    plan = select_sublayers(scores, "mlp", count=1)
    assert plan == DropPlan((Drop(sublayer(0, "mlp"), 0.25, None),), "mlp", "angular")
    assert select_sublayers(dict(scores), "mlp", count=1).metric is None


def times(attention, mlp):
    """Seconds by sublayer, from lists of milliseconds by block."""
    return {sublayer: ms / 1000 for sublayer, ms in make_scores(attention, mlp).items()}


def test_speed_objective_ranks_by_importance_per_millisecond():
    scores = make_scores([0.2, 0.3], [0.4, 0.1])
    # importance per millisecond: 0.2, 0.075, 0.05, 0.1
    latency = times([1, 4], [8, 1])
    plan = select_sublayers(scores, count=4, objective="speed", latency=latency)
    assert [s.name for s in plan] == ["mlp.0", "attention.1", "mlp.1", "attention.0"]
    assert [drop.score for drop in plan.drops] == [0.4, 0.3, 0.1, 0.2]  # importances, not importances per millisecond
    assert [s.name for s in select_sublayers(scores, count=4)] == ["mlp.1", "attention.0", "attention.1", "mlp.0"]
    one = select_sublayers(scores, "attention", count=1, objective="speed", latency=latency)
    assert [s.name for s in one] == ["attention.1"]


def test_speed_objective_adds_the_latencies_of_a_block():
    scores = make_scores([0.1] * 3, [0.1] * 3, blocks=[0.3, 0.4, 0.5])
    latency = times([1, 5, 2], [1, 1, 8])  # 0.15, 0.067, 0.05
    plan = select_sublayers(scores, "block", count=3, objective="speed", latency=latency)
    assert [s.block for s in plan] == [2, 2, 1, 1, 0, 0]
    assert [drop.score for drop in plan.drops] == [0.5, 0.5, 0.4, 0.4, 0.3, 0.3]
    left = make_scores([None, 0.1], [0.1, 0.1], blocks=[0.1, 0.4])
    some = {s: t for s, t in times([9, 1], [1, 2]).items() if s in left}
    assert [s.name for s in select_sublayers(left, "block", count=1, objective="speed", latency=some)] == ["mlp.0"]


def test_speed_objective_treats_negative_importance_as_zero():
    scores = make_scores([-1e-8, -2e-8], [0.0, 0.1])
    plan = select_sublayers(scores, count=3, objective="speed", latency=times([1, 100], [10, 1]))
    assert [s.name for s in plan] == ["attention.0", "mlp.0", "attention.1"]  # all cost nothing, so forward order


@given(cases(), st.integers(0, 99))
def test_speed_objective_is_deterministic_and_ignores_equal_latencies(case, seed):
    scores, scope, count, protected, shuffled = case
    latency = dict.fromkeys(scores, 0.003)
    plain = select_sublayers(scores, scope, count=count, protect=protected)
    assert select_sublayers(scores, scope, count=count, protect=protected, latency=latency) == plain
    options = {"protect": protected, "objective": "speed"}
    assert select_sublayers(scores, scope, count=count, latency=latency, **options) == plain
    own = {s: 0.001 * (1 + (seed * (i + 3)) % 5) for i, s in enumerate(scores)}
    again = ImportanceScores(dict(shuffled), blocks=scores.blocks)
    plans = [select_sublayers(each, scope, count=count, latency=own, **options) for each in (scores, again, scores)]
    assert plans[0] == plans[1] == plans[2]


@given(cases())
def test_selection_is_a_prefix_of_the_ranking(case):
    scores, scope, count, protected, _ = case
    ranked = rank_sublayers(scores, scope, protect=protected)
    assert plan_of_groups(scores, scope, ranked[:count]) == select_sublayers(
        scores, scope, count=count, protect=protected
    )
    assert all(len(group) == (2 if scope == "block" else 1) for group in ranked)
    assert not any(drop.sublayer.block in protected for group in ranked for drop in group)


def test_missing_latency_error_names_the_sublayer():
    scores = make_scores([0.1, 0.2], [0.1, 0.2], blocks=[0.1, 0.2])
    known = times([1, 1], [1, None])
    for latency in (None, {}, known):
        for scope in ("joint", "block"):
            with pytest.raises(SelectionError, match=r"no latency of .*latency=measure_latency\(model"):
                select_sublayers(scores, scope, count=1, objective="speed", latency=latency)
    with pytest.raises(SelectionError, match=r"no latency of mlp\.1"):
        select_sublayers(scores, count=1, objective="speed", latency=known)
    # not ranked, so its latency is not needed
    plan = select_sublayers(scores, "mlp", count=1, protect=[1], objective="speed", latency=known)
    assert [s.name for s in plan] == ["mlp.0"]


def test_unknown_objective_is_refused():
    with pytest.raises(SelectionError, match="objective='size': objective must be one of importance, speed"):
        select_sublayers(make_scores([0.1], [0.2]), count=1, objective="size")
