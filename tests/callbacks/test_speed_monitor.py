"""SpeedMonitor: when it measures, what it logs and writes, and that it does not change training."""

import csv
import json
import math

import lightning.pytorch as pl
import pytest
import torch

from layershed.callbacks import ExactResume, SpeedMonitor, SublayerDrop, speed_monitor
from layershed.discovery.find import find_sublayers
from layershed.errors import LayershedError, MeasurementError
from layershed.performance.speed import Interval, PhaseSpeed, SpeedReport, measure_speed
from layershed.surgery import bypass, remove, restore
from tests.support.runs import Foreign, Save, fit_foreign, loader, same, state_of
from tests.support.thinned import crossed, one_of, some_of

SMALL = {"prompt_tokens": 6, "new_tokens": 2, "runs": 1}
PLAIN = {**SMALL, "quality": None}
PHASES = ("prefill", "decode")
PHASE_NAMES = ("speedup", "speedup_low", "speedup_high", "tokens_per_s", "tokens_per_s_dense", "ms")
NAMES = {
    *(f"speed/{name}" for name in ("parameters", "kv_bytes_per_token", "peak_memory", "file_bytes")),
    *(f"speed/{name}" for name in ("batch_size", "prompt_tokens", "new_tokens")),
    *(f"speed/{phase}_{what}" for phase in PHASES for what in PHASE_NAMES),
}
PREDICTED = {f"speed/{phase}_predicted" for phase in PHASES}


@pytest.fixture
def measured(monkeypatch):
    """Counts real measurements: the settings of each."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return measure_speed(*args, **kwargs)

    monkeypatch.setattr(speed_monitor, "measure_speed", counted)
    return calls


def logged_steps(folder):
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row.get("speed/decode_speedup")]


def test_speed_monitor_measures_once_at_the_step_of_every_round(make_trainer, tmp_path, measured):
    drop = SublayerDrop(2, "attention", count=1, every_n_steps=2, rounds=2, quality_batches=0)
    monitor = SpeedMonitor(prompt_tokens=6, new_tokens=2, batch_size=3, runs=1, quality=None)
    trainer = make_trainer(drop, monitor, max_steps=8, csv=True)
    module = fit_foreign(trainer)
    assert len(measured) == 2
    assert measured[0].items() >= {"prompt_tokens": 6, "new_tokens": 2, "batch_size": 3, "runs": 1}.items()
    assert logged_steps(tmp_path / "run") == [2, 4]
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("speed/")}
    assert set(metrics) == NAMES | PREDICTED
    report = SpeedReport.from_dict(json.loads((tmp_path / "run" / "speed.json").read_text()))
    assert report == monitor.report
    assert (report.prompt_tokens, report.new_tokens, report.batch_size, report.runs) == (6, 2, 3, 1)
    dense = sum(parameter.numel() for parameter in module.net.parameters())
    # per attention: q and o of 32 x 32, k and v of 32 x 16, and a norm of 32
    assert (report.parameters_dense, metrics["speed/parameters"]) == (dense, dense - 2 * (2 * 1024 + 2 * 512 + 32))
    # keys and values of 2 heads of 8 in float32, in the 2 of 4 blocks that keep their attention
    assert report.kv_bytes_dense == 4 * 2 * 2 * 8 * 4
    assert metrics["speed/kv_bytes_per_token"] == pytest.approx(2 * 2 * 2 * 8 * 4, abs=2)
    # what is left is saved, and is in memory beside the cache: all of it in float32
    assert metrics["speed/file_bytes"] == report.file_bytes_dropped == 4 * metrics["speed/parameters"]
    assert metrics["speed/peak_memory"] == report.peak_memory_dropped > report.file_bytes_dropped
    # 3 sequences of 6 tokens at once; a decoded token of each of the 3 a step
    assert metrics["speed/prefill_ms"] == pytest.approx(1000 * 18 / metrics["speed/prefill_tokens_per_s"])
    assert metrics["speed/decode_ms"] == pytest.approx(1000 * 3 / metrics["speed/decode_tokens_per_s"])
    for name, phase in (("prefill", report.prefill), ("decode", report.decode)):
        assert metrics[f"speed/{name}_predicted"] == pytest.approx(phase.predicted)
        assert metrics[f"speed/{name}_tokens_per_s"] == pytest.approx(phase.dropped)
        assert metrics[f"speed/{name}_tokens_per_s_dense"] == pytest.approx(phase.dense)
        for suffix, value in (("", phase.speedup.median), ("_low", phase.speedup.low), ("_high", phase.speedup.high)):
            assert metrics[f"speed/{name}_speedup{suffix}"] == pytest.approx(value)
        assert phase.speedup.low <= phase.speedup.median <= phase.speedup.high


def test_speed_monitor_measures_nothing_without_a_drop(make_trainer, tmp_path, measured):
    trainer = make_trainer(SpeedMonitor(**PLAIN), max_steps=3)
    fit_foreign(trainer)
    assert measured == []
    assert not (tmp_path / "run" / "speed.json").exists()
    assert not any(name.startswith("speed/") for name in trainer.callback_metrics)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("order", [1, -1])
def test_speed_monitor_listed_before_the_drop_measures_one_step_later(make_trainer, tmp_path, measured, order):
    callbacks = [SublayerDrop(3, count=2, quality_batches=0), SpeedMonitor(**PLAIN)]
    fit_foreign(make_trainer(*callbacks[::order], max_steps=6, csv=True))
    assert logged_steps(tmp_path / "run") == [3 if order == 1 else 4]
    assert len(measured) == 1


def test_speed_monitor_measures_a_bypass_by_hand_until_its_restore(make_trainer, tmp_path, measured):
    class ByHand(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 2:
                bypass(pl_module, find_sublayers(pl_module)[:2])
            if trainer.global_step == 4:
                restore(pl_module)

    monitor = SpeedMonitor(**PLAIN)
    fit_foreign(make_trainer(ByHand(), monitor, max_steps=6, csv=True))
    assert logged_steps(tmp_path / "run") == [2]
    assert len(measured) == 1
    assert monitor.report is None


def test_speed_monitor_does_not_change_training(make_trainer):
    """Dropout and the scores of the second round stay the same, in either order of the callbacks."""
    states = []
    for name in ("without", "after", "before"):
        drop = SublayerDrop(2, count=2, every_n_steps=3, rounds=2, quality_batches=0)
        monitor = SpeedMonitor(**PLAIN)
        callbacks = {"without": [drop], "after": [drop, monitor], "before": [monitor, drop]}[name]
        trainer = make_trainer(*callbacks, name=name, max_steps=8)
        module = fit_foreign(trainer, attention_dropout=0.2)
        states.append((state_of(trainer, module), drop.plan, torch.get_rng_state()))
        assert (monitor.report is None) == (name == "without")
    assert same(states[0], states[1])
    assert same(states[0], states[2])


def fake(speedup, predicted=None):
    """A measurement with this speedup of decoding; of the prefill the gain is twice as large."""
    phases = {
        name: PhaseSpeed(100.0, Interval(value, value - 0.01, value + 0.01), predicted)
        for name, value in (("prefill", 1 + 2 * (speedup - 1)), ("decode", speedup))
    }
    return SpeedReport(
        phases=phases,
        parameters_dense=90,
        parameters_dropped=80,
        kv_bytes_dense=7.0,
        kv_bytes_dropped=6.0,
        file_bytes_dense=360,
        file_bytes_dropped=320,
        peak_memory_dense=500,
        peak_memory_dropped=450,
        runs=1,
        batch_size=2,
        prompt_tokens=6,
        new_tokens=2,
        device="cpu",
    )


@pytest.fixture
def faked(monkeypatch):
    """The first measurement finds 1.3, the second 1.4, ...; their number."""
    calls = []
    monkeypatch.setattr(speed_monitor, "measure_speed", lambda *_, **__: calls.append(0) or fake(1.2 + len(calls) / 10))
    return calls


def logged(folder, name):
    """(step, value) of every row that has one."""
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row.get(name)]


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    ("quality", "phase", "speedup"), crossed(("accuracy", "loss", "perplexity"), PHASES, (1.25, 0.9))
)
def test_sdr_is_points_of_quality_lost_per_percent_of_speed_gained(make_trainer, monkeypatch, quality, phase, speedup):
    monkeypatch.setattr(speed_monitor, "measure_speed", lambda *_, **__: fake(speedup))
    monitor = SpeedMonitor(**SMALL, quality=quality, phase=phase)
    trainer = make_trainer(SublayerDrop(3, count=4), monitor, max_steps=5)
    fit_foreign(trainer)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    lost = {
        "accuracy": metrics["drop/accuracy_before"] - metrics["drop/accuracy_after"],
        "loss": metrics["drop/loss_after"] - metrics["drop/loss_before"],
        "perplexity": math.exp(metrics["drop/loss_after"]) - math.exp(metrics["drop/loss_before"]),
    }[quality]
    assert lost != 0
    if speedup > 1:
        assert metrics["speed/sdr"] == pytest.approx(100 * lost / (50 if phase == "prefill" else 25), rel=1e-4)
    else:
        assert math.isnan(metrics["speed/sdr"])


def test_speed_monitor_logs_all_figures_but_a_missing_prediction(make_trainer, monkeypatch):
    for predicted in (None, 1.5):
        report = fake(1.25, predicted)
        monkeypatch.setattr(speed_monitor, "measure_speed", lambda *_, report=report, **__: report)
        trainer = make_trainer(SublayerDrop(3, count=4), SpeedMonitor(**PLAIN), max_steps=5)
        fit_foreign(trainer)
        metrics = {n: value.item() for n, value in trainer.callback_metrics.items() if n.startswith("speed/")}
        assert set(metrics) == NAMES | (PREDICTED if predicted else set())
        assert metrics["speed/prefill_ms"] == pytest.approx(80.0)  # 2 x 6 tokens at 150 a second
        assert metrics["speed/decode_ms"] == pytest.approx(16.0)  # a token of each of 2 sequences at 125 a second
        assert (metrics["speed/file_bytes"], metrics["speed/peak_memory"]) == (320, 450)
        assert not predicted or {metrics[name] for name in PREDICTED} == {1.5}


@pytest.mark.parametrize("order", one_of([1, -1]))
def test_sdr_of_every_round_counts_its_own_loss_and_gain(make_trainer, tmp_path, faked, order):
    drop = SublayerDrop(2, count=2, every_n_steps=2, rounds=3, quality_batches=2)
    monitor = SpeedMonitor(**SMALL, quality="loss")
    trainer = make_trainer(*[drop, monitor][::order], max_steps=8, csv=True)
    fit_foreign(trainer)
    before, after = (logged(tmp_path / "run", f"drop/loss_{when}") for when in ("before", "after"))
    assert [step for step, _ in after] == [step for step, _ in before] == [2, 4, 6]
    gains = (0.3, 1.4 / 1.3 - 1, 1.5 / 1.4 - 1)
    wanted = [
        (step + (order < 0), pytest.approx((end - begin) / gain, rel=1e-4))
        for (step, end), (_, begin), gain in zip(after, before, gains, strict=True)
    ]
    assert logged(tmp_path / "run", "speed/sdr") == wanted
    assert [(int(step), sdr.ratio) for step, sdr in monitor.degradations.items() if step != "end"] == wanted
    ((_, end),) = logged(tmp_path / "run", "drop/loss_end")
    assert logged(tmp_path / "run", "speed/sdr_end") == [(8, pytest.approx((end - before[0][1]) / 0.5, rel=1e-4))]


class Graded(Foreign):
    """Logs a metric of its own in validation: 1 minus a hundredth for every step."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("val_f1", 1 - 0.01 * self.global_step, batch_size=len(batch["input_ids"]))


OWN = {"quality": "val_f1", "quality_mode": "max"}
# drops after steps 3 and 7, a validation after every second step; points lost since step 2, and percent gained
ROUNDS = [(4, 2 / 30), (6, 4 / 30), (8, 6 / 40), (10, 8 / 40)]


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(("phase", "mode"), crossed(PHASES, ("max", "min")))
def test_sdr_of_a_module_metric_is_logged_at_every_validation_after_a_drop(make_trainer, tmp_path, faked, mode, phase):
    drop = SublayerDrop(3, count=1, every_n_steps=4, rounds=2, quality_batches=0)
    monitor = SpeedMonitor(**SMALL, **{**OWN, "quality_mode": mode}, phase=phase)
    trainer = make_trainer(drop, monitor, max_steps=10, csv=True, val_check_interval=2, num_sanity_val_steps=1)
    fit_foreign(trainer, Graded(), train=loader(10))
    sign = (1 if mode == "max" else -1) / (2 if phase == "prefill" else 1)
    wanted = [(step, pytest.approx(sign * sdr, rel=1e-4)) for step, sdr in ROUNDS]
    assert logged(tmp_path / "run", "speed/sdr") == wanted


def test_sdr_ignores_a_validation_between_a_drop_and_its_measurement(make_trainer, tmp_path, faked):
    """Listed before SublayerDrop it measures one step later: at 5 and at 9."""
    drop = SublayerDrop(4, count=1, every_n_steps=4, rounds=2, quality_batches=0)
    trainer = make_trainer(SpeedMonitor(**SMALL, **OWN), drop, max_steps=12, csv=True, val_check_interval=2)
    fit_foreign(trainer, Graded(), train=loader(12))
    wanted = [(6, 4 / 30), (10, 8 / 40), (12, 10 / 40)]
    assert logged(tmp_path / "run", "speed/sdr") == [(step, pytest.approx(sdr, rel=1e-4)) for step, sdr in wanted]


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("at", some_of([1, 3, 7, 9], 2))
def test_sdr_of_a_module_metric_is_the_same_in_a_resumed_run(make_trainer, tmp_path, text_data, faked, at):
    """Cut before there is a dense value, at the drops, between them and the validations, and after everything."""

    def run(name, ckpt_path=None):
        drop = SublayerDrop(3, count=2, every_n_steps=4, rounds=2, quality_batches=0)
        save = Save(tmp_path / "cut.ckpt", at)
        monitor = SpeedMonitor(**SMALL, **OWN)
        trainer = make_trainer(
            ExactResume(), drop, monitor, save, name=name, csv=True, max_steps=12, val_check_interval=2
        )
        trainer.fit(Graded(vocab_size=259), datamodule=text_data(), ckpt_path=ckpt_path)
        metrics = {n: value.item() for n, value in trainer.callback_metrics.items() if n.startswith("speed/")}
        return metrics, logged(tmp_path / name, "speed/sdr")

    whole, rows = run("whole")
    assert rows[:4] == [(step, pytest.approx(sdr, rel=1e-4)) for step, sdr in ROUNDS]
    del faked[sum(at >= step for step in (3, 7)) :]
    resumed, later = run("resumed", ckpt_path=tmp_path / "cut.ckpt")
    assert resumed == whole
    assert later == [(step, sdr) for step, sdr in rows if step > at]
    state = torch.load(tmp_path / "cut.ckpt", weights_only=True)["callbacks"]["SpeedMonitor"]
    assert state["dense_quality"] == (None if at < 2 else pytest.approx(0.98))


@pytest.mark.parametrize("at", one_of([9, 6, 10]))
def test_sdr_is_kept_in_a_run_resumed_after_the_last_validation(make_trainer, tmp_path, faked, text_data, at):
    """Drops at 5 and 9, validations at 4 and 8: the SDR at the end is that of 8, also after the second drop."""

    def run(name, ckpt_path=None):
        drop = SublayerDrop(5, count=2, every_n_steps=4, rounds=2, quality_batches=0)
        callbacks = drop, SpeedMonitor(**SMALL, **OWN), Save(tmp_path / "cut.ckpt", at)
        trainer = make_trainer(ExactResume(), *callbacks, name=name, max_steps=11, val_check_interval=4)
        trainer.fit(Graded(vocab_size=259), datamodule=text_data(), ckpt_path=ckpt_path)
        return {n: value.item() for n, value in trainer.callback_metrics.items() if n.startswith("speed/")}

    whole = run("whole")
    assert whole["speed/sdr"] == pytest.approx(4 / 30, rel=1e-4)
    assert whole["speed/decode_speedup"] == pytest.approx(1.4)
    del faked[1 if at < 9 else 2 :]
    assert run("resumed", ckpt_path=tmp_path / "cut.ckpt") == whole


def never(make_trainer, monitor, *callbacks, **settings):
    """A run that must not get as far as a batch."""

    class Never(pl.Callback):
        def on_train_batch_start(self, *_):
            raise AssertionError("a batch was trained")

    fit_foreign(make_trainer(*callbacks, monitor, Never(), max_steps=4, **settings))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"quality": "val_f1"}, "quality='val_f1', quality_mode=None.*'max' or 'min'.*accuracy, loss, perplexity"),
        ({"quality": "val_f1", "quality_mode": "best"}, "quality_mode='best'"),
        ({"quality": "loss", "quality_mode": "max"}, "'min' is better for this quality. Leave quality_mode out"),
        ({"phase": "training"}, "Unknown phase 'training'"),
    ],
)
def test_speed_monitor_refuses_invalid_quality_settings(settings, match):
    with pytest.raises(LayershedError, match=match):
        SpeedMonitor(**SMALL, **settings)
    assert SpeedMonitor(quality="loss", quality_mode="min").quality_mode == "min"


@pytest.mark.parametrize("quality", ["loss", "perplexity"])
def test_speed_monitor_refuses_an_unmeasured_quality_before_training(make_trainer, quality):
    monitor = SpeedMonitor(**SMALL, quality=quality)
    no_sdr = f"quality='{quality}'.*no SublayerDrop measures the quality"
    with pytest.raises(MeasurementError, match=no_sdr):
        never(make_trainer, monitor)
    with pytest.raises(MeasurementError, match=no_sdr):
        never(make_trainer, monitor, SublayerDrop(2, count=1, quality_batches=0))
    with pytest.raises(MeasurementError, match=no_sdr):
        never(make_trainer, monitor, SublayerDrop(2, count=1), limit_val_batches=0)
    with pytest.raises(MeasurementError, match=r"quality='val_f1'.*no validation"):
        never(make_trainer, SpeedMonitor(**SMALL, **OWN), SublayerDrop(2, count=1), limit_val_batches=0)


def test_speed_monitor_warns_once_if_nothing_measures_the_default_quality(make_trainer, faked):
    drop = SublayerDrop(2, count=1, quality_batches=0)
    trainer = make_trainer(drop, SpeedMonitor(**SMALL), max_steps=4)
    with pytest.warns(UserWarning, match="there is no SDR, as no SublayerDrop measures the quality") as caught:
        fit_foreign(trainer)
    assert len([warning for warning in caught if "SDR" in str(warning.message)]) == 1
    assert len(faked) == 1
    assert "speed/sdr" not in trainer.callback_metrics


def test_speed_monitor_warns_that_a_drop_by_hand_has_no_sdr(make_trainer, faked):
    module = Foreign()
    bypass(module, find_sublayers(module)[:1])
    with pytest.warns(UserWarning, match=r"attention\.0 was not dropped by SublayerDrop.*no SDR"):
        fit_foreign(make_trainer(SublayerDrop(3, count=1), SpeedMonitor(**SMALL), max_steps=4), module)
    assert len(faked) == 2


def test_speed_monitor_warns_once_of_an_unlogged_metric_and_the_run_goes_on(make_trainer, faked):
    monitor = SpeedMonitor(**SMALL, quality="val_f2", quality_mode="max")
    drop = SublayerDrop(3, count=1, quality_batches=0)
    trainer = make_trainer(drop, monitor, max_steps=8, val_check_interval=2, num_sanity_val_steps=1)
    with pytest.warns(UserWarning, match=r"'val_f2'\. Did you mean 'val_f1'") as caught:
        fit_foreign(trainer, Graded())
    assert len([warning for warning in caught if "val_f2'. Did" in str(warning.message)]) == 1
    assert (trainer.global_step, len(faked)) == (8, 1)
    assert "speed/sdr" not in trainer.callback_metrics


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    "error", [MeasurementError("no cache."), torch.OutOfMemoryError("no memory")], ids=["no cache", "no memory"]
)
def test_speed_monitor_warns_of_a_failed_measurement_and_the_run_goes_on(make_trainer, monkeypatch, tmp_path, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("layershed.callbacks.speed_monitor.measure_speed", fail)
    drop = SublayerDrop(2, count=2, every_n_steps=2, rounds=2)
    trainer = make_trainer(drop, SpeedMonitor(**SMALL), max_steps=6)
    with pytest.warns(UserWarning, match="SpeedMonitor: a measurement left out.*no (cache|memory).*goes on") as caught:
        fit_foreign(trainer)
    assert len([warning for warning in caught if "a measurement" in str(warning.message)]) == 1
    assert trainer.global_step == 6
    assert not (tmp_path / "run" / "speed.json").exists()


def test_speed_monitor_warns_without_a_validation_before_the_drop(make_trainer, faked):
    drop = SublayerDrop(1, count=1, quality_batches=0)
    trainer = make_trainer(drop, SpeedMonitor(**SMALL, **OWN), max_steps=4, val_check_interval=2)
    with pytest.warns(UserWarning, match="quality='val_f1'.*no validation came before the drop"):
        fit_foreign(trainer, Graded())
    assert "speed/sdr" not in trainer.callback_metrics


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("at", some_of([2, 3, 5, 8], 2))
def test_speed_monitor_does_not_measure_again_in_a_resumed_run(make_trainer, tmp_path, text_data, faked, at):
    """Cut before the drop, at it, between the two rounds and after both: the same figures at the end."""

    def run(name, ckpt_path=None):
        drop = SublayerDrop(3, count=2, every_n_steps=4, rounds=2)
        monitor = SpeedMonitor(**SMALL)
        trainer = make_trainer(ExactResume(), drop, monitor, Save(tmp_path / "cut.ckpt", at), name=name, max_steps=9)
        trainer.fit(Foreign(vocab_size=259), datamodule=text_data(), ckpt_path=ckpt_path)
        return {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("speed/")}

    whole = run("whole")
    assert set(whole) == {*NAMES, "speed/sdr", "speed/sdr_end"}
    assert len(faked) == 2
    del faked[sum(at >= step for step in (3, 7)) :]
    assert run("resumed", ckpt_path=tmp_path / "cut.ckpt") == whole
    assert len(faked) == 2
    written = [json.loads((tmp_path / name / "speed.json").read_text()) for name in ("whole", "resumed")]
    assert written[0] == written[1]
    checkpoint = torch.load(tmp_path / "cut.ckpt", weights_only=True)
    assert (checkpoint["callbacks"]["SpeedMonitor"]["report"] is not None) == (at >= 3)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"prompt_tokens": 120, "new_tokens": 9}, "120 and new_tokens=9 do not fit into the model's 128 positions"),
        ({"runs": 0}, "runs=0"),
        ({"new_tokens": 0}, "new_tokens=0"),
    ],
)
def test_speed_monitor_refuses_unmeasurable_settings_before_training(make_trainer, settings, match):
    with pytest.raises(MeasurementError, match=match):
        never(make_trainer, SpeedMonitor(**{**PLAIN, **settings}))


def test_speed_monitor_measures_under_the_runs_precision(make_trainer):
    dtypes = set()

    class Look(Foreign):
        def on_fit_start(self):
            self.net.lm_head.register_forward_hook(self.note)

        def note(self, _module, _args, output):
            if output.shape[:2] == (1, 1):  # one prompt's last position, one new token
                dtypes.add(output.dtype)

    drop = SublayerDrop(2, "mlp", count=2, quality_batches=0)
    fit_foreign(make_trainer(drop, SpeedMonitor(**PLAIN), max_steps=4, precision="bf16-mixed"), Look())
    assert dtypes == {torch.bfloat16}


def test_speed_monitor_warns_and_skips_a_model_saved_without_sublayers(make_trainer, tmp_path, measured):
    class Removed(Foreign):
        def __init__(self):
            super().__init__()
            remove(self.net, find_sublayers(self.net)[:1])

    drop = SublayerDrop(2, count=1, quality_batches=0)
    with pytest.warns(UserWarning, match="measures nothing: the model was saved without attention.0"):
        fit_foreign(make_trainer(drop, SpeedMonitor(**SMALL), max_steps=4), Removed())
    assert measured == []
    assert not (tmp_path / "run" / "speed.json").exists()
