"""SDR: the quality that was asked for, over the speed gained since the dense model or since an earlier round."""

import math
from dataclasses import replace

import pytest

from layershed.performance.degradation import degradation
from layershed.performance.intervals import Interval
from layershed.performance.speed_report import ForwardReport, PhaseSpeed, SpeedReport

SIZES = {f"{what}_{side}": 1 for what in ("parameters", "file_bytes", "peak_memory") for side in ("dense", "dropped")}
BEFORE = {"loss": 2.0, "accuracy": 0.682, "val_f1": 0.9}
AFTER = {"loss": 2.5, "accuracy": 0.658, "val_f1": 0.8}


def speed(median, low=None, high=None, values=9):
    """Decoding at this speedup, and the prefill at twice the gain."""
    decode = Interval(median, low or median - 0.01, high or median + 0.01, values)
    prefill = replace(decode, median=2 * median - 1)
    return SpeedReport(
        phases={"prefill": PhaseSpeed(9.0, prefill), "decode": PhaseSpeed(9.0, decode)},
        **SIZES, runs=9, batch_size=1, device="cpu",
        kv_bytes_dense=1, kv_bytes_dropped=1, prompt_tokens=1, new_tokens=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("wanted", "expected", "text"),
    [
        ({}, (68.2 - 65.8) / 11, "0.22 points of next-token accuracy per % of decode speed"),
        ({"phase": "prefill"}, 2.4 / 22, "0.11 points of next-token accuracy per % of prefill speed"),
        ({"quality": "loss"}, 50 / 11, "4.55 hundredths of the loss per % of decode speed"),
        (
            {"quality": "perplexity"},
            100 * (math.exp(2.5) - math.exp(2)) / 11,
            "43.58 hundredths of the perplexity per % of decode speed",
        ),
        ({"quality": "val_f1", "better": "max"}, 10 / 11, "0.91 points of val_f1 per % of decode speed"),
        ({"quality": "val_f1", "better": "min"}, -10 / 11, "-0.91 points of val_f1 per % of decode speed"),
    ],
)
def test_sdr_counts_the_quality_and_phase_that_are_asked_for(wanted, expected, text):
    found = degradation(BEFORE, AFTER, speed(1.11), **wanted)
    assert found.ratio == pytest.approx(expected)
    assert str(found) == text


def test_sdr_of_no_change_has_no_minus_sign():
    assert str(degradation(BEFORE, {**BEFORE, "accuracy": 0.682 + 1e-7}, speed(1.11))).startswith("0.00 points")


def test_loss_takes_the_place_of_a_missing_accuracy_and_of_no_other_quality():
    before, after = {"loss": 2.0}, {"loss": 2.5}
    assert degradation(before, after, speed(1.11)).quality == "loss"
    assert degradation(before, after, speed(1.11), quality="val_f1", better="max") is None
    assert degradation(BEFORE, after, speed(1.11), quality="val_f1", better="max") is None


def test_forward_pass_stands_for_decoding_in_a_model_that_does_not_decode():
    phases = {"forward": PhaseSpeed(9.0, Interval(1.25, 1.2, 1.3)), "encoder": PhaseSpeed(9.0, Interval(1.5, 1.4, 1.6))}
    report = ForwardReport(phases=phases, **SIZES, runs=9, batch_size=1, device="cpu", units=1)
    assert (
        str(degradation(BEFORE, AFTER, report, quality="loss")) == "2.00 hundredths of the loss per % of forward speed"
    )


@pytest.mark.parametrize(
    ("measured", "doubt"),
    [
        (speed(0.9, 0.85, 0.95), "no speed gained"),
        (speed(1.01, 0.99, 1.03), "no measurable speedup"),
        (speed(1.11, values=5), "5 pairs; an interval needs 6"),
    ],
)
def test_undefined_sdr_says_why(measured, doubt):
    found = degradation(BEFORE, AFTER, measured)
    assert math.isnan(found.ratio)
    assert str(found) == f"undefined ({doubt})"


def test_sdr_of_a_round_counts_what_was_gained_since_the_round_before():
    found = degradation(BEFORE, AFTER, speed(1.5), quality="loss", earlier=speed(1.25))
    assert found.ratio == pytest.approx(50 / 20)
    overlapping = degradation(BEFORE, AFTER, speed(1.5, 1.4, 1.6), earlier=speed(1.25, 1.1, 1.41))
    assert str(overlapping) == "undefined (no measurable speedup)"
    few = degradation(BEFORE, AFTER, speed(1.5), earlier=speed(1.25, values=4))
    assert str(few) == "undefined (4 pairs; an interval needs 6)"
