"""Measured speed on a clock that moves only when the model runs, so that every figure can be worked out by hand."""

import json
import math
import random
import statistics
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import AutoModel, DynamicCache

from layershed.discovery import find_sublayers
from layershed.errors import MeasurementError
from layershed.speed import (
    Interval,
    PhaseSpeed,
    SpeedReport,
    bootstrap_interval,
    cache_bytes,
    measure_speed,
    speedup_degradation_ratio,
)
from layershed.surgery import bypass, bypassed_sublayers, remove
from tests.conftest import build_model


class Bench:
    """A model that takes seconds of its own clock: so many per prompt and per decoded token, as told for each run."""

    def __init__(self, model, prefill, decode):
        self.model, self.costs = model, {"prefill": prefill, "decode": decode}
        self.now = 1000.0
        self.passes = []  # of each forward pass: side, tokens, tokens in the cache before
        self.runs = {"dense": -1, "dropped": -1}
        model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, _module, _args, kwargs):
        cache = kwargs.get("past_key_values")
        side = "dropped" if bypassed_sublayers(self.model) else "dense"
        held = 0 if cache is None else cache.get_seq_length()
        self.passes.append((side, kwargs["input_ids"].shape[1], held))
        self.runs[side] += held == 0
        costs = self.costs["decode" if held else "prefill"][side]
        self.now += costs[self.runs[side] % len(costs)]

    def clock(self):
        return self.now


def kept_attentions(model):
    return [s for s in find_sublayers(model) if s.kind == "attention" and s not in bypassed_sublayers(model)]


@pytest.fixture
def dropped():
    model = build_model()
    bypass(model, find_sublayers(model)[:3])  # attention.0, mlp.0, attention.1
    return model


def measured(model, **settings):
    return measure_speed(model, **{"prompt_tokens": 4, "new_tokens": 2, "runs": 1, "warmup": 0, **settings})


def test_twice_the_time_is_exactly_half_the_speed(dropped):
    bench = Bench(dropped, {"dense": [2.0], "dropped": [1.0]}, {"dense": [0.75], "dropped": [0.25]})
    report = measured(dropped, runs=3, batch_size=3, prompt_tokens=8, new_tokens=4, clock=bench.clock)
    # 3 x 8 prompt tokens in 2 s or 1 s; 3 x 4 new tokens in 4 x 0.75 s or 4 x 0.25 s
    assert report.prefill == PhaseSpeed(dense=12.0, dropped=24.0, speedup=Interval(2.0, 2.0, 2.0))
    assert report.decode == PhaseSpeed(dense=4.0, dropped=12.0, speedup=Interval(3.0, 3.0, 3.0))
    assert (report.runs, report.batch_size, report.prompt_tokens, report.new_tokens) == (3, 3, 8, 4)
    assert report.device.startswith("cpu")


def test_the_speedup_is_the_median_over_pairs_not_the_ratio_of_medians(dropped):
    # pairs: 8/1, 2/2, 6/4; medians 6 and 2 would give 3
    bench = Bench(dropped, {"dense": [8.0, 2.0, 6.0], "dropped": [1.0, 2.0, 4.0]}, {"dense": [1.0], "dropped": [1.0]})
    report = measured(dropped, runs=3, clock=bench.clock)
    assert report.prefill.speedup.median == 1.5
    assert (report.prefill.dense, report.prefill.dropped) == (4 / 6, 4 / 2)


def test_dense_and_dropped_alternate_and_warm_up_is_not_counted(dropped):
    slow = {"dense": [64.0, 64.0, 2.0], "dropped": [1.0, 1.0, 1.0]}
    bench = Bench(dropped, slow, slow)
    report = measured(dropped, runs=1, warmup=2, clock=bench.clock)
    assert [side for side, _, held in bench.passes if held == 0] == ["dense", "dropped"] * 3
    assert report.prefill.speedup.median == report.decode.speedup.median == 2.0
    assert report.runs == 1


def test_the_clock_sees_dense_while_dense_runs_and_dropped_while_dropped_runs(dropped):
    seen = []

    def clock():
        seen.append(bool(bypassed_sublayers(dropped)))
        return float(len(seen))

    measured(dropped, runs=2, warmup=1, clock=clock)
    sides = [seen[0], *(now for before, now in pairwise(seen) if before != now)]
    assert sides == [False, True] * 3


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi"])
def test_decoding_goes_token_by_token_through_the_cache(model_type):
    model = build_model(model_type)
    bypass(model, find_sublayers(model)[:1])
    bench = Bench(model, {"dense": [1.0], "dropped": [1.0]}, {"dense": [1.0], "dropped": [1.0]})
    measured(model, prompt_tokens=5, new_tokens=3, clock=bench.clock)
    steps = [(5, 0), (1, 5), (1, 6), (1, 7)]
    assert bench.passes == [(side, *step) for side in ("dense", "dropped") for step in steps]


def test_every_token_decoded_is_the_most_likely_one(dropped):
    fed = []
    dropped.register_forward_pre_hook(
        lambda _m, _a, kwargs: fed.append((bool(bypassed_sublayers(dropped)), kwargs["input_ids"].clone())),
        with_kwargs=True,
    )
    measured(dropped, prompt_tokens=5, new_tokens=4)
    whole = torch.cat([ids for is_dropped, ids in fed if is_dropped], dim=1)
    with torch.no_grad():
        likely = dropped(input_ids=whole, use_cache=False).logits.argmax(-1)
    assert torch.equal(whole[:, 5:], likely[:, 4:-1])


def test_cache_bytes_and_parameters_are_those_of_theory(dropped):
    report = measured(dropped, prompt_tokens=64, new_tokens=8, batch_size=2)
    per_attention = 2 * 2 * 8 * 4  # keys and values, KV heads, head size, bytes of a float32
    assert report.kv_bytes_dense == 4 * per_attention
    assert report.kv_bytes_dropped == pytest.approx(len(kept_attentions(dropped)) * per_attention, rel=0.01)
    assert report.kv_bytes_dropped == pytest.approx(2 * per_attention, rel=0.01)
    attention, mlp, norm = 32 * 32 * 2 + 32 * 16 * 2, 3 * 32 * 48, 32
    total = 2 * 97 * 32 + norm + 4 * (attention + mlp + 2 * norm)
    assert report.parameters_dense == total
    assert report.parameters_dropped == total - 2 * (attention + norm) - (mlp + norm)


def test_memory_that_tensors_of_a_cache_share_counts_once():
    cache = DynamicCache()
    keys = torch.zeros(1, 2, 10, 8)
    cache.update(keys, torch.zeros(1, 2, 10, 8), 0)
    alone = cache_bytes(cache)
    cache.update(keys, keys, 1)
    cache.layers[1].keys, cache.layers[1].values = cache.layers[0].keys, cache.layers[0].values[:, :, :3]
    assert cache_bytes(cache) == alone == 2 * 2 * 10 * 8 * 4


def state_of(model):
    return {
        "bypassed": bypassed_sublayers(model),
        "training": [module.training for module in model.modules()],
        "trainable": [parameter.requires_grad for parameter in model.parameters()],
        "forwards": {path: m.__dict__.get("forward") for path, m in model.named_modules()},
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "grad": torch.is_grad_enabled(),
        "use_cache": model.config.use_cache,
    }


@pytest.mark.parametrize("fail_in", ["never", "dense", "dropped"])
def test_the_model_and_the_random_state_are_as_before_also_after_an_error(dropped, fail_in):
    dropped.train()
    dropped.model.layers[1].eval()
    dropped.lm_head.requires_grad_(False)
    before, weights = state_of(dropped), {name: w.clone() for name, w in dropped.state_dict().items()}

    def fail(_module, _args, kwargs):
        assert not torch.is_grad_enabled()
        assert not any(module.training for module in dropped.modules())
        side = "dropped" if bypassed_sublayers(dropped) else "dense"
        if side == fail_in and kwargs["input_ids"].shape[1] == 1:
            raise KeyError("out of memory")

    handle = dropped.register_forward_pre_hook(fail, with_kwargs=True)
    if fail_in == "never":
        measured(dropped)
    else:
        with pytest.raises(KeyError, match="out of memory"):
            measured(dropped)
    handle.remove()
    assert state_of(dropped) == before
    assert all(torch.equal(weight, weights[name]) for name, weight in dropped.state_dict().items())


def test_a_module_that_holds_the_model_is_measured_as_the_model(dropped):
    bench = Bench(dropped, {"dense": [2.0], "dropped": [1.0]}, {"dense": [2.0], "dropped": [1.0]})
    holder = nn.ModuleDict({"student": dropped, "teacher": build_model("gpt2")})
    assert measured(holder, name="student", clock=bench.clock).prefill.speedup.median == 2.0


def test_a_report_survives_json(dropped):
    bench = Bench(dropped, {"dense": [2.0, 3.0], "dropped": [1.0]}, {"dense": [2.0], "dropped": [1.0]})
    report = measured(dropped, runs=2, clock=bench.clock)
    content = json.loads(json.dumps(report.to_dict()))
    assert content["prefill"]["speedup"]["median"] == 2.5
    assert SpeedReport.from_dict(content) == report


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens=0"),
        ({"new_tokens": 0}, "new_tokens=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"runs": 0}, "runs=0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"prompt_tokens": 120, "new_tokens": 9}, "128 positions"),
    ],
)
def test_settings_that_cannot_be_measured_are_refused_before_anything_runs(dropped, settings, message):
    dropped.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(MeasurementError, match=message):
        measured(dropped, **settings)


def test_as_many_tokens_as_there_are_positions_fit(dropped):
    assert measured(dropped, prompt_tokens=120, new_tokens=8).prompt_tokens == 120


def test_nothing_bypassed_is_refused(llama):
    with pytest.raises(MeasurementError, match="nothing is bypassed"):
        measured(llama)
    remove(llama, find_sublayers(llama)[:1])
    with pytest.raises(MeasurementError, match="nothing is bypassed"):
        measured(llama)


def test_a_model_without_a_head_is_refused(llama):
    model = AutoModel.from_config(llama.config)
    bypass(model, find_sublayers(model)[:1])
    with pytest.raises(MeasurementError, match="LlamaModel"):
        measured(model)


def at_most(k, n):
    """Probability that the median of n draws from n sorted values is at most the k-th, so that most draws are."""
    return sum(math.comb(n, i) * (k / n) ** i * (1 - k / n) ** (n - i) for i in range(n // 2 + 1, n + 1))


@pytest.mark.parametrize("n", [3, 5, 7, 13, 19])
def test_the_interval_is_that_of_the_exact_distribution_of_resampled_medians(n):
    values = [1 + i / 100 for i in range(n)]
    random.Random(0).shuffle(values)
    k = next(k for k in range(1, n + 1) if at_most(k, n) >= 0.025)
    low = 1 + (k - 1) / 100
    # the chance that 2,000 resamples decide otherwise is nil: the quantile is well inside its step
    assert at_most(k - 1, n) < 0.016
    assert at_most(k, n) > 0.045
    assert bootstrap_interval(values) == Interval(statistics.median(values), low, 1 + (n - k) / 100)


def test_the_interval_of_one_constant_is_that_constant():
    assert bootstrap_interval([1.25] * 7) == Interval(1.25, 1.25, 1.25)
    assert bootstrap_interval([1.25]) == Interval(1.25, 1.25, 1.25)


@pytest.mark.parametrize("n", [2, 9, 15, 24])
def test_the_interval_mirrors_with_its_values_and_is_always_the_same(n):
    generator = random.Random(1)
    values = [generator.gauss(1, 0.1) for _ in range(n)]
    there, back = bootstrap_interval(values), bootstrap_interval([-value for value in values])
    assert (back.low, back.median, back.high) == (-there.high, -there.median, -there.low)
    assert there == bootstrap_interval(values)
    assert there.low < there.median < there.high


def test_the_interval_widens_with_the_spread_and_narrows_with_the_number():
    generator = random.Random(1)
    noise = [generator.gauss(0, 1) for _ in range(101)]
    few, wide, many = (
        bootstrap_interval([1 + scale * x for x in part])
        for scale, part in ((0.01, noise[:11]), (0.1, noise[:11]), (0.01, noise))
    )
    assert wide.high - wide.low == pytest.approx(10 * (few.high - few.low))
    assert many.high - many.low < few.high - few.low


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(1.01, 1.2, True), (0.8, 0.99, True), (0.9, 1.1, False), (1.0, 1.1, False), (0.9, 1.0, False)],
)
def test_a_speedup_is_measurable_where_its_interval_excludes_1(low, high, expected):
    assert PhaseSpeed(1.0, 1.0, Interval((low + high) / 2, low, high)).measurable is expected


# arXiv 2406.15786: average score dense and dropped, speedup, SDR. Llama-2-13B's Attn-4 (68.2, 68.5, 1.05, -.05) is left
# out: its inputs are printed with too few digits to give its SDR.
PAPER = [
    (68.2, 65.8, 1.11, 0.22),
    (68.2, 60.7, 1.24, 0.31),
    (68.2, 66.9, 1.04, 0.32),
    (68.2, 61.9, 1.08, 0.79),
    (68.2, 68.1, 1.13, 0.01),
    (70.3, 67.1, 1.14, 0.23),
    (70.3, 58.6, 1.32, 0.37),
    (70.3, 66.9, 1.03, 1.13),
    (70.3, 53.4, 1.06, 2.82),
    (70.3, 69.9, 1.10, 0.04),
    (70.3, 69.8, 1.23, 0.02),
    (70.3, 67.3, 1.40, 0.08),
    (73.9, 71.5, 1.48, 0.05),
]


@pytest.mark.parametrize(("dense", "dropped", "speedup", "expected"), PAPER)
def test_the_speedup_degradation_ratio_is_the_papers(dense, dropped, speedup, expected):
    assert speedup_degradation_ratio(dense - dropped, speedup) == pytest.approx(expected, abs=0.005 + 1e-9)


def test_the_speedup_degradation_ratio_of_better_quality_is_negative_and_of_no_gain_is_nan():
    assert speedup_degradation_ratio(-3.0, 1.5) == pytest.approx(-0.06)
    assert speedup_degradation_ratio(0.0, 1.5) == 0
    assert math.isnan(speedup_degradation_ratio(2.0, 1.0))
    assert math.isnan(speedup_degradation_ratio(2.0, 0.9))
