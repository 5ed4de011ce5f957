"""What a drop cost against a control: figures by hand, and what is said where there are none."""

import json
from dataclasses import replace

import pytest
import yaml

from layershed.errors import ControlError
from layershed.performance.degradation import Degradation
from layershed.planning.plan import Drop, DropPlan, Sublayer
from layershed.quality import OwnQuality, Quality
from layershed.reporting.control import differences, find_control, read_control
from layershed.reporting.drop_cost import FAILED, PENDING, UNKNOWN, cost_rows
from layershed.reporting.record import Control, LossPoint, MetricPoint, RunRecord
from layershed.reporting.summary import summary_rows
from tests.support.measured import SPEED

PLAN = DropPlan((Drop(Sublayer(1, "mlp", "h.1.mlp"), 0.01, 120),), scope="mlp", metric="cosine")
RECORD = RunRecord("m", plan=PLAN, quality={"end": Quality(2.91, 0.44, 99)}, steps=200, validations=((150, 3.0),))
APART = "not known: the control and this run have no validation at the same step after the drop"
CONTROL = Control("runs/c", 200, 119, {"loss": 2.8801, "accuracy": 0.4436})


def rows(**changes):
    return dict(cost_rows(replace(RECORD, **changes)))


def test_cost_is_the_difference_to_the_control():
    # 2.91 - 2.8801 and 100 * (0.44 - 0.4436); 200 - 119 steps
    assert rows(control=CONTROL) == {
        "Control, without the drop": "validation loss 2.8801, next-token accuracy 44.4 %",
        "Cost of the drop": "+0.0299 loss, -0.4 points of next-token accuracy after the same 81 steps",
    }


def test_sdr_against_the_control_divides_its_loss_by_the_speed():
    """0.36 points over 20 percent; by the loss 2.99 hundredths."""
    logged = {"after": Degradation(0.0, "accuracy", "decode")}
    assert rows(control=CONTROL, speed=SPEED, sdr=logged)["SDR against the control"] == (
        "0.02 points of next-token accuracy per % of decode speed"
    )
    logged = {"end": Degradation(0.0, "loss", "decode")}
    assert rows(control=CONTROL, speed=SPEED, sdr=logged)["SDR against the control"] == (
        "0.15 hundredths of the loss per % of decode speed"
    )
    assert "SDR against the control" not in rows(control=CONTROL, sdr=logged)


def test_no_change_has_no_sign_of_a_loss():
    same = replace(CONTROL, quality={"loss": 2.91, "accuracy": 0.44004})
    assert rows(control=same)["Cost of the drop"].startswith("+0.0000 loss, +0.0 points")


def test_without_a_control_the_sentence_says_what_is_not_known():
    assert rows() == {"Cost of the drop": UNKNOWN}
    assert rows(control_pending=True) == {"Cost of the drop": PENDING}
    assert rows(control_failed=True) == {"Cost of the drop": FAILED}


@pytest.mark.parametrize("changes", [{"plan": None}, {"plan": DropPlan()}, {"quality": {}}, {"steps": 120}])
def test_nothing_is_said_where_nothing_was_dropped_measured_or_trained_since(changes):
    assert rows(**changes) == {}


def test_another_run_is_compared_by_the_last_common_validation():
    losses = tuple(LossPoint(step, "val", loss) for step, loss in ((100, 3.5), (150, 2.9), (200, 2.8)))
    other = Control("runs/d", 200, losses=(*losses, LossPoint(150, "train", 9.0)))
    assert rows(control=other)["Cost of the drop"] == "+0.1000 loss after the same 150 steps"
    apart = replace(other, losses=losses[:1])
    assert rows(control=apart) == {"Cost of the drop": APART}


@pytest.mark.parametrize(
    ("validations", "cost"), [(((150, 2.9),), "+0.1000 loss after the same 31 steps"), ((), APART)]
)
def test_control_of_another_length_is_compared_by_the_last_common_validation_alone(validations, cost):
    losses = tuple(LossPoint(step, "val", loss) for step, loss in validations)
    assert rows(control=replace(CONTROL, end=150, losses=losses))["Cost of the drop"] == cost


def test_common_validation_before_the_last_drop_tells_nothing():
    own = ((100, 3.5), (110, 3.4))
    other = Control("runs/d", 200, losses=tuple(LossPoint(step, "val", loss) for step, loss in own))
    assert rows(control=other, validations=own) == {"Cost of the drop": APART}
    at_the_drop = replace(other, losses=(*other.losses, LossPoint(120, "val", 3.3)))  # validation follows the drop
    assert rows(control=at_the_drop, validations=(*own, (120, 3.4)))["Cost of the drop"] == (
        "+0.1000 loss after the same 120 steps"
    )


def test_finished_run_without_a_row_at_its_last_step_is_compared(run):
    """Of 25 steps, with rows every 10: the last validation that both have is that of step 20."""
    record = replace(
        RECORD, plan=DropPlan((Drop(Sublayer(1, "mlp", "h.1.mlp"), 0.01, 5),)), steps=25, validations=((20, 2.5),)
    )
    assert dict(cost_rows(replace(record, control=read_control(run)))) == {
        "Control, without the drop": "validation loss 2.4000 at step 20",
        "Cost of the drop": "+0.1000 loss after the same 20 steps",
    }


def test_own_metrics_and_doubts_are_shown_without_control_codes():
    own = {"end": OwnQuality({"loss": 1.0, "val_\x1bf1": 0.75})}
    other = replace(CONTROL, quality={"loss": 0.5, "val_\x1bf1": 0.8}, doubts=("model.\x1bx: 1, control 2",))
    found = rows(quality=own, control=other)
    assert found["Control, without the drop"] == "validation loss 0.5000, val_?f1 0.8000"
    assert found["Cost of the drop"] == (
        "+0.5000 loss, -0.0500 val_?f1 after the same 81 steps (but model.?x: 1, control 2)"
    )


def test_metrics_of_the_validation_stand_beside_those_of_the_control():
    record = replace(
        RECORD,
        metrics={"val_f1": (MetricPoint(100, 0.8), MetricPoint(150, 0.7)), "val_x": (None, MetricPoint(200, 1.0))},
    )
    other = replace(CONTROL, metrics={"val_f1": {100: 0.9, 150: 0.75, 200: 0.1}})
    found = dict(summary_rows(replace(record, control=other)))
    assert (
        found["val_f1 in validation"] == "0.8000 before the drop (step 100), 0.7000 at step 150, 0.7500 of the control"
    )
    assert found["val_x in validation"] == "1.0000 at the end"
    apart = dict(summary_rows(replace(record, control=replace(other, metrics={"val_f1": {140: 0.75}}))))
    assert apart["val_f1 in validation"] == "0.8000 before the drop (step 100), 0.7000 at step 150"


# Reading a control


@pytest.fixture
def run(tmp_path):
    """A finished run with the rows that Lightning writes, and its config."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.csv").write_text("step,train_loss,val_loss,val_f1\n9,3.0,,\n9,,2.9,0.5\n19,2.5,,\n19,,2.4,0.6\n")
    config = {"seed_everything": 0, "data": {"source": "a"}, "trainer": {"max_steps": 20, "callbacks": ["x"]}}
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "model": {"dtype": "float32"}, "control": True}))
    return folder


def test_control_is_read_from_the_rows_of_its_log(run):
    control = read_control(run)
    losses = [(10, "train", 3.0), (20, "train", 2.5), (10, "val", 2.9), (20, "val", 2.4)]
    assert [(p.step, p.split, p.loss) for p in control.losses] == losses
    assert (control.start, control.end, control.quality, control.metrics) == (
        None,
        20,
        {},
        {"val_f1": {10: 0.5, 20: 0.6}},
    )
    assert read_control(run, "other", "val_f1").losses[0] == LossPoint(10, "val", 0.5)


def test_control_within_a_run_goes_first(run):
    inner = run / "control"
    inner.mkdir()
    (inner / "metrics.csv").write_text("step,val_loss\n4,2.5\n19,2.0\n")
    (inner / "control.json").write_text(
        json.dumps({"start": 9, "end": 20, "quality": {"loss": 2.0}, "without": ["SublayerDrop"]})
    )
    (run / "drop_plan.json").write_text("{}")
    assert find_control(run) == inner
    assert read_control(run) == replace(
        Control(str(run), 20, 9, {"loss": 2.0}, (LossPoint(20, "val", 2.0),)), without=("SublayerDrop",)
    )


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("metrics.csv", "step,val_loss\nmany,2.0\n"),
        ("metrics.csv", "when,val_loss\n19,2.0\n"),
        ("control.json", "{"),
        ("control.json", '{"start": 1, "end": 2}'),
        ("control.json", '{"start": 1, "end": 2, "quality": {"loss": "much"}, "without": []}'),
    ],
)
def test_damaged_control_is_one_sentence(run, file, text):
    (run / file).write_text(text)
    with pytest.raises(ControlError, match="cannot be read"):
        read_control(run)


def test_only_the_drop_may_differ(run):
    own = {"seed_everything": 0, "data": {"source": "a", "new": 1}, "model": {"dtype": "float32", "distillation": "x"}}
    own["trainer"] = {"max_steps": 20, "callbacks": ["y", "z"], "default_root_dir": "elsewhere", "devices": 1}
    assert differences(own, run) == ["data.new: 1, control None", "trainer.devices: 1, control None"]
    (run / "config.yaml").unlink()
    assert "no config.yaml" in differences(own, run)[0]


ADAM = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}}


@pytest.mark.parametrize(
    ("section", "option", "own", "theirs", "told"),
    [
        ("data", "source", "b", "a", "data.source: b, control a"),
        ("model", "dtype", "bfloat16", "float32", "model.dtype: bfloat16, control float32"),
        ("model", "optimizer", ADAM, {**ADAM, "init_args": {"lr": 0.2}}, "model.optimizer.init_args.lr: 0.1, control"),
        ("model", "lr_schedule", ADAM, None, "model.lr_schedule.class_path: torch.optim.AdamW, control None"),
        ("trainer", "accumulate_grad_batches", 2, 1, "trainer.accumulate_grad_batches: 2, control 1"),
        ("trainer", "precision", "bf16-mixed", "32-true", "trainer.precision: bf16-mixed, control 32-true"),
    ],
)
def test_control_that_trained_otherwise_is_refused(run, section, option, own, theirs, told):
    (run / "config.yaml").write_text(yaml.safe_dump({section: {option: theirs}}))
    with pytest.raises(ControlError, match=told):
        differences({section: {option: own}}, run)


def test_control_that_is_too_short_to_log_a_row_is_read_from_its_result(tmp_path):
    (tmp_path / "control").mkdir()
    result = {"start": 119, "end": 200, "quality": {"loss": 2.8801, "accuracy": 0.4436}, "without": ["SublayerDrop"]}
    (tmp_path / "control" / "control.json").write_text(json.dumps(result))
    control = read_control(tmp_path)
    assert control.losses == ()
    assert rows(control=control) == rows(control=CONTROL)
