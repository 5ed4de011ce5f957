"""Numbers out of range give a typed error with option and value; numbers in range are accepted."""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layershed.callbacks import LoRARecovery, Quantization, RedundancyMonitor, Report, SpeedMonitor, SublayerDrop
from layershed.cli.run_folder import check_scoring, check_seed
from layershed.errors import LayershedError
from layershed.performance.stopwatch import SpeedSettings
from layershed.planning.plan import DropPlan, ImportanceScores, Sublayer
from layershed.planning.schedule import DropSchedule
from layershed.planning.selection import select_sublayers
from layershed.recovery.distillation import Distillation
from layershed.training.text_data import TextData
from tests.support.models import build_model
from tests.support.thinned import some_of

MODEL = build_model("llama")
SCORES = ImportanceScores({Sublayer(i, "mlp", f"h.{i}"): i / 9 for i in range(8)})


def at_least(least):
    """Integers in range (from ``least`` on) and out of range (below)."""
    return st.integers(least, 10**12), st.integers(-(10**12), least - 1)


def between(low, high, *, low_is_in=False, high_is_in=False):
    """Floats in range (in the interval) and out of range, including NaN and infinities."""
    inside = st.floats(
        low, high, exclude_min=not low_is_in, exclude_max=not high_is_in and high != math.inf, allow_infinity=False
    )
    below = st.floats(max_value=low, exclude_max=low_is_in)
    above = st.floats(min_value=high, exclude_min=high_is_in) if high != math.inf else st.just(math.inf)
    return inside, st.one_of(below, above, st.just(math.nan))


@dataclass(frozen=True)
class Option:
    """A callable with one numeric option."""

    name: str
    use: Any
    ranges: tuple[Any, Any]


def drop(**options):
    return SublayerDrop(**{"start": 1, "count": 1, **options})


def settings_of(**options):
    return SpeedSettings(**{"prompt_tokens": 32, "new_tokens": 8, **options}).check(MODEL)


def plan_of(**entry):
    fields = {"block": 1, "kind": "mlp", "path": "h.1", **entry}
    return DropPlan.from_dict({"format": "layershed.drop_plan.v1", "scope": "joint", "drops": [fields]})


OPTIONS = [
    Option("start", drop, at_least(1)),
    Option("count", drop, at_least(1)),
    Option("ratio", lambda ratio: SublayerDrop(1, ratio=ratio), between(0, 1)),
    Option(
        "target_speedup", lambda target_speedup: SublayerDrop(1, target_speedup=target_speedup), between(1, math.inf)
    ),
    Option("rounds", lambda rounds: drop(rounds=rounds, every_n_steps=5), at_least(2)),
    Option("every_n_steps", lambda every_n_steps: drop(rounds=2, every_n_steps=every_n_steps), at_least(1)),
    Option("calibration_batches", drop, at_least(1)),
    Option("quality_batches", drop, at_least(0)),
    Option("start", DropSchedule, at_least(1)),
    Option("every_n_steps", RedundancyMonitor, at_least(1)),
    Option("every_n_steps", Report, at_least(1)),
    Option("start", Quantization, at_least(0)),
    Option("start", LoRARecovery, at_least(0)),
    Option("rank", LoRARecovery, at_least(1)),
    Option("alpha", LoRARecovery, at_least(1)),
    Option("dropout", LoRARecovery, between(0, 1, low_is_in=True)),
    Option("lr_factor", LoRARecovery, between(0, math.inf)),
    Option("warmup_steps", LoRARecovery, at_least(0)),
    Option("weight", Distillation, between(0, 1, high_is_in=True)),
    Option("temperature", Distillation, between(0, math.inf)),
    Option("block_size", lambda block_size: TextData(block_size=block_size), at_least(2)),
    Option("batch_size", lambda batch_size: TextData(batch_size=batch_size), at_least(1)),
    Option("num_workers", lambda num_workers: TextData(num_workers=num_workers), at_least(0)),
    Option("val_fraction", lambda val_fraction: TextData(val_fraction=val_fraction), between(0, 1)),
    Option("max_tokens", lambda max_tokens: TextData(block_size=8, batch_size=2, max_tokens=max_tokens), at_least(16)),
    Option("batches", lambda batches: check_scoring("cosine", batches), at_least(1)),
    Option("quality_batches", lambda quality_batches: check_scoring("cosine", 1, quality_batches), at_least(1)),
    Option(
        "seed_everything",
        lambda seed_everything: check_seed(seed_everything),
        (st.integers(0, 2**32 - 1), st.integers(2**32) | st.integers(max_value=-1)),
    ),
    Option(
        "count",
        lambda count: select_sublayers(SCORES, "mlp", count=count),
        (st.integers(1, 8), st.integers(max_value=0)),
    ),
    Option("drop", lambda drop: select_sublayers(SCORES, "mlp", count=drop), (st.integers(1, 8), st.integers(9))),
    Option(
        "ratio",
        lambda ratio: select_sublayers(SCORES, "mlp", ratio=ratio),
        # an eighth of eight is one, also up to rounding
        (st.floats(0.125, 1, exclude_max=True), between(0.125, 1)[1].filter(lambda ratio: not 0.124 < ratio <= 0.125)),
    ),
    Option(
        "no block",
        lambda **block: select_sublayers(SCORES, "mlp", count=1, protect=block.values()),
        (st.integers(-8, 7), st.integers(8) | st.integers(max_value=-9)),
    ),
    *(
        Option(name, settings_of, (st.integers(1, 64), st.integers(max_value=0)))
        for name in ("prompt_tokens", "new_tokens")
    ),
    *(Option(name, settings_of, at_least(1)) for name in ("batch_size", "runs")),
    Option("warmup", settings_of, at_least(0)),
    Option("prompt_tokens", settings_of, (st.integers(1, 120), st.integers(121))),
    Option("block", plan_of, at_least(0)),
    Option("step", plan_of, at_least(0)),
    Option(
        "score",
        plan_of,
        (st.floats(allow_nan=False), st.just(math.nan)),
    ),
]


def name_of(option):
    return f"{option.name}-{OPTIONS.index(option)}"


options = pytest.mark.parametrize("option", OPTIONS, ids=name_of)
quickly = settings(max_examples=30, deadline=None, database=None)


@options
def test_number_out_of_range_error_names_option_and_value(option):
    @quickly
    @given(option.ranges[1])
    def check(value):
        with pytest.raises(LayershedError) as caught:
            option.use(**{option.name: value})
        assert option.name in str(caught.value)
        assert str(value) in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1

    check()


@pytest.mark.parametrize("option", some_of(OPTIONS, 3), ids=name_of)
def test_number_in_range_is_accepted(option):
    @quickly
    @given(option.ranges[0])
    def check(value):
        option.use(**{option.name: value})

    check()


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "batch_size", "runs"])
def test_speed_monitor_refuses_numbers_out_of_range_before_training(name):
    @quickly
    @given(st.integers(max_value=0))
    def check(value):
        monitor = SpeedMonitor(**{name: value})
        with pytest.raises(LayershedError, match=f"{name}={value}"):
            monitor.on_fit_start(SimpleNamespace(strategy=None), MODEL)

    check()
