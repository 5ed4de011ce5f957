"""SublayerDrop against a run by hand: what it drops, when, what it measures, and how training continues."""

import csv
import itertools
import json
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from layershed.callbacks import SublayerDrop
from layershed.errors import (
    CalibrationError,
    CheckpointError,
    LayershedError,
    ScheduleError,
    SelectionError,
    UnknownNameError,
)
from layershed.surgery import bypassed_sublayers
from layershed.training.causal_lm import CausalLM
from tests.support.drop_runs import endless, keys, later_rows, outcome, primitive, refused
from tests.support.runs import (
    BATCH,
    TOKENS,
    Broken,
    Foreign,
    HandRun,
    Interrupt,
    Interrupted,
    Lengthless,
    Manual,
    Save,
    Watch,
    causal_lm,
    fit_foreign,
    loader,
    ranked,
    same,
    state_of,
    unmarked,
    val_loader,
)
from tests.support.thinned import crossed, one_of
from tests.support.versions import older


def bypassed(_trainer, pl_module):
    return {(s.block, s.kind) for s in bypassed_sublayers(pl_module)}


SCOPES = {"attention": 2, "mlp": 2, "block": 1, "joint": 3}


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("scope", SCOPES)
def test_running_drops_the_lowest_scores_and_trains_on_as_by_hand(make_trainer, scope):
    """Four steps of calibration before step 5; weights equal those of the loop by hand to the last bit."""
    drop = SublayerDrop(5, scope=scope, count=SCOPES[scope], calibration_batches=4, quality_batches=2)
    watch = Watch(bypassed)
    trainer = make_trainer(drop, watch, max_steps=9)
    module = fit_foreign(trainer)

    hand = HandRun()
    for step in hand.train(itertools.islice(endless(loader()), 9)):
        if step == 1:
            hand.seen()
        if step == 5:
            scores = hand.seen()
            hand.drop(ranked(scores, scope, SCOPES[scope]))
    assert keys(drop.plan) == hand.dropped
    for entry in drop.plan.drops:
        kind = "block" if scope == "block" else entry.sublayer.kind
        assert entry.score == pytest.approx(scores[entry.sublayer.block, kind], rel=2e-5)
        assert entry.step == 5
    assert watch.seen == [(step, set(hand.dropped) if step >= 5 else set()) for step in range(1, 10)]
    assert same(dict(module.state_dict()), dict(hand.module.state_dict()))


@pytest.mark.parametrize("metric", ["relative_magnitude", "angular"])
def test_metric_ranks_sublayers_by_its_own_formula(make_trainer, metric):
    drop = SublayerDrop(3, count=4, metric=metric, quality_batches=0)
    fit_foreign(make_trainer(drop, max_steps=4))
    hand = HandRun()
    for step in hand.train(itertools.islice(loader(), 3)):
        if step == 3:
            assert keys(drop.plan) == ranked(hand.seen(metric), "joint", 4)
    assert drop.plan.metric == metric


def test_running_under_accumulation_scores_every_micro_batch_of_the_steps(make_trainer):
    drop = SublayerDrop(3, count=3, calibration_batches=2, quality_batches=0)
    watch = Watch(bypassed)
    module = fit_foreign(make_trainer(drop, watch, max_steps=4, accumulate_grad_batches=2), train=loader(8))
    hand = HandRun(accumulate=2)
    for step in hand.train(loader(8)):
        if step == 1:
            hand.seen()
        if step == 3:
            scores = hand.seen()
            hand.drop(ranked(scores, "joint", 3))
    assert [entry.score for entry in drop.plan.drops] == pytest.approx([scores[key] for key in hand.dropped], rel=2e-5)
    # both micro-batches of steps 1 to 3 but the last ran dense
    assert watch.seen == [(step, set(hand.dropped) if step >= 3 else set()) for step in (0, 1, 1, 2, 2, 3, 3, 4)]
    assert same(dict(module.state_dict()), dict(hand.module.state_dict()))


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(("scope", "count"), [("joint", 3), ("block", 1)])
@pytest.mark.parametrize("split", ["train", "val"])
def test_calibration_pass_scores_the_model_on_the_splits_first_batches(make_trainer, split, scope, count):
    drop = SublayerDrop(4, scope=scope, count=count, calibrate_on=split, calibration_batches=2, quality_batches=0)
    module = fit_foreign(make_trainer(drop, max_steps=6))
    hand = HandRun()
    for step in hand.train(itertools.islice(loader(), 6)):
        if step == 4:
            scores = hand.importances(itertools.islice({"train": loader, "val": val_loader}[split](), 2))
            hand.drop(ranked(scores, scope, count))
    assert keys(drop.plan) == hand.dropped
    kinds = ["block"] * 2 if scope == "block" else [kind for _, kind in hand.dropped]
    wanted = [scores[block, kind] for (block, _), kind in zip(hand.dropped, kinds, strict=True)]
    assert [entry.score for entry in drop.plan.drops] == pytest.approx(wanted, rel=2e-5)
    assert same(dict(module.state_dict()), dict(hand.module.state_dict()))


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    ("calibrate_on", "what"), crossed(("running", "val"), (("joint", 2), ("block", 1), ("attention", 1)))
)
def test_iterative_rounds_measure_the_dropped_model_anew(make_trainer, tmp_path, calibrate_on, what):
    scope, count = what
    drop = SublayerDrop(
        3, scope, count, every_n_steps=3, rounds=3, calibrate_on=calibrate_on, calibration_batches=2, quality_batches=2
    )
    module = fit_foreign(make_trainer(drop, max_steps=11))
    hand, losses = HandRun(), []
    for step in hand.train(itertools.islice(endless(loader()), 11)):
        if step in (1, 4, 7):
            hand.seen()
        if step in (3, 6, 9):
            scores = hand.seen() if calibrate_on == "running" else hand.importances(itertools.islice(val_loader(), 2))
            losses.append(hand.quality(itertools.islice(val_loader(), 2))[0])
            chosen = ranked(scores, scope, count)
            own = [entry for entry in drop.plan.drops if entry.step == step]
            assert keys(entry.sublayer for entry in own) == chosen
            kinds = ["block"] * 2 if scope == "block" else [kind for _, kind in chosen]
            wanted = [scores[block, kind] for (block, _), kind in zip(chosen, kinds, strict=True)]
            assert [entry.score for entry in own] == pytest.approx(wanted, rel=2e-5)
            hand.drop(chosen)
            losses.append(hand.quality(itertools.islice(val_loader(), 2))[0])
    assert keys(drop.plan) == hand.dropped
    assert [each.step for each in drop.rounds] == [3, 6, 9]
    measured = [quality.loss for each in drop.rounds for quality in (each.before, each.after)]
    assert measured == pytest.approx(losses, rel=1e-5)
    assert same(dict(module.state_dict()), dict(hand.module.state_dict()))
    written = json.loads((tmp_path / "run" / "drop_plan.json").read_text())
    assert [(entry["block"], entry["kind"]) for entry in written["drops"]] == hand.dropped
    assert [entry["step"] for entry in written["drops"]] == [entry.step for entry in drop.plan.drops]
    assert written["scope"] == scope


def test_losses_around_the_drop_equal_an_evaluation_by_hand(make_trainer, tmp_path):
    drop = SublayerDrop(3, count=4, quality_batches=2)
    trainer = make_trainer(drop, max_steps=6, csv=True)
    fit_foreign(trainer)
    hand, wanted = HandRun(), {}
    for step in hand.train(loader()):
        if step == 3:
            wanted["before"] = hand.quality(itertools.islice(val_loader(), 2))
            hand.captured.importances()
            hand.drop(keys(drop.plan))
            wanted["after"] = hand.quality(itertools.islice(val_loader(), 2))
    wanted["end"] = hand.quality(itertools.islice(val_loader(), 2))
    assert len({loss for loss, _ in wanted.values()}) == 3
    with open(tmp_path / "run" / "metrics.csv", encoding="utf-8", newline="") as file:
        logged = list(csv.DictReader(file))
    for when, (loss, accuracy) in wanted.items():
        assert trainer.callback_metrics[f"drop/loss_{when}"].item() == pytest.approx(loss, rel=1e-5)
        assert trainer.callback_metrics[f"drop/accuracy_{when}"].item() == pytest.approx(accuracy, abs=1e-6)
        rows = [row for row in logged if row[f"drop/loss_{when}"]]
        assert [int(row["step"]) for row in rows] == [6 if when == "end" else 3]
        assert float(rows[0][f"drop/loss_{when}"]) == pytest.approx(loss, rel=1e-5)
    counts = {kind: sum(own == kind for _, own in keys(drop.plan)) for kind in ("attention", "mlp")}
    assert {kind: trainer.callback_metrics[f"drop/{kind}"].item() for kind in counts} == counts


def test_losses_around_a_drop_are_measured_at_every_round_and_at_the_end_once(make_trainer, tmp_path):
    drop = SublayerDrop(2, count=1, every_n_steps=2, rounds=2, quality_batches=1)
    fit_foreign(make_trainer(drop, max_steps=6, csv=True))
    with open(tmp_path / "run" / "metrics.csv", encoding="utf-8", newline="") as file:
        logged = list(csv.DictReader(file))
    steps = {
        when: [int(row["step"]) for row in logged if row[f"drop/loss_{when}"]] for when in ("before", "after", "end")
    }
    assert steps == {"before": [2, 4], "after": [2, 4], "end": [6]}


def test_optimizer_forgets_dropped_parameters_and_its_schedule_goes_on(make_trainer):
    def rates(trainer, _module):
        return trainer.optimizers[0].param_groups[0]["lr"], len(trainer.optimizers[0].param_groups[0]["params"])

    with_drop, without = Watch(rates), Watch(rates)
    drop = SublayerDrop(4, count=3)
    trainer = make_trainer(drop, with_drop, max_steps=9)
    module = fit_foreign(trainer)
    fit_foreign(make_trainer(without, max_steps=9))
    assert [rate for _, (rate, _) in with_drop.seen] == [rate for _, (rate, _) in without.seen]
    cosine = [1e-2 * (1 + math.cos(math.pi * step / 12)) / 2 for step in range(1, 10)]
    assert [rate for _, (rate, _) in with_drop.seen] == pytest.approx(cosine)
    gone = set()
    for block, kind in keys(drop.plan):
        layer = module.net.model.layers[block]
        attention = kind == "attention"
        own = (layer.self_attn, layer.input_layernorm) if attention else (layer.mlp, layer.post_attention_layernorm)
        gone |= {parameter for part in own for parameter in part.parameters()}
    optimizer = trainer.optimizers[0]
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert held == set(module.parameters()) - gone
    assert set(optimizer.state) == held
    whole = len(list(module.parameters()))
    assert [count for _, (_, count) in with_drop.seen] == [whole] * 3 + [whole - len(gone)] * 6


def test_dropped_weights_do_not_change_and_the_others_learn(make_trainer):
    def losses(trainer, _module):
        return trainer.callback_metrics["train_loss"].item()

    def weights(_trainer, module):
        return {name: value.clone() for name, value in module.state_dict().items()}

    watch, loss = Watch(weights), Watch(losses)
    drop = SublayerDrop(10, count=2, quality_batches=2)
    trainer = make_trainer(drop, watch, loss, max_steps=40)
    fit_foreign(trainer, steps=80, train=loader(4))
    at_drop, at_end = watch.seen[9][1], watch.seen[-1][1]
    for block, kind in keys(drop.plan):
        prefixes = {
            "attention": (f"net.model.layers.{block}.self_attn.", f"net.model.layers.{block}.input_layernorm."),
            "mlp": (f"net.model.layers.{block}.mlp.", f"net.model.layers.{block}.post_attention_layernorm."),
        }[kind]
        names = [name for name in at_drop if name.startswith(prefixes)]
        assert len(names) in (4, 5)
        for name in names:
            assert torch.equal(at_drop[name], at_end[name])
            del at_end[name]
    assert not any(torch.equal(at_drop[name], value) for name, value in at_end.items())
    assert loss.seen[-1][1] < 0.7 * loss.seen[10][1]
    assert drop.quality["end"].loss < drop.quality["after"].loss


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"ratio": 1.2}, SelectionError, r"ratio=1\.2.*\(0, 1\)"),
        ({}, SelectionError, "count=None, ratio=None"),
        ({"count": 2, "ratio": 0.2}, SelectionError, "exactly one"),
        ({"count": 0}, SelectionError, "count=0"),
        ({"count": 9}, SelectionError, "drop 9, but there are only 8"),
        ({"count": 3, "every_n_steps": 1, "rounds": 3}, SelectionError, "drop 9, but there are only 8"),
        ({"count": 5, "scope": "block"}, SelectionError, "only 4"),
        ({"count": 7, "protect": (0,)}, SelectionError, r"only 6 candidates \(2 more are protected"),
        ({"ratio": 0.1}, SelectionError, "less than one"),
        ({"ratio": 0.2, "every_n_steps": 1, "rounds": 2}, SelectionError, "takes count"),
        ({"count": 1, "protect": (4,)}, SelectionError, "no block 4"),
        ({"count": 1, "protect": (-5,)}, SelectionError, "no block -5"),
        ({"count": 1, "scope": "heads"}, SelectionError, "heads"),
        ({"count": 1, "metric": "cosin"}, UnknownNameError, "Did you mean 'cosine'"),
        ({"count": 1, "calibration_batches": 0}, SelectionError, "calibration_batches=0"),
        ({"count": 1, "quality_batches": -1}, SelectionError, "quality_batches=-1"),
        ({"count": 1, "start": 0}, ScheduleError, "start=0"),
        ({"count": 1, "start": 6}, ScheduleError, "step 6 comes too late: training ends after 6"),
        ({"count": 1, "every_n_steps": 2, "rounds": 3}, ScheduleError, "step 6 comes too late"),
        ({"count": 1, "rounds": 2}, ScheduleError, "needs both"),
        ({"count": 1, "calibrate_on": "test"}, UnknownNameError, "'test'"),
    ],
)
def test_sublayer_drop_refuses_impossible_arguments_before_training(make_trainer, arguments, error, match):
    refused(make_trainer, lambda: SublayerDrop(**{"start": 2, **arguments}), error, match)


def test_sublayer_drop_refuses_a_start_after_the_last_epoch(make_trainer):
    """Two epochs of six batches, two per step: six steps."""
    kwargs = {"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 2}
    refused(make_trainer, lambda: SublayerDrop(6, count=1), ScheduleError, "ends after 6 optimizer steps", **kwargs)
    drop = SublayerDrop(5, count=1)
    fit_foreign(make_trainer(drop, **kwargs))
    assert [entry.step for entry in drop.plan.drops] == [5]


def test_sublayer_drop_refuses_to_calibrate_on_missing_data(make_trainer):
    def on(split):
        return lambda: SublayerDrop(2, count=1, calibrate_on=split)

    refused(make_trainer, on("val"), CalibrationError, "no validation data", val=None, module=NoValidation())
    refused(make_trainer, on("val"), CalibrationError, "no validation data", limit_val_batches=0)
    endless_train = DataLoader(Lengthless(), batch_size=2)
    refused(make_trainer, on("train"), CalibrationError, "map-style", train=endless_train)


def test_sublayer_drop_refuses_batches_that_are_not_text_before_training(make_trainer):
    pictures = DataLoader([{"pixels": torch.zeros(3)}] * 4, batch_size=2)
    for split, arguments in (
        ("val", {"calibrate_on": "val", "quality_batches": 0}),
        ("train", {"calibrate_on": "train", "quality_batches": 0}),
    ):
        refused(
            make_trainer,
            lambda arguments=arguments: SublayerDrop(2, count=1, **arguments),
            CalibrationError,
            "neither a mapping with input_ids nor token ids",
            num_sanity_val_steps=0,
            **{split: pictures},
        )


class NoValidation(Foreign):
    validation_step = pl.LightningModule.validation_step


def test_protected_blocks_stay_in_every_round(make_trainer):
    """The last block but one by a negative index, which must not wander once the last block is gone."""
    module = Foreign()
    with torch.no_grad():
        module.net.model.layers[3].self_attn.o_proj.weight *= 1e-3
        module.net.model.layers[3].mlp.down_proj.weight *= 1e-3
    drop = SublayerDrop(2, "joint", count=2, every_n_steps=2, rounds=3, protect=(-2,), quality_batches=0)
    fit_foreign(make_trainer(drop, max_steps=8), module)
    assert sorted(keys(drop.plan)[:2]) == [(3, "attention"), (3, "mlp")]
    assert sorted(keys(drop.plan)) == [(b, kind) for b in (0, 1, 3) for kind in ("attention", "mlp")]


def test_ratio_counts_all_candidates(make_trainer):
    drop = SublayerDrop(2, ratio=0.4, quality_batches=0)
    fit_foreign(make_trainer(drop, max_steps=4))
    assert len(drop.plan) == 3


def test_overridden_should_drop_sets_the_drop_steps(make_trainer):
    class Mine(SublayerDrop):
        def should_drop(self, step):
            return step in (2, 3)

    drop = Mine(2, count=1, calibration_batches=1)
    fit_foreign(make_trainer(drop, max_steps=5))
    assert [entry.step for entry in drop.plan.drops] == [2, 3]


def test_sublayer_drop_takes_one_of_two_transformers_by_name(make_trainer):
    class Two(Foreign):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.other = Foreign().net.requires_grad_(False)

    refused(make_trainer, lambda: SublayerDrop(2, count=1), LayershedError, "net, other", module=Two())
    drop, module = SublayerDrop(2, count=2, transformer="net"), Two()
    fit_foreign(make_trainer(drop, max_steps=4), module)
    assert bypassed_sublayers(module.other) == ()
    assert sorted(keys(drop.plan)) == [(s.block, s.kind) for s in bypassed_sublayers(module.net)]


def test_sublayer_drop_measures_in_mixed_precision(make_trainer):
    """Quality runs under autocast, as training does."""
    dtypes = []

    class Look(Foreign):
        def on_fit_start(self):
            self.net.lm_head.register_forward_hook(self.note)

        def note(self, _module, _args, output):
            if output.shape[:2] == (BATCH, TOKENS):  # not the probe's four tokens
                dtypes.append(output.dtype)

    drop = SublayerDrop(3, count=2, calibrate_on="val", quality_batches=2)
    trainer = make_trainer(drop, max_steps=6, precision="bf16-mixed")
    fit_foreign(trainer, Look())
    assert len(drop.plan) == 2
    assert set(dtypes) == {torch.bfloat16}
    assert len(dtypes) == 6 + 3 * 2 + 3  # training, three measurements, one validation epoch
    hand = HandRun()
    for step in hand.train(itertools.islice(loader(), 3)):
        if step == 3:
            loss, _ = hand.quality(itertools.islice(val_loader(), 2))
    assert drop.quality["before"].loss == pytest.approx(loss, rel=2e-2)


def test_gradient_checkpointing_does_not_change_the_drop_or_training(make_trainer, text_data):
    found = []
    for name, on in (("with", True), ("without", False)):
        drop = SublayerDrop(4, count=3)
        module = causal_lm(gradient_checkpointing=on)
        trainer = make_trainer(drop, max_steps=8, name=name)
        trainer.fit(module, datamodule=text_data())
        found.append((drop.plan, drop.quality, state_of(trainer, module)))
    assert found[0][:2] == found[1][:2]
    assert same(found[0][2], found[1][2])
    assert len(found[0][0]) == 3


def test_drop_step_that_a_batch_passes_over_still_drops(make_trainer):
    drop = SublayerDrop(5, count=2, calibration_batches=2)
    fit_foreign(make_trainer(drop, max_steps=12), Manual())
    assert [entry.step for entry in drop.plan.drops] == [6, 6]


ONCE = {"start": 6, "count": 3, "calibration_batches": 4, "quality_batches": 2}
TWICE = {**ONCE, "count": 2, "every_n_steps": 4, "rounds": 2}


@pytest.mark.default_cases(1)
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.parametrize(
    ("arguments", "cuts", "length"),
    [
        (ONCE, (1, 4, 6, 9), {"max_steps": 12}),
        pytest.param(TWICE, (6, 8), {"max_steps": 12}, marks=pytest.mark.slow),
        # the loader's position must outlive the question how long the run is, and the reading beside it
        ({**ONCE, "calibrate_on": "train"}, (5,), {"max_steps": -1, "max_epochs": 2}),
        pytest.param({**ONCE, "calibrate_on": "val"}, (5,), {"max_steps": -1, "max_epochs": 2}, marks=pytest.mark.slow),
    ],
)
def test_drop_run_resumed_in_mid_epoch_equals_uninterrupted(make_trainer, tmp_path, text_data, arguments, cuts, length):
    """Before the window of calibration, in it, at the drop, after it; between the rounds of two. 8 batches an epoch."""

    def run(name, *callbacks, ckpt_path=None):
        drop, module = SublayerDrop(**arguments), causal_lm()
        every = ModelCheckpoint(
            tmp_path / f"{name}-ckpt", filename="{step}", save_top_k=-1, save_last=True, every_n_train_steps=1
        )
        trainer = make_trainer(drop, every, *callbacks, name=name, csv=True, enable_checkpointing=True, **length)
        trainer.fit(module, datamodule=text_data(), ckpt_path=ckpt_path)
        return outcome(trainer, module, drop)

    if 8 in cuts and older("lightning", "2.5.3"):
        pytest.skip("lightning < 2.5.3: without ExactResume, a run resumed at the end of an epoch is not exact")
    whole = run("whole")
    steps = [6, 10][: arguments.get("rounds", 1)]
    assert [entry.step for entry in whole[1].drops] == sorted(steps * arguments["count"])
    checkpoints = {at: tmp_path / "whole-ckpt" / f"step={at}.ckpt" for at in cuts}
    if 4 in cuts:
        with pytest.raises(Interrupted):
            run("killed", Interrupt(4))
        checkpoints[4] = tmp_path / "killed-ckpt" / "last.ckpt"
    for at, checkpoint in checkpoints.items():
        content = torch.load(checkpoint, weights_only=True)
        assert content["global_step"] == at
        assert primitive(content["callbacks"]["SublayerDrop"])
        resumed = run(f"resumed-{at}", ckpt_path=checkpoint)
        assert same(resumed, whole), at
        folder = tmp_path / f"resumed-{at}"
        assert json.loads((folder / "drop_plan.json").read_text()) == whole[1].to_dict()
        rows = later_rows(folder, at)
        assert rows == later_rows(tmp_path / "whole", at)
        assert {step for step, _ in rows} == {step for step in (*steps, whole[0]["step"]) if step > at}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.parametrize(("start", "cuts"), one_of([(12, (1, 2)), (15, (2,)), (8, (2,))]))
def test_foreign_module_resumed_at_an_epochs_end_equals_uninterrupted(make_trainer, tmp_path, start, cuts):
    """Epochs of six steps; before the window of calibration, in it, at the drop, after it."""

    def run(name, ckpt_path=None):
        drop, module = SublayerDrop(start, count=3, calibration_batches=4, quality_batches=2), Foreign(steps=24)
        every = ModelCheckpoint(
            tmp_path / f"{name}-ckpt", filename="{step}", save_top_k=-1, save_on_train_epoch_end=True
        )
        trainer = make_trainer(drop, every, name=name, csv=True, enable_checkpointing=True, max_steps=20)
        trainer.fit(module, loader(), val_loader(), ckpt_path=ckpt_path)
        return outcome(trainer, module, drop)

    whole = run("whole")
    for cut in cuts:
        at = 6 * cut
        resumed = run(f"resumed-{cut}", ckpt_path=tmp_path / "whole-ckpt" / f"step={at}.ckpt")
        assert same(resumed, whole)
        rows = later_rows(tmp_path / f"resumed-{cut}", at)
        assert rows == later_rows(tmp_path / "whole", at)
        assert {step for step, _ in rows} == {step for step in (start, 20) if step > at}


def reference_of(state, dropped):
    """Mean validation loss of a foreign module with these weights and these branches multiplied by zero."""
    hand = HandRun()
    hand.module.load_state_dict(unmarked(state))
    hand.drop(dropped)
    return hand, hand.quality(val_loader())[0]


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("weights_only", [False, True])
def test_dropped_foreign_checkpoint_is_evaluated_dropped(make_trainer, tmp_path, weights_only):
    drop = SublayerDrop(3, count=3)
    trainer = make_trainer(drop, max_steps=6)
    module = fit_foreign(trainer)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    hand, wanted = reference_of(state, keys(drop.plan))
    assert abs(wanted - reference_of(state, [])[1]) > 1e-3
    for how in ("validate", "test"):
        fresh = make_trainer(SublayerDrop(3, count=3), name=how)
        (found,) = getattr(fresh, how)(Foreign(), val_loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
        assert found == {f"{how[:3] if how == 'validate' else how}_loss": pytest.approx(wanted, rel=1e-5)}
    fresh = make_trainer(SublayerDrop(3, count=3), name="predict")
    logits = fresh.predict(Foreign(), val_loader(), ckpt_path=tmp_path / "a.ckpt")
    hand.module.eval()
    with torch.no_grad():
        for own, batch in zip(logits, val_loader(), strict=True):
            torch.testing.assert_close(own, hand.module.net(input_ids=batch["input_ids"]).logits)


@pytest.mark.default_cases(1)
@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided:UserWarning")
@pytest.mark.parametrize("weights_only", [False, True])
def test_causal_lm_checkpoint_is_the_dropped_model_without_callbacks(make_trainer, tmp_path, text_data, weights_only):
    drop = SublayerDrop(3, count=3)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, save_weights_only=weights_only, every_n_train_steps=6)
    trainer = make_trainer(drop, checkpoint, max_steps=6, enable_checkpointing=True)
    module = causal_lm()
    trainer.fit(module, datamodule=text_data())
    wanted = trainer.callback_metrics["drop/loss_end"].item()
    data = text_data()
    data.setup()
    batches = list(data.val_dataloader())
    run = HandRun(vocab_size=259, eos_token_id=1)
    run.module.net.load_state_dict(unmarked(module.model.state_dict()))
    run.drop(keys(drop.plan))
    assert run.quality(batches)[0] == pytest.approx(wanted, rel=1e-5)
    for how in ("validate", "test"):
        (found,) = getattr(make_trainer(name=how), how)(
            causal_lm(), datamodule=text_data(), ckpt_path=tmp_path / "last.ckpt", verbose=False
        )
        assert found[f"{how[:3] if how == 'validate' else how}_loss"] == pytest.approx(wanted, rel=1e-5)
    predicted = make_trainer(name="predict").predict(
        causal_lm(), datamodule=text_data(), ckpt_path=tmp_path / "last.ckpt"
    )
    loaded = CausalLM.load_from_checkpoint(tmp_path / "last.ckpt").eval()
    run.module.eval()
    with torch.no_grad():
        for own, batch in zip(predicted, batches, strict=True):
            logits = run.module.net(input_ids=batch["input_ids"]).logits
            assert torch.equal(own, logits.argmax(-1))
            assert torch.equal(loaded(input_ids=batch["input_ids"]).logits, logits)
    assert sorted(keys(drop.plan)) == [(s.block, s.kind) for s in bypassed_sublayers(loaded)]


def test_checkpoint_from_before_the_drop_is_evaluated_dense(make_trainer, tmp_path):
    """Also in the trainer and with the module of the very run that dropped."""
    drop = SublayerDrop(4, count=3)
    trainer = make_trainer(drop, Save(tmp_path / "before.ckpt", 3), max_steps=6)
    module = fit_foreign(trainer)
    assert len(bypassed_sublayers(module)) == 3
    state = torch.load(tmp_path / "before.ckpt", weights_only=True)["state_dict"]
    (found,) = trainer.validate(module, val_loader(), ckpt_path=tmp_path / "before.ckpt", verbose=False)
    assert found["val_loss"] == pytest.approx(reference_of(state, [])[1], rel=1e-5)


def test_module_checkpoint_hooks_still_run_and_are_restored(make_trainer, tmp_path):
    class Noting(Foreign):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["mine"] = 3

        def on_load_checkpoint(self, checkpoint):
            self.found = checkpoint["mine"]

    drop = SublayerDrop(4, count=1)
    trainer = make_trainer(drop, Save(tmp_path / "dense.ckpt", 3), Save(tmp_path / "dropped.ckpt", 5), max_steps=6)
    fit_foreign(trainer, Noting())
    for name, dropped in (("dense", 0), ("dropped", 1)):
        assert torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["mine"] == 3
        fresh = Noting()
        again = make_trainer(SublayerDrop(4, count=1))
        again.validate(fresh, val_loader(), ckpt_path=tmp_path / f"{name}.ckpt", verbose=False)
        assert fresh.found == 3
        assert len(bypassed_sublayers(fresh)) == dropped
        assert {"on_save_checkpoint", "on_load_checkpoint"} <= set(fresh.__dict__) or not dropped
        assert not {"on_save_checkpoint", "on_load_checkpoint"} & set(fresh.__dict__) or dropped


def test_resuming_a_drop_on_a_smaller_model_is_refused(make_trainer, tmp_path):
    drop = SublayerDrop(2, "block", count=3)
    trainer = make_trainer(drop, max_steps=4)
    fit_foreign(trainer)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="do not fit this model"):
        make_trainer(SublayerDrop(2, "block", count=1)).validate(
            Foreign(num_hidden_layers=2), val_loader(), ckpt_path=tmp_path / "a.ckpt", verbose=False
        )


def test_running_leaves_out_nan_passes_and_warns_how_many(make_trainer):
    settings = {"count": 3, "calibration_batches": 3, "quality_batches": 0}
    plain, drop = SublayerDrop(4, **settings), SublayerDrop(4, **settings)
    fit_foreign(make_trainer(plain, max_steps=5))
    with pytest.warns(UserWarning, match=r"SublayerDrop, step 4: 2 of 5 forward passes left out.*attention\.0\."):
        fit_foreign(make_trainer(drop, max_steps=5), Broken(beside=(0, 1, 3)))
    assert drop.plan == plain.plan


def test_running_refuses_to_drop_if_every_pass_was_nan(make_trainer):
    drop = SublayerDrop(4, count=3, calibration_batches=2, quality_batches=0)
    module = Broken(alone=(2, 3))
    with pytest.raises(CalibrationError, match=r"2 of 2 forward passes left out.*nothing is left"):
        fit_foreign(make_trainer(drop, max_steps=5), module)
    assert drop.plan is None
    assert bypassed_sublayers(module) == ()
