"""The search for a target speedup, with known seconds per sublayer, against all prefixes of the ranking."""

import math
import random
from dataclasses import replace

import pytest
from torch import nn

from layershed.discovery.find import find_sublayers
from layershed.errors import SelectionError, SpeedupError, UnknownNameError
from layershed.performance import speedup_target as targeting
from layershed.performance.intervals import Interval
from layershed.performance.latency import Latency
from layershed.performance.speed import SpeedReport
from layershed.performance.speedup_target import check_choice, check_reachable, drop_to_speedup
from layershed.performance.stopwatch import SpeedSettings
from layershed.planning.plan import ImportanceScores
from layershed.surgery import bypass, bypassed_sublayers, restore
from tests.support.models import build_model
from tests.support.thinned import crossed, one_of
from tests.support.ticking import Ticking, install

SETTINGS = SpeedSettings(prompt_tokens=3, new_tokens=2, runs=1, warmup=0)


def decoding_at(report, speedup):
    """The report with this speedup of decoding."""
    return replace(report, phases={**report.phases, "decode": replace(report.decode, speedup=speedup)})


class Case:
    """A model of four blocks with random seconds and random scores."""

    def __init__(self, monkeypatch, seed=0):
        generator = random.Random(seed)
        keys = [(block, kind) for block in range(4) for kind in ("attention", "mlp")]
        # whole seconds, so that sums are exact
        decode, prefill = ({key: float(generator.randint(1, 9)) for key in keys} for _ in range(2))
        self.clock = install(monkeypatch, Ticking(lambda *key: decode[key], lambda *key: prefill[key], rest=5.0))
        self.model = build_model()
        self.clock.watch(self.model)
        self.sublayers = find_sublayers(self.model)
        scores = {s: generator.random() for s in self.sublayers}
        self.scores = ImportanceScores(scores, blocks={b: generator.random() for b in range(4)}, metric="angular")

    def speedup(self, dropped, phase="decode"):
        return self.clock.speedup({(s.block, s.kind) for s in dropped}, phase=phase)

    def drop(self, target, scope="joint", **options):
        return drop_to_speedup(self.model, self.scores, target, scope, **{"settings": SETTINGS, **options})


@pytest.fixture
def case(monkeypatch):
    return Case(monkeypatch)


def prefixes(case, scope, phase, objective="importance", gone=()):
    """All prefixes of the ranking, computed without the tested code."""
    if scope == "block":
        groups = {b: [s for s in case.sublayers if s.block == b] for b in range(4)}
        importance = case.scores.blocks
    else:
        groups = {s: [s] for s in case.sublayers if scope in ("joint", s.kind)}
        importance = case.scores
    cost = getattr(case.clock, phase)
    price = {
        key: importance[key] / (sum(cost(s.block, s.kind) for s in members) if objective == "speed" else 1)
        for key, members in groups.items()
    }
    order = [[s for s in groups[key] if s not in gone] for key in sorted(groups, key=price.__getitem__)]
    order = [group for group in order if group]
    return [[s for group in order[:n] for s in group] for n in range(len(order) + 1)]


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    ("scope", "phase", "objective"),
    crossed(("joint", "attention", "mlp", "block"), ("decode", "prefill"), ("importance", "speed")),
)
@pytest.mark.parametrize("seed", one_of([0, 1]))
def test_search_drops_the_fewest_sublayers_that_reach_the_target(monkeypatch, seed, scope, phase, objective):
    case = Case(monkeypatch, seed)
    ways = prefixes(case, scope, phase, objective)
    target = random.Random(seed).uniform(1.01, case.speedup(ways[-1], phase))
    least = next(way for way in ways if case.speedup(way, phase) >= target)
    plan, report = case.drop(target, scope, phase=phase, objective=objective)
    assert list(plan) == least
    assert bypassed_sublayers(case.model) == tuple(sorted(least))
    assert report.phases[phase].speedup.median == pytest.approx(case.speedup(least, phase))
    assert (plan.scope, plan.metric) == (scope, "angular")
    by = case.scores.blocks if scope == "block" else case.scores
    assert [drop.score for drop in plan.drops] == [by[s.block if scope == "block" else s] for s in least]


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("number", [1, 4, 8, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 5, 6, 7))])
def test_exactly_reached_target_is_accepted(case, number):
    ways = prefixes(case, "joint", "decode")
    for nudge, expected in ((1 - 1e-9, number), (1 + 1e-9, number + 1)):
        target = case.speedup(ways[number]) * nudge
        if expected == 9:
            with pytest.raises(SpeedupError, match="out of reach"):
                case.drop(target)
            assert bypassed_sublayers(case.model) == ()
            break
        plan, _ = case.drop(target)
        assert list(plan) == ways[expected]
        restore(case.model)


def test_search_keeps_protected_sublayers(case):
    ways = prefixes(case, "joint", "decode")[-1]
    protected = ways[0]
    order = [s for s in ways if s.block != 3 and s != protected]
    target = case.speedup(order[:3]) * (1 - 1e-9)
    plan, _ = case.drop(target, protect=[protected, -1])
    assert list(plan) == order[:3]


def test_unreachable_target_error_names_the_best_speedup_and_restores_the_model(case):
    bypass(case.model, case.sublayers[:1])
    best = case.speedup([*case.sublayers[:1], *(s for s in case.sublayers if s.kind == "mlp")])
    reached = rf"target_speedup=50 of decode is out of reach: all 4 candidates dropped give x{best:.2f}\."
    with pytest.raises(SpeedupError, match=reached):
        case.drop(50, "mlp")
    assert bypassed_sublayers(case.model) == case.sublayers[:1]


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("gone", [[0], [1, 6], [0, 2, 4, 6]], ids=str)
def test_earlier_drops_count_and_stay_bypassed(case, gone):
    before = [case.sublayers[i] for i in gone]
    bypass(case.model, before)
    ways = prefixes(case, "joint", "decode", gone=before)
    target = case.speedup([*before, *ways[2]]) * (1 - 1e-9)
    plan, _ = case.drop(target)
    assert list(plan) == ways[2]
    assert bypassed_sublayers(case.model) == tuple(sorted([*before, *ways[2]]))


def test_search_drops_nothing_if_earlier_drops_reach_the_target(case):
    before = case.sublayers[:4]
    bypass(case.model, before)
    plan, report = case.drop(1.05)
    assert len(plan) == 0
    assert bypassed_sublayers(case.model) == before
    assert report.decode.speedup.median == pytest.approx(case.speedup(before))


def test_search_uses_only_measurements_of_rank_0(case):
    asked = []

    def agree(measured):
        asked.append(type(measured))
        if isinstance(measured, Latency):
            return measured
        # rank 0 needs two drops to be fast
        fast = 9.0 if len(bypassed_sublayers(case.model)) >= 2 else 1.0
        return decoding_at(measured, Interval(fast, fast, fast))

    plan, report = case.drop(5.0, agree=agree)
    assert list(plan) == prefixes(case, "joint", "decode")[2]
    assert report.decode.speedup.median == 9.0
    assert asked[0] is Latency
    assert set(asked[1:]) == {SpeedReport}
    assert len(asked) <= 1 + 4 + math.log2(8)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("failing", [1, 2, 3])
def test_error_during_the_search_restores_the_model(case, failing):
    bypass(case.model, case.sublayers[5:6])
    calls = []

    def agree(measured):
        calls.append(measured)
        if len(calls) == failing:
            raise KeyboardInterrupt
        if failing == 3 and isinstance(measured, SpeedReport):
            slow = Interval(1.0, 1.0, 1.0)  # too slow, so the search goes on
            return decoding_at(measured, slow)
        return measured

    with pytest.raises(KeyboardInterrupt):
        case.drop(1.5, agree=agree)
    assert len(calls) == failing
    assert bypassed_sublayers(case.model) == case.sublayers[5:6]


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_wrong_latencies_do_not_change_the_result_of_the_search(case, noise):
    ways = prefixes(case, "joint", "decode")

    def agree(measured):
        if isinstance(measured, Latency):
            return Latency({s: noise * seconds for s, seconds in measured.sublayers.items()}, measured.total)
        return measured

    plan, _ = case.drop(case.speedup(ways[4]) * (1 - 1e-9), agree=agree)
    assert list(plan) == ways[4]


def test_search_with_everything_protected_is_refused(case):
    with pytest.raises(SelectionError, match=r"scope='joint': .*protected"):
        case.drop(1.2, protect=range(4))


def test_search_finds_a_transformer_by_name(case):
    holder = nn.ModuleDict({"student": case.model, "teacher": build_model("gpt2")})
    ways = prefixes(case, "joint", "decode")
    target = case.speedup(ways[1]) * (1 - 1e-9)
    plan, _ = drop_to_speedup(holder, case.scores, target, settings=SETTINGS, name="student")
    assert list(plan) == ways[1]


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("before", [[], [0, 3]], ids=["dense", "dropped"])
def test_check_reachable_accepts_up_to_the_speedup_of_dropping_everything(case, phase, before):
    if before:
        bypass(case.model, [case.sublayers[i] for i in before])
    state = bypassed_sublayers(case.model)
    may = [s for s in case.sublayers if s.kind == "attention"]
    best = case.speedup({*may, *state}, phase)
    asked = []

    def agree(measured):
        asked.append(bypassed_sublayers(case.model))
        return measured

    check_reachable(case.model, may, best * (1 - 1e-9), phase=phase, settings=SETTINGS, agree=agree)
    assert asked == [tuple(sorted({*may, *state}))]
    assert bypassed_sublayers(case.model) == state
    with pytest.raises(SpeedupError, match=rf"of {phase} is out of reach: .* x{best:.2f}"):
        check_reachable(case.model, may, best * (1 + 1e-9), phase=phase, settings=SETTINGS)
    assert bypassed_sublayers(case.model) == state


def test_check_reachable_accepts_a_target_in_doubt(case):
    def agree(measured):
        return decoding_at(measured, Interval(1.4, 1.2, 1.6))

    check_reachable(case.model, case.sublayers, 1.6, settings=SETTINGS, agree=agree)
    with pytest.raises(SpeedupError, match=r"x1\.40 \[1\.20, 1\.60\]"):
        check_reachable(case.model, case.sublayers, 1.61, settings=SETTINGS, agree=agree)


def test_error_in_check_reachable_restores_the_model(case):
    def agree(_measured):
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone"):
        check_reachable(case.model, case.sublayers, 1.2, settings=SETTINGS, agree=agree)
    assert bypassed_sublayers(case.model) == ()


@pytest.mark.parametrize("target", [1.0, 0.5, -2, math.nan])
def test_target_of_at_most_1_is_refused_before_running(llama, target):
    llama.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(SpeedupError, match=f"target_speedup={target}: it must be above 1"):
        drop_to_speedup(llama, {}, target)
    with pytest.raises(SpeedupError, match=f"target_speedup={target}"):
        check_reachable(llama, [], target)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, SelectionError, "count=None, ratio=None, target_speedup=None: give exactly one"),
        ({"count": 1, "target_speedup": 1.2}, SelectionError, "count=1, ratio=None, target_speedup=1.2"),
        ({"count": 1, "ratio": 0.5}, SelectionError, "give exactly one"),
        ({"count": 0}, SelectionError, "count must be at least 1"),
        ({"target_speedup": 1}, SpeedupError, "above 1"),
        ({"target_speedup": 1.2, "scope": "layers"}, SelectionError, "scope='layers'"),
        ({"target_speedup": 1.2, "phase": "training"}, UnknownNameError, "training"),
        ({"target_speedup": 1.2, "objective": "size"}, UnknownNameError, "size"),
    ],
    ids=["nothing", "count and target", "count and ratio", "count", "target", "scope", "phase", "objective"],
)
def test_check_choice_refuses_invalid_arguments(given, error, message):
    with pytest.raises(error, match=message):
        check_choice(**{"scope": "joint", "count": None, "ratio": None, "target_speedup": None, **given})


@pytest.mark.parametrize("given", [{"count": 1}, {"ratio": 0.5}, {"target_speedup": 1.2, "phase": "prefill"}], ids=str)
def test_check_choice_accepts_valid_arguments(given):
    assert check_choice(**{"scope": "block", "count": None, "ratio": None, "target_speedup": None, **given}) is None


def noisy(case, monkeypatch, spread, seed=0):
    """Add random noise to every measurement."""
    generator = random.Random(seed)
    exact = targeting.measure_speed

    def measure(*args, **kwargs):
        report = exact(*args, **kwargs)
        true = report.decode.speedup.median
        seen.append(true * generator.uniform(1 - spread, 1 + spread))
        return decoding_at(report, Interval(seen[-1], 0.0, 99.0))

    seen = []
    monkeypatch.setattr(targeting, "measure_speed", measure)
    return seen


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 12))])
def test_target_must_be_reached_twice_and_the_second_report_is_returned(case, monkeypatch, seed):
    seen = noisy(case, monkeypatch, 0.1, seed)
    target = case.speedup(prefixes(case, "joint", "decode")[4])
    plan, report = case.drop(target)
    told = report.decode.speedup.median
    assert told == seen[-1] >= target
    assert sum(speedup >= target for speedup in seen) >= 2
    assert len(seen) < 20
    assert bypassed_sublayers(case.model) == tuple(sorted(plan))


def test_target_in_doubt_drops_everything_with_a_warning(case, monkeypatch):
    noisy(case, monkeypatch, 0.0)  # the intervals reach up to 99
    everything = prefixes(case, "attention", "decode")[-1]
    best = case.speedup(everything)
    with pytest.warns(UserWarning, match=rf"in doubt with all 4 candidates dropped .*x{best:.2f}"):
        plan, _ = case.drop(best * 1.01, "attention")
    assert list(plan) == everything


def test_search_finds_a_distant_target_in_few_measurements(case, monkeypatch):
    """The search must not advance one by one if the latencies promise far too much."""
    seen = noisy(case, monkeypatch, 0.0)
    monkeypatch.setattr(targeting._Search, "learn", crippled(targeting._Search.learn))
    target = case.speedup(prefixes(case, "joint", "decode")[7]) * (1 - 1e-9)
    plan, _ = case.drop(target)
    assert len(list(plan)) == 7
    assert len(seen) <= targeting._GUESSES + 1 + 3 + 1  # guesses, everything, bisection of what is left, confirmation


def crippled(learn):
    """Predictions that always say that one more is enough, whatever was measured."""

    def learn_nothing(self, number, speedup):
        learn(self, number, speedup)
        self._factor = 1e9

    return learn_nothing
