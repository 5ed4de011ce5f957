"""Benchmarks of dropped models with a fake clock and a fake quality, whose figures are known in advance."""

import io
import json
import math
import platform
import random
from dataclasses import asdict, replace
from importlib.metadata import version

import pytest
import torch
from rich.console import Console
from torch.nn.functional import cross_entropy
from transformers import AutoModelForMaskedLM
from transformers.models.auto.configuration_auto import AutoConfig

from layershed.cli import benchmark as command
from layershed.cli.console import benchmark_notes, benchmark_tables
from layershed.discovery.find import find_sublayers
from layershed.discovery.probe import probing
from layershed.errors import LayershedError, MeasurementError, SelectionError
from layershed.performance.benchmark import (
    LIFTED,
    Bench,
    Benchmark,
    Measurement,
    check_comparison,
    lifted_base,
    shown_quality,
)
from layershed.performance.costs import CostModel
from layershed.performance.intervals import Interval
from layershed.performance.prediction import plan_of
from layershed.performance.roofline import Ceilings
from layershed.performance.speed import PhaseSpeed, SpeedReport
from layershed.performance.stopwatch import SpeedSettings
from layershed.planning.plan import Drop, DropPlan, ImportanceScores, Sublayer
from layershed.quality import Quality, evaluate_quality
from layershed.recovery.lora import inject_lora
from layershed.surgery import bypass, bypassed_sublayers, remove
from tests.support.models import SIZES, build_model
from tests.support.thinned import one_of
from tests.support.ticking import MADE_UP, Ticking, install

SETTINGS = SpeedSettings(prompt_tokens=3, new_tokens=2, batch_size=2, runs=3, warmup=1)
SCOPES = ("attention", "mlp", "joint", "block")


def share_of_kept(model):
    """A fake quality that differs for every drop."""
    gone = bypassed_sublayers(model)
    return Quality(loss=2 + sum(s.block + 1 + 0.5 * (s.kind == "mlp") for s in gone), accuracy=1 / 2, tokens=8)


class Case:
    """A model with known seconds per sublayer and random importances."""

    def __init__(self, monkeypatch, seed=0):
        generator = random.Random(seed)
        keys = [(block, kind) for block in range(4) for kind in ("attention", "mlp")]
        decode, prefill = ({key: float(generator.randint(1, 9)) for key in keys} for _ in range(2))
        self.clock = install(monkeypatch, Ticking(lambda *key: decode[key], lambda *key: prefill[key]))
        self.asked = []
        monkeypatch.setattr("layershed.performance.benchmark.measure_ceilings", self.ceilings)
        self.model = build_model()
        self.clock.watch(self.model)
        self.sublayers = find_sublayers(self.model)
        scores = {s: generator.random() for s in self.sublayers}
        self.scores = ImportanceScores(scores, blocks={b: generator.random() for b in range(4)}, metric="angular")

    def ceilings(self, *asked):
        self.asked.append(asked)
        return MADE_UP

    def speedup(self, gone, phase):
        return self.clock.speedup({(s.block, s.kind) for s in gone}, phase=phase)

    def ranked(self, scope, objective):
        """Expected order of dropping, computed without the tested code."""
        if scope == "block":
            groups = {b: [s for s in self.sublayers if s.block == b] for b in range(4)}
            importance = self.scores.blocks
        else:
            groups = {s: [s] for s in self.sublayers if scope in ("joint", s.kind)}
            importance = self.scores
        seconds = {key: sum(self.clock.decode(s.block, s.kind) for s in group) for key, group in groups.items()}
        price = {key: importance[key] / (seconds[key] if objective == "speed" else 1) for key in groups}
        return [groups[key] for key in sorted(groups, key=price.__getitem__)]


@pytest.fixture
def case(monkeypatch):
    return Case(monkeypatch)


@pytest.mark.parametrize(("objective", "seed"), one_of([("speed", 1), ("importance", 0)]))
def test_sweep_measures_every_scope_with_every_count(monkeypatch, objective, seed):
    case = Case(monkeypatch, seed)
    bench = Bench(case.model, share_of_kept, SETTINGS)
    seen = []
    for one in bench.sweep(case.scores, SCOPES, [1, 3], objective):
        assert bypassed_sublayers(case.model) == (), "what it hands out is measured, and the model is dense again"
        seen.append((one.scope, one.count))
        gone = [s for group in case.ranked(one.scope, objective)[: one.count] for s in group]
        assert list(one.plan) == gone
        assert (one.plan.scope, one.plan.metric) == (one.scope, "angular")
        assert one.quality == Quality(2 + sum(s.block + 1 + 0.5 * (s.kind == "mlp") for s in gone), 0.5, 8)
        for phase in ("prefill", "decode"):
            found = getattr(one.speed, phase).speedup
            assert [found.low, found.median, found.high] == pytest.approx(3 * [case.speedup(gone, phase)])
        taken = {name: getattr(one.speed, name) for name in ("prompt_tokens", "new_tokens", "batch_size", "runs")}
        assert taken == {"prompt_tokens": 3, "new_tokens": 2, "batch_size": 2, "runs": 3}
    assert seen == [(scope, count) for scope in SCOPES for count in (1, 3)]
    assert case.asked == [(torch.device("cpu"), torch.float32)], "the machine is asked once"


@pytest.mark.parametrize("where", ["quality", "caller"])
def test_interrupted_sweep_restores_the_dense_model(case, where):
    def quality(model):
        if where == "quality" and len(bypassed_sublayers(model)) == 2:
            raise RuntimeError("no more text")
        return share_of_kept(model)

    state = {name: weight.clone() for name, weight in case.model.state_dict().items()}
    sweep = Bench(case.model, quality, SETTINGS).sweep(case.scores, ["joint"], [1, 2, 3])
    next(sweep)
    if where == "quality":
        with pytest.raises(RuntimeError, match="no more text"):
            next(sweep)
    sweep.close()
    assert bypassed_sublayers(case.model) == ()
    assert all(parameter.requires_grad for parameter in case.model.parameters())
    assert all(torch.equal(weight, state[name]) for name, weight in case.model.state_dict().items())


def test_removed_model_is_measured_against_its_base(case):
    gone = case.sublayers[1:4]  # an attention between two MLPs
    base = build_model()
    case.clock.watch(base)
    remove(case.model, gone)
    measured = []
    bench = Bench(case.model, lambda model: measured.append(model) or Quality(3.0, 0.25, 8), SETTINGS, base)
    assert bench.dense_quality() == Quality(3.0, 0.25, 8)
    one = bench.measure(plan_of(gone))
    assert [model is base for model in measured] == [True, False]
    assert measured[1] is case.model
    assert (one.scope, one.count, tuple(one.plan)) == (None, None, gone)
    for phase in ("prefill", "decode"):
        assert getattr(one.speed, phase).speedup.median == pytest.approx(case.speedup(gone, phase))
    sizes = one.speed.parameters_dense, one.speed.parameters_dropped
    assert sizes == (base.num_parameters(), case.model.num_parameters())
    assert sizes[0] - sizes[1] == 2 * (3 * 32 * 48 + 32) + 2 * 32 * 32 + 2 * 32 * 16 + 32
    assert one.speed.kv_bytes_dense == 4 * 2 * 2 * 8 * 4
    # the dropped attention keeps one number, the length of the cache, for all ten tokens
    assert one.speed.kv_bytes_dropped == 3 * 2 * 2 * 8 * 4 + 4 / 10
    slow, fast = CostModel(base), CostModel(case.model)
    for phase, before, after in zip(
        ("prefill", "decode"), slow.seconds(MADE_UP, SETTINGS), fast.seconds(MADE_UP, SETTINGS), strict=True
    ):
        assert getattr(one.speed, phase).predicted == pytest.approx(before / after)


def plain_quality(model, tokens):
    """Compute loss and accuracy over all next tokens."""
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
    targets = tokens[:, 1:].flatten()
    return cross_entropy(logits, targets).item(), (logits.argmax(-1) == targets).double().mean().item()


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("adapted", [False, True])
def test_dense_quality_excludes_bypass_and_adapters(case, adapted, tokens):
    expected = plain_quality(build_model(), tokens)
    bypass(case.model, case.sublayers[1:4])
    if adapted:
        inject_lora(case.model)
        with torch.no_grad():
            for name, parameter in case.model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.1)
    dropped = plain_quality(case.model, tokens)
    bench = Bench(case.model, lambda model: evaluate_quality(model, [tokens]), SETTINGS)
    for _ in range(2):  # the second time shows that nothing was changed
        found = bench.dense_quality()
        assert (found.loss, found.accuracy) == pytest.approx(expected)
        after = bench.measure(plan_of(case.sublayers[1:4])).quality
        assert (after.loss, after.accuracy) == pytest.approx(dropped)
    assert found.loss != pytest.approx(after.loss, rel=1e-3)
    assert bypassed_sublayers(case.model) == case.sublayers[1:4]


def test_bench_refuses_unmeasurable_models_before_running_them(llama):
    llama.register_forward_pre_hook(lambda *_: None if probing() else pytest.fail("the model ran"))
    long = SpeedSettings(prompt_tokens=100, new_tokens=29)
    with pytest.raises(MeasurementError, match="128 positions"):
        Bench(llama, share_of_kept, long)
    with pytest.raises(MeasurementError, match="100 positions"):
        Bench(llama, share_of_kept, replace(long, new_tokens=28), build_model(max_position_embeddings=100))
    encoder = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **SIZES))
    with pytest.raises(MeasurementError, match="BertForMaskedLM does not predict the next token"):
        Bench(llama, share_of_kept, SETTINGS, encoder)


def test_benchmark_records_machine_and_versions(case):
    case.model.bfloat16()
    found = Bench(case.model, share_of_kept, SETTINGS).machine()
    assert found["dtype"] == "bfloat16"
    assert found["device"].startswith("cpu (1 thread")
    assert found["torch"] == torch.__version__
    assert found["transformers"] == version("transformers")
    assert found["python"] == platform.python_version()
    assert found["cores"] >= 1


# ---- check_comparison ----


def dropped_by(make, *indices):
    model = build_model()
    make(model, [find_sublayers(model)[i] for i in indices])
    return model


COMPARISONS = {
    "nothing dropped": (
        build_model,
        None,
        SCOPES,
        [],
        MeasurementError,
        r"nothing to compare\. .* --base .* --ckpt_path",
    ),
    "removed, no base": (
        lambda: dropped_by(remove, 0, 3),
        None,
        SCOPES,
        [],
        MeasurementError,
        r"weights of attention\.0, mlp\.1 were removed\. .* with --base",
    ),
    "removed, base": (lambda: dropped_by(remove, 0), "dense", SCOPES, [], None, ""),
    "bypassed": (lambda: dropped_by(bypass, 0), None, SCOPES, [], None, ""),
    "bypassed, base": (lambda: dropped_by(bypass, 0), "dense", SCOPES, [], None, ""),
    "two dense ones": (build_model, "dense", SCOPES, [], None, ""),
    "sweep": (build_model, None, SCOPES, [1, 4], None, ""),
    "sweep with a base": (
        build_model,
        "dense",
        SCOPES,
        [1],
        MeasurementError,
        "that model is the base. Leave out base",
    ),
    "sweep of a bypassed one": (
        lambda: dropped_by(bypass, 3),
        None,
        SCOPES,
        [1],
        MeasurementError,
        r"begins with the dense model, and this model already lacks mlp\.1",
    ),
    "sweep of a removed one": (
        lambda: dropped_by(remove, 3),
        "dense",
        SCOPES,
        [1],
        MeasurementError,
        r"this model already lacks mlp\.1",
    ),
    "sweep of no scope": (build_model, None, [], [1], SelectionError, "scopes is empty"),
    "sweep of too many": (build_model, None, ["joint", "mlp"], [1, 5], SelectionError, "drop 5, .* only 4"),
    "sweep of too many blocks": (build_model, None, ["joint", "block"], [5], SelectionError, "drop 5, .* only 4"),
    "sweep of none": (build_model, None, SCOPES, [2, 0], SelectionError, "count=0: count must be at least 1"),
    "sweep of a kind that is not there": (
        build_model,
        None,
        ["mlp", "cross_attention"],
        [1],
        SelectionError,
        "none of the 8 scores",
    ),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_check_comparison_refuses_only_invalid_comparisons(name):
    make, base, scopes, counts, error, message = COMPARISONS[name]
    if error is None:
        check_comparison(make(), base, scopes, counts)
    else:
        with pytest.raises(error, match=message) as caught:
            check_comparison(make(), base, scopes, counts)
        assert isinstance(caught.value, LayershedError)


# ---- results and tables ----

DECODE = PhaseSpeed(100.0, Interval(1.11, 1.08, 1.14), predicted=1.2)
PREFILL = PhaseSpeed(4000.0, Interval(1.01, 0.97, 1.05))
SPEED = SpeedReport(
    phases={"prefill": PREFILL, "decode": DECODE},
    parameters_dense=13_015_864_320,
    parameters_dropped=10_918_000_000,
    kv_bytes_dense=819_200.0,
    kv_bytes_dropped=409_600.0,
    file_bytes_dense=26_031_728_640,
    file_bytes_dropped=21_836_000_000,
    peak_memory_dense=27_000_000_000,
    peak_memory_dropped=22_000_000_000,
    runs=5,
    batch_size=2,
    prompt_tokens=1000,
    new_tokens=64,
    device="cpu (2 threads)",
)
PLAN = DropPlan((Drop(Sublayer(3, "attention", "a.3"), 0.1), Drop(Sublayer(1, "mlp", "m.1"), 0.2)), "joint", "cosine")
DENSE = Quality(loss=2.0, accuracy=0.682, tokens=12_345)
MEASURED = Measurement("joint", 2, PLAN, SPEED, Quality(loss=2.5, accuracy=0.658, tokens=12_345))


def benchmark_of(*measurements, quality="accuracy", base="llama"):
    settings = {**asdict(SpeedSettings(1000, 64, 2, 5)), "quality_batches": 16}
    machine = {"device": "cpu (2 threads)"}
    ceilings = Ceilings("a machine", 1e12, 1e10, "measured")
    return Benchmark("llama", base, DENSE, measurements, quality, ceilings, settings, machine)


def speed_with(decode):
    return replace(SPEED, phases={"prefill": PREFILL, "decode": replace(DECODE, speedup=decode)})


def with_decode(median, low, high):
    return replace(MEASURED, speed=speed_with(Interval(median, low, high)))


@pytest.mark.parametrize(
    ("quality", "expected"),
    [
        ("accuracy", (68.2 - 65.8) / 11),  # Llama-2-13B, Block-4 in the paper: 0.22
        ("loss", 100 * 0.5 / 11),
        ("perplexity", 100 * (math.exp(2.5) - math.exp(2.0)) / 11),
    ],
)
def test_sdr_divides_points_lost_by_percent_gained(quality, expected):
    result = benchmark_of(MEASURED, quality=quality)
    assert result.degradation(MEASURED) == pytest.approx(expected)
    better = replace(MEASURED, quality=Quality(loss=1.5, accuracy=0.7, tokens=1))
    assert result.degradation(better) < 0
    few = replace(MEASURED, speed=speed_with(replace(DECODE.speedup, values=5)))
    for slower in (with_decode(1.0, 0.9, 1.1), with_decode(0.8, 0.7, 0.9), with_decode(1.1, 0.99, 1.2), few):
        assert math.isnan(result.degradation(slower))
    if quality == "accuracy":
        assert round(result.degradation(MEASURED), 2) == 0.22


def test_quality_is_shown_in_the_unit_of_its_name():
    quality = Quality(loss=math.log(16), accuracy=0.375, tokens=8)
    names = ("accuracy", "loss", "perplexity")
    assert [shown_quality(quality, name) for name in names] == pytest.approx([37.5, 2.772588722, 16.0])


def test_benchmark_result_is_plain_json():
    as_it_is = replace(with_decode(0.9, 0.8, 1.0), scope=None, count=None)
    content = json.loads(json.dumps(benchmark_of(MEASURED, as_it_is).to_dict(), allow_nan=False))
    assert {key: content[key] for key in ("model", "base", "quality")} == {
        "model": "llama",
        "base": "llama",
        "quality": "accuracy",
    }
    assert Ceilings(**content["ceilings"]) == Ceilings("a machine", 1e12, 1e10, "measured")
    assert content["dense"] == {**asdict(DENSE), "perplexity": pytest.approx(math.exp(2))}
    first, second = content["measurements"]
    assert (first["scope"], first["count"], second["scope"], second["count"]) == ("joint", 2, None, None)
    assert (first["sdr"], second["sdr"]) == (pytest.approx(2.4 / 11), None)
    assert DropPlan.from_dict(first["plan"]) == PLAN
    assert first["quality"] == {
        "loss": 2.5,
        "accuracy": 0.658,
        "tokens": 12_345,
        "perplexity": pytest.approx(math.exp(2.5)),
    }
    prefill, decode = first["speed"].pop("phases").values()
    # 2 x 1,000 tokens of a prompt at 4,000 a second; a token of both sequences at 100 a second
    assert (prefill["dense_ms"], prefill["dropped_ms"]) == pytest.approx((500, 2e6 / 4040))
    assert (decode["dense_ms"], decode["dropped_ms"]) == pytest.approx((20, 2e3 / 111))
    assert (prefill["measurable"], decode["measurable"]) == (False, True)
    assert (prefill["measured_over_predicted"], decode["measured_over_predicted"]) == (None, pytest.approx(1.11 / 1.2))
    for phase, told in ((PREFILL, prefill), (DECODE, decode)):
        assert {key: told[key] for key in ("dense", "dropped", "predicted")} == {
            "dense": phase.dense,
            "dropped": phase.dropped,
            "predicted": phase.predicted,
        }
        assert Interval(**told["speedup"]) == phase.speedup
    assert first["speed"] == {k: v for k, v in asdict(SPEED).items() if k != "phases"}


def printed(table, width=80):
    """Cells of a printed table, separated by two blanks or more."""
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    lines = [line.rstrip() for line in console.export_text().splitlines() if line.strip() and "\u2500" not in line]
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


def test_benchmark_tables_show_sizes_quality_and_both_phases():
    slower = replace(with_decode(1.02, 0.98, 1.06), scope="block", count=12)
    sizes, prefill, decode = benchmark_tables(benchmark_of(MEASURED, slower))
    assert printed(sizes, 120) == [
        ["llama: size and quality"],
        ["parameters", "file", "peak memory", "KV cache/token", "loss", "accuracy", "perplexity", "SDR"],
        ["dense", "13.02 B", "26.0 GB", "27.0 GB", "819.2 kB", "2.0000", "68.2 %", "7.39"],
        ["joint 2", "10.92 B", "21.8 GB", "22.0 GB", "409.6 kB", "2.5000", "65.8 %", "12.2", "0.218"],
        ["block 12", "10.92 B", "21.8 GB", "22.0 GB", "409.6 kB", "2.5000", "65.8 %", "12.2", "-"],
    ]
    # the tables fit into eighty columns, even without a speedup
    assert printed(prefill) == [
        ["prefill"],
        ["tokens/s", "ms", "speedup [95 %]", "theory"],
        ["dense", "4,000", "500"],
        ["joint 2", "4,040", "495", "x1.01 [0.97, 1.05]", "-"],
        ["no measurable speedup"],
        ["block 12", "4,040", "495", "x1.01 [0.97, 1.05]", "-"],
        ["no measurable speedup"],
    ]
    assert printed(decode) == [
        ["decode"],
        ["tokens/s", "ms/token", "speedup [95 %]", "theory"],
        ["dense", "100", "20"],
        ["joint 2", "111", "18", "x1.11 [1.08, 1.14]", "x1.20 (0.93)"],
        ["block 12", "102", "19.6", "x1.02 [0.98, 1.06]", "x1.20 (0.85)"],
        ["no measurable speedup"],
    ]


@pytest.mark.parametrize(
    ("drops", "label"),
    [(PLAN.drops, "1 attention, 1 mlp"), (PLAN.drops[:1], "1 attention"), ((), "compared")],
    ids=["both kinds", "one kind", "nothing"],
)
def test_single_model_is_labelled_by_its_dropped_sublayers(drops, label):
    one = replace(MEASURED, scope=None, count=None, plan=DropPlan(drops))
    for table in benchmark_tables(benchmark_of(one)):
        assert [row[0] for row in printed(table, 120)][2:4] == ["dense", label]


def test_dense_row_of_a_sweep_is_the_median_of_its_measurements():
    faster = [
        replace(MEASURED, speed=replace(SPEED, phases={"prefill": PREFILL, "decode": replace(DECODE, dense=d)}))
        for d in (80.0, 125.0, 200.0)
    ]
    *_, decode = benchmark_tables(benchmark_of(*faster))
    assert printed(decode)[2] == ["dense", "125", "16"]


@pytest.mark.parametrize(
    ("quality", "unit"),
    [("accuracy", "points of accuracy"), ("loss", "hundredths of loss"), ("perplexity", "hundredths of perplexity")],
)
def test_benchmark_notes_name_the_unit_of_the_sdr(quality, unit):
    notes = " ".join(benchmark_notes(benchmark_of(MEASURED, quality=quality)))
    assert "Dense: llama." in notes
    assert f"SDR: {unit} lost per % of decode speed gained" in notes
    assert "Median of 5 pairs, 2 x 1000 tokens prefill and 64 decoded, on cpu (2 threads)" in notes
    assert "quality over 12,345 tokens" in notes


def test_lifted_base_without_adapters_has_no_sdr():
    """Their weights may have changed since the drop, so they are not the dense model."""
    result = benchmark_of(MEASURED, base=LIFTED)
    notes = " ".join(benchmark_notes(result))
    assert "Dense: the same weights with the bypass lifted." in notes
    assert "there is no SDR. Give the model before the drop by --base" in notes
    assert "SDR:" not in notes
    assert math.isnan(result.degradation(MEASURED))
    model = build_model()
    assert lifted_base(model) == LIFTED
    inject_lora(model)
    assert benchmark_of(MEASURED, base=lifted_base(model)).degradation(MEASURED) == pytest.approx(2.4 / 11)


@pytest.mark.parametrize(
    ("quality", "loss", "label", "scale"),
    [
        ("accuracy", 9.0, "next-token accuracy (%)", "linear"),
        ("loss", 9.0, "loss (nats per token), lower is better", "linear"),
        ("perplexity", 4.2, "perplexity, lower is better", "linear"),  # of 2.0, nine times as much
        ("perplexity", 4.4, "perplexity, lower is better", "log"),  # eleven times
    ],
)
def test_only_wide_perplexity_range_gets_a_logarithmic_axis(quality, loss, label, scale):
    worse = Quality(loss=loss, accuracy=0.01, tokens=8)
    result = benchmark_of(MEASURED, Measurement("mlp", 4, MEASURED.plan, MEASURED.speed, worse), quality=quality)
    figure = command._frontier(result)
    assert (figure.axes[0].get_ylabel(), figure.axes[0].get_yscale()) == (label, scale)
    assert figure.get_suptitle() == "llama on cpu (2 threads)"
