"""SublayerDrop with a target speedup, or by importance per millisecond, on a clock that a hand can follow."""

import csv
import itertools
import json

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from layershed.callbacks import SublayerDrop
from layershed.discovery.find import find_sublayers
from layershed.errors import MeasurementError, ScheduleError, SelectionError, SpeedupError, UnknownNameError
from layershed.integration import drop_rule
from layershed.performance.speedup_target import check_reachable, drop_to_speedup
from layershed.performance.stopwatch import SpeedSettings
from layershed.planning.schedule import DropSchedule
from layershed.surgery import bypass, bypassed_sublayers, restore
from tests.support.drop_runs import endless, keys, later_rows, outcome, primitive, refused
from tests.support.runs import (
    Foreign,
    HandRun,
    causal_lm,
    fit_foreign,
    loader,
    same,
    val_loader,
)
from tests.support.speed_targets import FAST, enough, queue, watched
from tests.support.thinned import crossed
from tests.support.ticking import Ticking, install


@pytest.fixture
def clock(monkeypatch):
    return install(monkeypatch, Ticking())


def by_hand(choose, at=5, steps=8, since=1):
    """The run without layershed; ``choose`` gets the importances at the drop."""
    hand = HandRun()
    for step in hand.train(itertools.islice(endless(loader()), steps)):
        if step == since:
            hand.seen()
        if step == at:
            hand.drop(choose(hand.seen()))
    return hand


TARGETS = {"attention": {"decode": 1.3, "prefill": 1.1}, "mlp": {"decode": 1.1, "prefill": 1.3}}


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    ("scope", "objective", "phase"),
    crossed(("attention", "mlp", "block", "joint"), ("importance", "speed"), ("decode", "prefill")),
)
def test_target_speedup_drops_the_fewest_and_trains_on_as_by_hand(make_trainer, clock, scope, objective, phase):
    target = TARGETS.get(scope, {}).get(phase, 1.3)
    drop = SublayerDrop(
        5,
        scope,
        calibration_batches=4,
        quality_batches=0,
        target_speedup=target,
        phase=phase,
        objective=objective,
        speed=FAST,
    )
    trainer = make_trainer(drop, max_steps=8)
    module = fit_foreign(trainer, watched(clock))

    cost = getattr(clock, phase)
    hand = by_hand(lambda scores: enough(clock, queue(scores, scope, objective, cost), target, phase=phase))
    assert 0 < len(hand.dropped) < 8
    assert keys(drop.plan) == hand.dropped
    assert {entry.step for entry in drop.plan.drops} == {5}
    assert drop.plan.scope == scope
    reached = clock.speedup(hand.dropped, phase=phase)
    assert trainer.callback_metrics["drop/speedup"].item() == pytest.approx(reached)
    assert {(s.block, s.kind) for s in bypassed_sublayers(module)} == {*hand.dropped}
    assert same(dict(module.state_dict()), dict(hand.module.state_dict()))


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    ("phase", "amount", "number"),
    [
        ("decode", {"count": 4}, 4),
        pytest.param("decode", {"ratio": 0.5}, 4, marks=pytest.mark.slow),
        pytest.param("prefill", {"count": 3}, 3, marks=pytest.mark.slow),
        ("prefill", {"ratio": 0.4}, 3),
    ],
)
def test_objective_speed_ranks_by_importance_per_second(make_trainer, clock, phase, amount, number):
    drop = SublayerDrop(
        5, calibration_batches=4, quality_batches=0, phase=phase, objective="speed", speed=FAST, **amount
    )
    trainer = make_trainer(drop, max_steps=8)
    module = fit_foreign(trainer, watched(clock))
    orders = {}

    def choose(scores):
        for how in ("importance", "speed"):
            orders[how] = [*itertools.chain(*queue(scores, "joint", how, getattr(clock, phase))[:number])]
        return orders["speed"]

    hand = by_hand(choose)
    assert keys(drop.plan) == hand.dropped
    assert set(orders["speed"]) != set(orders["importance"]), "else the objective would not matter here"
    assert same(dict(module.state_dict()), dict(hand.module.state_dict()))
    assert "drop/speedup" not in trainer.callback_metrics


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("calibrate_on", ["running", "val"])
def test_target_speedup_rounds_share_the_way_and_measure_importance_anew(make_trainer, tmp_path, clock, calibrate_on):
    """The second sublayer overshoots the second round's aim, so that the third round drops nothing."""
    clock.decode = lambda _block, _kind: 16.0
    target, start, every = 1.3, 3, 2
    drop = SublayerDrop(
        start,
        every_n_steps=every,
        rounds=3,
        calibrate_on=calibrate_on,
        calibration_batches=2,
        quality_batches=1,
        target_speedup=target,
        speed=FAST,
    )
    trainer = make_trainer(drop, max_steps=9, csv=True)
    module = fit_foreign(trainer, watched(clock))

    hand, speedups, went = HandRun(), [], []
    for step in hand.train(itertools.islice(endless(loader()), 9)):
        if step == 1:
            hand.seen()
        if step in (3, 5, 7):
            scores = hand.seen() if calibrate_on == "running" else hand.importances(itertools.islice(val_loader(), 2))
            aim = 1 + (target - 1) * (len(speedups) + 1) / 3
            chosen = enough(clock, queue(scores, "joint"), aim, gone=hand.dropped)
            went += [step] * len(chosen)
            hand.drop(chosen)
            speedups.append((step, pytest.approx(clock.speedup(hand.dropped))))
    assert went == [3, 5], "nothing at step 7"
    assert keys(drop.plan) == hand.dropped
    assert [entry.step for entry in drop.plan.drops] == went
    assert same(dict(module.state_dict()), dict(hand.module.state_dict()))
    with open(tmp_path / "run" / "metrics.csv", encoding="utf-8", newline="") as file:
        logged = list(csv.DictReader(file))
    assert [(int(row["step"]), float(row["drop/speedup"])) for row in logged if row["drop/speedup"]] == speedups
    assert [int(row["step"]) for row in logged if row["drop/loss_after"]] == went, (
        "that of a drop, and of no other step"
    )
    written = json.loads((tmp_path / "run" / "drop_plan.json").read_text())
    assert written == drop.plan.to_dict()


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    ("scope", "protect", "every"),
    [
        ("attention", (), [(block, "attention") for block in range(4)]),
        ("block", (0,), [(block, kind) for block in (1, 2, 3) for kind in ("attention", "mlp")]),
    ],
)
def test_target_speedup_round_with_nothing_left_to_drop_is_no_error(make_trainer, clock, scope, protect, every):
    """Half of the way takes everything that may go, which is the whole of it."""
    clock.decode = lambda block, kind: 1000.0 if (block, kind) in every else 0.125
    target = clock.speedup(every)
    drop = SublayerDrop(
        2, scope, every_n_steps=2, rounds=2, protect=protect, quality_batches=0, target_speedup=target, speed=FAST
    )
    trainer = make_trainer(drop, max_steps=6)
    fit_foreign(trainer, watched(clock))
    assert sorted(keys(drop.plan)) == every
    assert {entry.step for entry in drop.plan.drops} == {2}
    assert trainer.callback_metrics["drop/speedup"].item() == pytest.approx(target)


@pytest.mark.slow
def test_target_speedup_counts_and_keeps_an_earlier_bypass(make_trainer, clock):
    """Enough of it, and nothing goes; too little, and the rest goes."""
    for factor, more in ((1.0, 0), (1.01, 1)):
        module = watched(clock)
        clock.decode = lambda _block, _kind: 16.0
        bypass(module, find_sublayers(module)[:1])
        bypass(module, find_sublayers(module)[3:4])
        before = [(0, "attention"), (1, "mlp")]
        target = clock.speedup(before) * factor
        drop = SublayerDrop(2, "attention", quality_batches=0, target_speedup=target, speed=FAST)
        fit_foreign(make_trainer(drop, max_steps=4), module)
        assert len(drop.plan) == more
        now = {(s.block, s.kind) for s in bypassed_sublayers(module)}
        assert now == {*before, *keys(drop.plan)}
        assert len(now) == 2 + more


def test_scores_of_bypassed_sublayers_do_not_restore_them(clock):
    """Such as those of the dense model: neither a search, nor a failed one, nor a check restores or drops it again."""
    model = watched(clock).net
    scores = {sublayer: 1.0 + sublayer.block for sublayer in find_sublayers(model)}
    before = [(0, "attention"), (0, "mlp")]
    bypass(model, [sublayer for sublayer in scores if sublayer.block == 0])
    gone = bypassed_sublayers(model)
    check_reachable(model, list(scores), 3.0, settings=FAST)
    assert bypassed_sublayers(model) == gone
    with pytest.raises(SpeedupError, match="all 6 candidates"):
        drop_to_speedup(model, scores, 5.0, settings=FAST)
    assert bypassed_sublayers(model) == gone
    plan, report = drop_to_speedup(model, scores, 1.5, settings=FAST)
    assert keys(plan) == enough(clock, [[(b, k)] for b in (1, 2, 3) for k in ("attention", "mlp")], 1.5, gone=before)
    assert report.decode.speedup.median == pytest.approx(clock.speedup([*before, *keys(plan)]))
    assert set(bypassed_sublayers(model)) == {*gone, *plan}
    restore(model)
    with pytest.raises(SelectionError, match="protected"):
        drop_to_speedup(model, scores, 1.5, protect=(0, 1, 2, 3), settings=FAST)


def test_target_speedup_keeps_protected_blocks_however_slow(make_trainer, clock):
    clock.decode = lambda block, _kind: 32.0 if block in (0, 3) else 1.0
    target = clock.speedup([(block, kind) for block in (1, 2) for kind in ("attention", "mlp")])
    drop = SublayerDrop(2, protect=(0, -1), quality_batches=0, target_speedup=target, speed=FAST)
    fit_foreign(make_trainer(drop, max_steps=4), watched(clock))
    assert sorted(keys(drop.plan)) == [(block, kind) for block in (1, 2) for kind in ("attention", "mlp")]


@pytest.mark.default_cases(10)
@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({}, SelectionError, "count=None, ratio=None, target_speedup=None: give exactly one"),
        (
            {"count": 1, "target_speedup": 1.3},
            SelectionError,
            r"count=1, ratio=None, target_speedup=1\.3: give",
        ),
        ({"ratio": 0.5, "target_speedup": 1.3}, SelectionError, "give exactly one"),
        ({"count": 1, "ratio": 0.5, "target_speedup": 1.3}, SelectionError, "give exactly one"),
        ({"target_speedup": 1.0}, SpeedupError, r"target_speedup=1\.0: it must be above 1"),
        ({"target_speedup": float("nan")}, SpeedupError, "must be above 1"),
        ({"target_speedup": 1.3, "scope": "heads"}, SelectionError, "heads"),
        ({"target_speedup": 1.3, "phase": "training"}, UnknownNameError, "'training'.*decode, prefill"),
        ({"count": 1, "objective": "cost"}, UnknownNameError, "'cost'.*importance, speed"),
        ({"target_speedup": 1.3, "protect": (0, 1, 2, 3)}, SelectionError, "all are protected"),
        ({"target_speedup": 1.3, "scope": "cross_attention"}, SelectionError, "has no sublayers of this scope"),
        ({"target_speedup": 1.3, "protect": (4,)}, SelectionError, "no block 4"),
        ({"target_speedup": 1.3, "speed": SpeedSettings(120, 9)}, MeasurementError, "do not fit into the model's 128"),
        ({"count": 1, "objective": "speed", "speed": SpeedSettings(runs=0)}, MeasurementError, "runs=0"),
        (
            {"target_speedup": 5.0},
            SpeedupError,
            r"5\.0 of decode.*all 8 candidates.*give x4\.75",
        ),
        ({"target_speedup": 5.0, "phase": "prefill"}, SpeedupError, r"of prefill.*x4\.75"),
        ({"target_speedup": 4.0, "protect": (0,)}, SpeedupError, r"all 6 candidates dropped give x2\.92"),
        ({"target_speedup": 1.2, "scope": "mlp"}, SpeedupError, r"all 4 candidates dropped give x1\.19"),
        ({"target_speedup": 5.0, "every_n_steps": 1, "rounds": 3}, SpeedupError, "all 8 candidates"),
        ({"target_speedup": 1.3, "start": 6}, ScheduleError, "step 6 comes too late"),
    ],
)
def test_target_speedup_refuses_impossible_arguments_before_training(make_trainer, clock, arguments, error, match):
    """38 seconds a pass, 30 of them in the sublayers: 24 in the attentions, of block 0 5."""
    message = refused(
        make_trainer,
        lambda: SublayerDrop(**{"start": 2, "speed": FAST, **arguments}),
        error,
        match,
        module=watched(clock),
    )
    assert message.endswith(".")


def test_target_speedup_of_all_candidates_together_is_accepted(make_trainer, clock):
    drop = SublayerDrop(2, quality_batches=0, target_speedup=4.75, speed=FAST)
    fit_foreign(make_trainer(drop, max_steps=4), watched(clock))
    assert len(drop.plan) == 8


def test_target_speedup_out_of_reach_at_the_drop_reports_what_was_reached(make_trainer, clock):
    class Warms(pl.Callback):
        def on_train_batch_start(self, *_):
            clock.rest = 62.0

    module = watched(clock)
    drop = SublayerDrop(2, quality_batches=0, target_speedup=2.0, speed=FAST)
    with pytest.raises(SpeedupError, match=r"2\.0 of decode is out of reach: all 8 candidates.*x1\.48"):
        fit_foreign(make_trainer(drop, Warms(), max_steps=4), module)
    assert drop.plan is None
    assert bypassed_sublayers(module) == ()
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_target_speedup_is_measured_under_the_runs_precision(make_trainer, clock):
    seen = []

    class Look(Foreign):
        def on_fit_start(self):
            clock.watch(self.net)
            self.net.lm_head.register_forward_hook(self.note)

        def note(self, _module, _args, output):
            if output.shape[:2] == (1, 1):  # one prompt's last position, one new token
                seen.append((self.trainer.global_step, output.dtype))

    drop = SublayerDrop(2, quality_batches=0, target_speedup=1.1, speed=FAST)
    fit_foreign(make_trainer(drop, max_steps=4, precision="bf16-mixed"), Look())
    assert set(seen) == {(0, torch.bfloat16), (2, torch.bfloat16)}
    del seen[:]
    drop = SublayerDrop(2, quality_batches=0, count=1, objective="speed", speed=FAST)
    fit_foreign(make_trainer(drop, max_steps=4, precision="bf16-mixed"), Look())
    assert set(seen) == {(2, torch.bfloat16)}


def test_share_due_is_the_part_of_the_rounds_reached():
    schedule = DropSchedule(start=4, every_n_steps=2, rounds=4)
    assert [schedule.share_due(step) for step in (3, 4, 5, 6, 8, 10, 99)] == [0.25, 0.25, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert DropSchedule(start=4).share_due(4) == 1.0


def test_overridden_should_drop_aims_at_the_whole_target_speedup(make_trainer, clock):
    class Mine(SublayerDrop):
        def should_drop(self, step):
            return step in (1, 3)

    drop = Mine(2, calibration_batches=1, quality_batches=0, target_speedup=1.3, speed=FAST)
    fit_foreign(make_trainer(drop, max_steps=5), watched(clock))
    assert {entry.step for entry in drop.plan.drops} == {1}


ONCE = {"start": 6, "calibration_batches": 4, "quality_batches": 2, "target_speedup": 1.5, "speed": FAST}
TWICE = {**ONCE, "target_speedup": 2.5, "every_n_steps": 4, "rounds": 2}


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.parametrize(
    ("arguments", "cuts"),
    [pytest.param(ONCE, (1, 4, 6, 9), marks=pytest.mark.slow), (TWICE, (6, 8, 11))],
    ids=["one-shot", "two rounds"],
)
def test_target_speedup_resumed_equals_uninterrupted_without_repeated_measurements(
    make_trainer, tmp_path, text_data, clock, monkeypatch, arguments, cuts
):
    checks = []
    monkeypatch.setattr(
        drop_rule, "check_reachable", lambda *args, **kwargs: checks.append(real_check(*args, **kwargs))
    )
    steps = [6, 10][: arguments.get("rounds", 1)]

    def run(name, ckpt_path=None):
        drop, module = SublayerDrop(**arguments), causal_lm()
        clock.watch(module.model)
        every = ModelCheckpoint(tmp_path / f"{name}-ckpt", filename="{step}", save_top_k=-1, every_n_train_steps=1)
        trainer = make_trainer(drop, every, name=name, csv=True, enable_checkpointing=True, max_steps=12)
        trainer.fit(module, datamodule=text_data(), ckpt_path=ckpt_path)
        return outcome(trainer, module, drop)

    whole = run("whole")
    assert sorted({entry.step for entry in whole[1].drops}) == steps
    assert whole[3]["drop/speedup"] == pytest.approx(clock.speedup(keys(whole[1])))
    assert whole[3]["drop/speedup"] >= arguments["target_speedup"]
    assert len(checks) == 1
    for at in cuts:
        content = torch.load(tmp_path / "whole-ckpt" / f"step={at}.ckpt", weights_only=True)
        assert primitive(content["callbacks"]["SublayerDrop"])
        assert (content["callbacks"]["SublayerDrop"]["speedup"] is not None) == (at >= 6)
        clock.marks = 0
        del checks[:]
        resumed = run(f"resumed-{at}", ckpt_path=tmp_path / "whole-ckpt" / f"step={at}.ckpt")
        assert same(resumed, whole), at
        assert (clock.marks > 0) == (at < steps[-1])
        assert len(checks) == (at < steps[0])
        folder = tmp_path / f"resumed-{at}"
        assert json.loads((folder / "drop_plan.json").read_text()) == whole[1].to_dict()
        assert later_rows(folder, at) == later_rows(tmp_path / "whole", at)


real_check = drop_rule.check_reachable
