"""SpeedMonitor: when it measures, what it logs and writes, and that training does not notice."""

import csv
import json
import math
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch

from layershed.callbacks import SpeedMonitor, SublayerDrop, speed_monitor
from layershed.discovery import find_sublayers
from layershed.errors import MeasurementError
from layershed.speed import Interval, PhaseSpeed, SpeedReport, measure_speed
from layershed.surgery import bypass, remove, restore
from tests.callbacks.conftest import Foreign, Save, fit_foreign, same, state_of

SMALL = {"prompt_tokens": 6, "new_tokens": 2, "runs": 1}
NAMES = {
    "speed/parameters",
    "speed/kv_bytes_per_token",
    *(
        f"speed/{phase}_{what}"
        for phase in ("prefill", "decode")
        for what in ("speedup", "speedup_low", "speedup_high", "tokens_per_s", "tokens_per_s_dense")
    ),
}


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


def test_measures_once_after_every_round_at_its_step(make_trainer, tmp_path, measured):
    drop = SublayerDrop(2, "attention", count=1, every_n_steps=2, rounds=2, quality_batches=0)
    monitor = SpeedMonitor(prompt_tokens=6, new_tokens=2, batch_size=3, runs=1)
    trainer = make_trainer(drop, monitor, max_steps=8, csv=True)
    module = fit_foreign(trainer)
    assert len(measured) == 2
    assert measured[0].items() >= {"prompt_tokens": 6, "new_tokens": 2, "batch_size": 3, "runs": 1}.items()
    assert logged_steps(tmp_path / "run") == [2, 4]
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("speed/")}
    assert set(metrics) == NAMES
    report = SpeedReport.from_dict(json.loads((tmp_path / "run" / "speed.json").read_text()))
    assert report == monitor.report
    assert (report.prompt_tokens, report.new_tokens, report.batch_size, report.runs) == (6, 2, 3, 1)
    dense = sum(parameter.numel() for parameter in module.net.parameters())
    # per attention: q and o of 32 x 32, k and v of 32 x 16, and a norm of 32
    assert (report.parameters_dense, metrics["speed/parameters"]) == (dense, dense - 2 * (2 * 1024 + 2 * 512 + 32))
    # keys and values of 2 heads of 8 in float32, in the 2 of 4 blocks that keep their attention
    assert report.kv_bytes_dense == 4 * 2 * 2 * 8 * 4
    assert metrics["speed/kv_bytes_per_token"] == pytest.approx(2 * 2 * 2 * 8 * 4, abs=2)
    for name, phase in (("prefill", report.prefill), ("decode", report.decode)):
        assert metrics[f"speed/{name}_tokens_per_s"] == pytest.approx(phase.dropped)
        assert metrics[f"speed/{name}_tokens_per_s_dense"] == pytest.approx(phase.dense)
        for suffix, value in (("", phase.speedup.median), ("_low", phase.speedup.low), ("_high", phase.speedup.high)):
            assert metrics[f"speed/{name}_speedup{suffix}"] == pytest.approx(value)
        assert phase.speedup.low <= phase.speedup.median <= phase.speedup.high


def test_nothing_dropped_is_nothing_measured(make_trainer, tmp_path, measured):
    trainer = make_trainer(SpeedMonitor(**SMALL), max_steps=3)
    fit_foreign(trainer)
    assert measured == []
    assert not (tmp_path / "run" / "speed.json").exists()
    assert not any(name.startswith("speed/") for name in trainer.callback_metrics)


@pytest.mark.parametrize("order", [1, -1])
def test_listed_before_the_drop_it_measures_one_step_later(make_trainer, tmp_path, measured, order):
    callbacks = [SublayerDrop(3, count=2, quality_batches=0), SpeedMonitor(**SMALL)]
    fit_foreign(make_trainer(*callbacks[::order], max_steps=6, csv=True))
    assert logged_steps(tmp_path / "run") == [3 if order == 1 else 4]
    assert len(measured) == 1


def test_a_bypass_by_hand_is_measured_and_a_restore_ends_it(make_trainer, tmp_path, measured):
    class ByHand(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 2:
                bypass(pl_module, find_sublayers(pl_module)[:2])
            if trainer.global_step == 4:
                restore(pl_module)

    monitor = SpeedMonitor(**SMALL)
    fit_foreign(make_trainer(ByHand(), monitor, max_steps=6, csv=True))
    assert logged_steps(tmp_path / "run") == [2]
    assert len(measured) == 1
    assert monitor.report is None


def test_training_does_not_notice(make_trainer):
    """Not with dropout, nor the scores that the second round is chosen by, whoever is listed first."""
    states = []
    for name in ("without", "behind", "before"):
        drop = SublayerDrop(2, count=2, every_n_steps=3, rounds=2, quality_batches=0)
        monitor = SpeedMonitor(**SMALL)
        callbacks = {"without": [drop], "behind": [drop, monitor], "before": [monitor, drop]}[name]
        trainer = make_trainer(*callbacks, name=name, max_steps=8)
        module = fit_foreign(trainer, attention_dropout=0.2)
        states.append((state_of(trainer, module), drop.plan, torch.get_rng_state()))
        assert (monitor.report is None) == (name == "without")
    assert same(states[0], states[1])
    assert same(states[0], states[2])


def fake(speedup):
    """A measurement with this speedup of decoding."""
    phase = PhaseSpeed(100.0, 100.0 * speedup, Interval(speedup, speedup - 0.1, speedup + 0.1))
    return SpeedReport(replace(phase, dense=7.0), phase, 9, 8, 7.0, 6.0, 5, 4, 3, 2, "cpu")


@pytest.mark.parametrize("speedup", [1.25, 0.9])
def test_sdr_is_points_of_accuracy_per_percent_of_speed(make_trainer, monkeypatch, speedup):
    monkeypatch.setattr(speed_monitor, "measure_speed", lambda *_, **__: fake(speedup))
    trainer = make_trainer(SublayerDrop(3, count=4), SpeedMonitor(**SMALL), max_steps=5)
    fit_foreign(trainer)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    lost = 100 * (metrics["drop/accuracy_before"] - metrics["drop/accuracy_after"])
    assert lost != 0
    if speedup > 1:
        assert metrics["speed/sdr"] == pytest.approx(lost / 25, rel=1e-4)
    else:
        assert math.isnan(metrics["speed/sdr"])


@pytest.mark.parametrize("at", [2, 3, 5, 8])
def test_a_resumed_run_does_not_measure_again(make_trainer, tmp_path, text_data, monkeypatch, at):
    """Cut before the drop, at it, between the two rounds and after both: the same figures at the end."""
    calls = []
    monkeypatch.setattr(speed_monitor, "measure_speed", lambda *_, **__: calls.append(0) or fake(1.2 + len(calls) / 10))

    def run(name, ckpt_path=None):
        drop = SublayerDrop(3, count=2, every_n_steps=4, rounds=2)
        monitor = SpeedMonitor(**SMALL)
        trainer = make_trainer(drop, monitor, Save(tmp_path / "cut.ckpt", at), name=name, max_steps=9)
        trainer.fit(Foreign(vocab_size=259), datamodule=text_data(), ckpt_path=ckpt_path)
        return {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("speed/")}

    whole = run("whole")
    assert set(whole) == {*NAMES, "speed/sdr"}
    assert len(calls) == 2
    del calls[sum(at >= step for step in (3, 7)) :]
    assert run("resumed", ckpt_path=tmp_path / "cut.ckpt") == whole
    assert len(calls) == 2
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
def test_what_cannot_be_measured_is_refused_before_training(make_trainer, settings, match):
    class Never(pl.Callback):
        def on_train_batch_start(self, *_):
            raise AssertionError("a batch was trained")

    with pytest.raises(MeasurementError, match=match):
        fit_foreign(make_trainer(SpeedMonitor(**{**SMALL, **settings}), Never(), max_steps=2))


def test_measures_under_the_runs_precision(make_trainer):
    dtypes = set()

    class Look(Foreign):
        def on_fit_start(self):
            self.net.lm_head.register_forward_hook(self.note)

        def note(self, _module, _args, output):
            if output.shape[:2] == (1, 1):  # one prompt's last position, one new token
                dtypes.add(output.dtype)

    drop = SublayerDrop(2, "mlp", count=2, quality_batches=0)
    fit_foreign(make_trainer(drop, SpeedMonitor(**SMALL), max_steps=4, precision="bf16-mixed"), Look())
    assert dtypes == {torch.bfloat16}


def test_a_model_saved_without_sublayers_is_not_measured_and_says_so(make_trainer, tmp_path, measured):
    class Removed(Foreign):
        def __init__(self):
            super().__init__()
            remove(self.net, find_sublayers(self.net)[:1])

    drop = SublayerDrop(2, count=1, quality_batches=0)
    with pytest.warns(UserWarning, match="measures nothing: the model was saved without attention.0"):
        fit_foreign(make_trainer(drop, SpeedMonitor(**SMALL), max_steps=4), Removed())
    assert measured == []
    assert not (tmp_path / "run" / "speed.json").exists()
