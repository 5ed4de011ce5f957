"""Predictions against the paper's memory table, published sizes and a roofline by hand."""

import io
import json
import math
import resource
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForMaskedLM
from transformers.models.auto.configuration_auto import AutoConfig

from layershed.cli.console import prediction_notes, prediction_table
from layershed.discovery.find import find_sublayers
from layershed.errors import MeasurementError, PlanError, SelectionError, UnknownNameError
from layershed.performance.costs import CostModel
from layershed.performance.model_size import weight_sizes
from layershed.performance.prediction import PredictedPhase, ceilings_of, deepest_sublayers, plan_of, predict
from layershed.performance.roofline import ACCELERATORS, Ceilings, Cost, accelerator
from layershed.performance.stopwatch import SpeedSettings
from layershed.planning.plan import Drop, DropPlan, Sublayer
from layershed.saving.load_model import build_model as build
from layershed.surgery import bypass, bypassed_sublayers
from tests.support.models import SIZES, build_model
from tests.support.thinned import one_of

MODELS = Path(__file__).parents[2] / "configs" / "models"
GIB = 2**30
# Parameters as the models' publishers count them in their safetensors files.
PARAMETERS = {
    "mistral-7b": 7_241_732_096,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-70b": 70_553_706_496,
}
# Table 4 of arXiv 2406.15786: sequences of 2,048 tokens in a 16-bit cache, attentions before and after the drop, and
# GB before and after. The GB are GiB: 2 bytes x 2 x key-value heads x head size x attentions x tokens gives three rows
# exactly. For Llama-2-13B it gives 50 GiB (53.7 GB), where the table says 52.
PAPER = {
    "mistral-7b": (64, 32, 20, 16, 10),
    "llama-2-13b": (32, 40, 20, 52, 26),
    "llama-2-70b": (32, 80, 40, 20, 10),
}
MADE_UP = Ceilings("made up", flops=1e6, bandwidth=1e6, source="nowhere", memory=50_000)


def skeleton(name):
    with torch.device("meta"):
        return build(str(MODELS / name), None, torch.bfloat16)


def fields_of(name):
    config = json.loads((MODELS / name / "config.json").read_text())
    config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    return SimpleNamespace(**config)


def attention_numbers(config):
    """Numbers in the four matrices of an attention and in its norm."""
    width, kept = config.hidden_size, config.num_key_value_heads * config.head_dim
    return 2 * width * width + 2 * width * kept + width


def attentions(first, last):
    """Numbers of these blocks."""
    return [Sublayer(i, "attention", f"model.layers.{i}.self_attn") for i in range(first, last)]


def numbers(config):
    """All numbers of a Llama or a Mistral whose head is not tied."""
    width = config.hidden_size
    block = attention_numbers(config) + 3 * width * config.intermediate_size + width
    return config.num_hidden_layers * block + 2 * config.vocab_size * width + width


@pytest.mark.parametrize("name", PARAMETERS)
def test_skeleton_has_the_published_number_of_parameters(name):
    model = skeleton(name)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert numbers(fields_of(name)) == PARAMETERS[name]
    sizes = weight_sizes(model)
    assert (sizes.parameters, sizes.bytes) == (PARAMETERS[name], 2 * PARAMETERS[name])


def test_every_model_config_is_in_the_parameter_table():
    assert {path.name for path in MODELS.iterdir()} == set(PARAMETERS)


@pytest.mark.parametrize("name", one_of(["mistral-7b", "llama-2-70b"]))
def test_cache_size_equals_the_papers_table(name):
    batch_size, before, after, gb_before, gb_after = PAPER[name]
    config, costs = fields_of(name), CostModel(skeleton(name))
    caches = [
        costs.kv_bytes(batch_size=batch_size, tokens=2048, dropped=gone) for gone in ((), attentions(after, before))
    ]
    a_token = 2 * 2 * config.num_key_value_heads * config.head_dim
    assert caches == [number * a_token * batch_size * 2048 for number in (before, after)]
    assert caches == [gb_before * GIB, gb_after * GIB]


@pytest.mark.slow  # the next test builds the same model
def test_llama_2_13b_cache_equals_the_paper_at_another_length():
    """The figures match in decimal GB with 16 sequences of 3,968 tokens, as docs/performance.md says."""
    costs = CostModel(skeleton("llama-2-13b"))
    caches = [costs.kv_bytes(batch_size=16, tokens=3968, dropped=gone) for gone in ((), attentions(20, 40))]
    assert [round(size / 1e9, 1) for size in caches] == [52.0, 26.0]


@pytest.mark.slow
def test_skeleton_of_a_huge_model_predicts_dropping_half_the_attentions():
    config, model = fields_of("llama-2-13b"), skeleton("llama-2-13b")
    batch_size, before, after, gb_before, gb_after = PAPER["llama-2-13b"]
    plan = plan_of(attentions(after, before))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = predict(model, plan, accelerator("a100"), SpeedSettings(1024, 1024, batch_size))
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
    assert grown < found.dense.weight_bytes / 20
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    size, dense, dropped = PARAMETERS["llama-2-13b"], found.dense, found.dropped
    assert (dense.parameters, dense.weight_bytes, dense.kv_bytes) == (size, 2 * size, 50 * GIB)
    size -= 20 * attention_numbers(config)
    assert (dropped.parameters, dropped.weight_bytes, dropped.kv_bytes) == (size, 2 * size, 25 * GIB)
    assert dense.kv_bytes == before * 2 * 2 * config.num_key_value_heads * config.head_dim * 32 * 2048
    assert [dense.kv_bytes / GIB, dropped.kv_bytes / GIB] == pytest.approx([gb_before, gb_after], rel=0.04)
    assert (dense.devices(32e9), dropped.devices(32e9)) == (3, 2)  # 79.7 GB and 48.7 GB
    # a step reads all weights but those of the embedding's rows, and a cache that is three quarters full
    read = dense.weight_bytes - 2 * 32_000 * 5120 + (1024 + 512) / 2048 * dense.kv_bytes
    assert dense.decode.seconds == pytest.approx(read / 2039e9, rel=0.01)
    assert dense.decode.bound == "memory"


# ---- a Llama of four blocks, by hand ----


def by_hand(rows, keys, batch_size, element=4):
    """FLOPs and bytes of an attention, an MLP and the rest, for so many new tokens of all sequences together."""
    maps = [(32, 32), (32, 16), (32, 16), (32, 32)]
    numbers_read, activations = sum(a * b for a, b in maps), sum(a + b for a, b in maps)
    cached = batch_size * (keys + rows // batch_size) * 2 * 2 * 8  # read, and written for the new tokens
    attention = Cost(
        2 * rows * numbers_read + 2 * rows * keys * 4 * (8 + 8),
        element * (numbers_read + 32 + rows * activations + cached),
    )
    mlp = Cost(2 * rows * 3 * 32 * 48, element * (3 * 32 * 48 + 32 + rows * 3 * (32 + 48)))
    head = batch_size * 97 * 32  # the last position only
    rest = Cost(2 * head, element * (97 * 32 + batch_size * (97 + 32) + 32 + rows * 32))
    return {"attention": attention, "mlp": mlp, "rest": rest}


def seconds_by_hand(costs, counts, ceilings):
    """Seconds of all consecutive pieces, and of the compute-bound ones among them."""
    times = [
        (number, cost.flops / ceilings.flops, cost.bytes / ceilings.bandwidth)
        for number, cost in zip(counts, costs, strict=True)
    ]
    return sum(n * max(a, b) for n, a, b in times), sum(n * a for n, a, b in times if a >= b)


SETTINGS = SpeedSettings(prompt_tokens=20, new_tokens=5, batch_size=3)
GONE = (
    Sublayer(3, "attention", "model.layers.3.self_attn"),
    Sublayer(1, "attention", "model.layers.1.self_attn"),
    Sublayer(2, "mlp", "model.layers.2.mlp"),
)


@pytest.mark.parametrize(
    ("device", "flops", "bandwidth", "bound"),
    [
        ("cpu", 1e3, 1e9, ("compute", "compute")),
        ("cpu", 1e9, 1e3, ("memory", "memory")),
        # a prompt computes at least 10 FLOPs per byte, a step of three sequences about 2
        ("cpu", 5e6, 1e6, ("compute", "memory")),
        ("meta", 2e6, 1.3e6, ("compute", "memory")),
    ],
    ids=["compute-bound", "memory-bound", "mixed", "meta device"],
)
def test_predicted_times_equal_a_roofline_by_hand(device, flops, bandwidth, bound):
    with torch.device(device):
        model = build(None, {"model_type": "llama", **SIZES})
    ceilings = Ceilings("made up", flops, bandwidth, "nowhere")
    found = predict(model, plan_of(GONE), ceilings, SETTINGS)
    phases = {"prefill": by_hand(3 * 20, 20, 3), "decode": by_hand(3, 20 + 2 + 1, 3)}  # the third of five steps
    tokens = {"prefill": 3 * 20, "decode": 3}
    sums = {}
    for side, counts in ((found.dense, (4, 4, 1)), (found.dropped, (2, 3, 1))):
        for (phase, costs), expected in zip(phases.items(), bound, strict=True):
            seconds, computing = seconds_by_hand(costs.values(), counts, ceilings)
            told = getattr(side, phase)
            assert told.seconds == pytest.approx(seconds)
            assert told.tokens_per_s == pytest.approx(tokens[phase] / seconds)
            assert told.bound == expected == ("compute" if computing > seconds / 2 else "memory")
            sums.setdefault(phase, []).append(seconds)
        step = phases["decode"]
        assert set(side.work) == {"attention", "mlp", "rest"}
        for (part, cost), count in zip(step.items(), counts, strict=True):
            assert side.work[part].flops == pytest.approx(count * cost.flops / 3)
            assert side.work[part].bytes == pytest.approx(count * cost.bytes / 3)
    assert found.prefill_speedup == pytest.approx(sums["prefill"][0] / sums["prefill"][1])
    assert found.decode_speedup == pytest.approx(sums["decode"][0] / sums["decode"][1])
    assert (found.batch_size, found.prompt_tokens, found.new_tokens) == (3, 20, 5)
    assert (found.dtype, found.ceilings) == ("float32", ceilings)


def test_predicted_sizes_and_devices_equal_hand_counts():
    model = build_model()
    found = predict(model, plan_of(GONE), MADE_UP, SETTINGS)
    attention, mlp = 2 * 32 * 32 + 2 * 32 * 16 + 32, 3 * 32 * 48 + 32
    rest = 2 * 97 * 32 + 32
    assert found.dense.parameters == 4 * (attention + mlp) + rest == model.num_parameters()
    assert found.dropped.parameters == 2 * attention + 3 * mlp + rest
    for side, attentions in ((found.dense, 4), (found.dropped, 2)):
        assert side.weight_bytes == 4 * side.parameters
        assert side.kv_bytes == attentions * 2 * 2 * 8 * 4 * 3 * (20 + 5)
        needed = side.weight_bytes + side.kv_bytes
        assert [side.devices(needed / n) for n in (1, 2, 3)] == [1, 2, 3]
        assert (side.devices(needed + 1), side.devices(needed - 1)) == (1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_prediction_in_half_precision_halves_the_bytes(dtype):
    full, half = (predict(build_model().to(d), plan_of(GONE), MADE_UP, SETTINGS) for d in (torch.float32, dtype))
    assert half.dtype == str(dtype).removeprefix("torch.")
    for one, other in ((full.dense, half.dense), (full.dropped, half.dropped)):
        assert (one.parameters, one.kv_bytes) == (other.parameters, 2 * other.kv_bytes)
        assert one.weight_bytes == 2 * other.weight_bytes
        assert {part: cost.bytes for part, cost in one.work.items()} == {
            part: 2 * cost.bytes for part, cost in other.work.items()
        }


def test_predict_leaves_the_model_unchanged():
    model = build_model().train()
    bypass(model, GONE[:1])
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    predict(model, plan_of(GONE), MADE_UP, SETTINGS)
    assert bypassed_sublayers(model) == GONE[:1]
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())


def test_predict_counts_bypassed_sublayers_as_dropped():
    dense, dropped = build_model(), build_model()
    expected = predict(dense, plan_of(GONE), MADE_UP, SETTINGS)
    bypass(dropped, GONE)
    found = predict(dropped, None, MADE_UP, SETTINGS)
    assert set(found.plan) == set(GONE)
    assert replace(found, plan=expected.plan) == expected
    bypass(partly := build_model(), GONE[:2])
    found = predict(partly, plan_of(GONE[1:]), MADE_UP, SETTINGS)
    assert tuple(found.plan) == GONE[1:]
    assert replace(found, plan=expected.plan) == expected


def test_predict_without_a_drop_gives_no_speedup():
    found = predict(build_model(), None, MADE_UP, SETTINGS)
    assert found.dense == found.dropped
    assert (len(found.plan), found.prefill_speedup, found.decode_speedup) == (0, 1.0, 1.0)


def test_predict_finds_a_transformer_by_name():
    holder = torch.nn.ModuleDict({"student": build_model(), "teacher": build_model("gpt2")})
    own = predict(holder, plan_of(GONE), MADE_UP, SETTINGS, name="student")
    assert own == predict(build_model(), plan_of(GONE), MADE_UP, SETTINGS)


def test_refused_prediction_leaves_the_model_unchanged(llama):
    with pytest.raises(MeasurementError, match="128 positions"):
        predict(llama, plan_of(GONE), MADE_UP, SpeedSettings(100, 29))
    with pytest.raises(MeasurementError, match="batch_size=0"):
        predict(llama, plan_of(GONE), MADE_UP, SpeedSettings(batch_size=0))
    with pytest.raises(PlanError, match=r"no sublayer mlp\.4"):
        predict(llama, plan_of([*GONE, Sublayer(4, "mlp", "model.layers.4.mlp")]), MADE_UP, SETTINGS)
    assert bypassed_sublayers(llama) == ()
    with pytest.raises(MeasurementError, match="BertForMaskedLM does not predict the next token"):
        predict(AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **SIZES)), None, MADE_UP, SETTINGS)


def test_prediction_is_plain_json():
    plan = DropPlan(tuple(Drop(sublayer, 0.25) for sublayer in GONE), "joint", "cosine")
    found = predict(build_model(), plan, MADE_UP, SETTINGS)
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert replace(DropPlan.from_dict(content["plan"]), model=None) == plan
    assert content["decode_speedup"] == content["dense"]["decode"]["seconds"] / content["dropped"]["decode"]["seconds"]
    assert (
        content["prefill_speedup"] == content["dense"]["prefill"]["seconds"] / content["dropped"]["prefill"]["seconds"]
    )
    for name, side in (("dense", found.dense), ("dropped", found.dropped)):
        assert content[name]["devices"] == math.ceil((side.weight_bytes + side.kv_bytes) / 50_000) > 1
        assert PredictedPhase(**content[name]["prefill"]) == side.prefill
        assert {part: Cost(**cost) for part, cost in content[name]["work"].items()} == side.work
    assert Ceilings(**content["ceilings"]) == MADE_UP
    unknown = predict(build_model(), plan, replace(MADE_UP, memory=None), SETTINGS).to_dict()
    assert unknown["dense"]["devices"] is unknown["dropped"]["devices"] is None


# ---- a plan without importances ----


@pytest.mark.parametrize(
    ("scope", "wanted", "expected"),
    [
        ("attention", {"count": 2}, ["attention.3", "attention.2"]),
        ("attention", {"ratio": 0.5}, ["attention.3", "attention.2"]),
        ("mlp", {"count": 1}, ["mlp.3"]),
        ("mlp", {"ratio": 0.99}, ["mlp.3", "mlp.2", "mlp.1"]),
        ("block", {"count": 1}, ["attention.3", "mlp.3"]),
        ("block", {"ratio": 0.5}, ["attention.3", "mlp.3", "attention.2", "mlp.2"]),
    ],
    ids=str,
)
def test_deepest_sublayers_go_first_without_scores(llama, scope, wanted, expected):
    plan = deepest_sublayers(find_sublayers(llama), scope, **wanted)
    assert [sublayer.name for sublayer in plan] == expected
    assert (plan.scope, plan.metric, {drop.score for drop in plan.drops}) == (scope, None, {None})


@pytest.mark.parametrize(
    ("scope", "wanted", "message"),
    [
        ("joint", {"count": 2}, r"decided by importances, .* drop_plan\.json"),
        ("attention", {"count": 5}, "asked to drop 5, but there are only 4"),
        ("block", {"count": 5}, "asked to drop 5, but there are only 4"),
        ("mlp", {"count": 1, "ratio": 0.5}, "exactly one of count and ratio"),
        ("mlp", {}, "exactly one of count and ratio"),
        ("mlp", {"count": 0}, "at least 1"),
        ("attention", {"ratio": 0.2}, r"the smallest ratio that drops something is 0\.25"),
        ("cross_attention", {"count": 1}, "none of the 8"),
    ],
    ids=str,
)
def test_deepest_sublayers_refuses_invalid_requests(llama, scope, wanted, message):
    with pytest.raises(SelectionError, match=message):
        deepest_sublayers(find_sublayers(llama), scope, **wanted)


# ---- ceilings ----


def test_ceilings_of_a_known_name_are_the_published_ones():
    for name, expected in ACCELERATORS.items():
        for spelled in (name, name.upper()):
            assert ceilings_of(spelled, torch.device("cpu"), torch.bfloat16) is expected


@pytest.mark.parametrize(("name", "near"), [("a1000", "a100"), ("rtx-4090", "rtx4090"), ("thsi", "this")])
def test_ceilings_of_an_unknown_name_suggest_the_nearest(name, near):
    with pytest.raises(UnknownNameError, match=rf"Unknown device '{name}'. Did you mean '{near}'\? .*this") as caught:
        ceilings_of(name, torch.device("cpu"), torch.float32)
    assert set(caught.value.available) == {"this", *ACCELERATORS}


@pytest.fixture
def measured(monkeypatch):
    asked = []

    def measure(device, dtype):
        asked.append((device, dtype))
        return replace(MADE_UP, memory=None)

    monkeypatch.setattr("layershed.performance.prediction.measure_ceilings", measure)
    return asked


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs the memory size in /proc/meminfo")
def test_ceilings_of_this_machine_include_the_kernels_memory_size(measured):
    told = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    found = ceilings_of("this", torch.device("cpu"), torch.bfloat16)
    assert found == replace(MADE_UP, memory=1024 * int(told.split()[1]))
    assert measured == [(torch.device("cpu"), torch.bfloat16)]


def test_ceilings_of_a_gpu_include_its_own_memory(measured, monkeypatch):
    sizes = {0: 80, 1: 24}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=sizes[device.index])
    )
    assert ceilings_of("this", torch.device("cuda", 1), torch.float16).memory == 24
    assert measured == [(torch.device("cuda", 1), torch.float16)]


# ---- what is printed ----


def rows_of(table, width=140):
    """Cells of a printed table, separated by two blanks."""
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    lines = [line for line in console.export_text().splitlines() if line.strip() and "\u2500" not in line]
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]


def test_prediction_table_shows_the_prediction():
    side = predict(build_model(), plan_of(GONE), MADE_UP, SETTINGS)
    slow, fast = PredictedPhase(2.5, 100.0, "memory"), PredictedPhase(0.0125, 20_000.0, "compute")
    work = {"attention": Cost(2.5e9, 3e9), "mlp": Cost(1e9, 2.5e8), "rest": Cost(5e8, 1e6)}
    less = {"attention": Cost(1.25e9, 1.5e9), "mlp": Cost(1e9, 2.5e8), "rest": Cost(5e8, 1e6)}
    dense = replace(side.dense, parameters=13_015_864_320, weight_bytes=26_000_000_000, kv_bytes=52_000_000_000)
    dropped = replace(side.dense, parameters=10_918_000_000, weight_bytes=21_840_000_000, kv_bytes=26_000_000_000)
    shown = replace(
        side,
        dense=replace(dense, prefill=slow, decode=slow, work=work),
        dropped=replace(dropped, prefill=fast, decode=slow, work=less),
        dtype="bfloat16",
        batch_size=16,
        prompt_tokens=2048,
        new_tokens=1024,
        ceilings=replace(MADE_UP, name="a device", memory=32e9),
    )
    assert rows_of(prediction_table(shown, "llama")) == [
        ["llama: 2 attention, 1 mlp dropped"],
        ["predicted for a device", "dense", "dropped", "change"],
        ["parameters", "13.02 B", "10.92 B", "-16.1 %"],
        ["weights, bfloat16", "26.0 GB", "21.8 GB", "-16.0 %"],
        ["KV cache, 16 x 3,072 tokens", "52.0 GB", "26.0 GB", "-50.0 %"],
        ["devices of 32.0 GB to hold both", "3", "2"],
        ["prefill, 16 x 2,048 tokens", "2,500 ms, memory-bound", "12.5 ms, compute-bound", "x200.00"],
        ["tokens/s", "100", "20,000"],
        ["decoding step, 16 sequences", "2,500 ms, memory-bound", "2,500 ms, memory-bound", "x1.00"],
        ["tokens/s", "100", "100"],
        ["FLOPs per decoded token, attention", "2.5 G", "1.25 G", "-50.0 %"],
        ["bytes", "3.0 GB", "1.5 GB", "-50.0 %"],
        ["FLOPs per decoded token, mlp", "1 G", "1 G", "+0.0 %"],
        ["bytes", "250.0 MB", "250.0 MB", "+0.0 %"],
        ["FLOPs per decoded token, rest", "0.5 G", "0.5 G", "+0.0 %"],
        ["bytes", "1.0 MB", "1.0 MB", "+0.0 %"],
    ]
    assert [row for row in rows_of(prediction_table(replace(shown, batch_size=1), "x")) if "decoding" in row[0]] == [
        ["decoding step, 1 sequence", "2,500 ms, memory-bound", "2,500 ms, memory-bound", "x1.00"]
    ]
    unknown = replace(shown, ceilings=replace(MADE_UP, memory=None))
    assert not [row for row in rows_of(prediction_table(unknown, "x")) if "devices" in row[0]]


def test_prediction_notes_match_the_prediction():
    found = predict(build_model(), plan_of(GONE), accelerator("a100"), SETTINGS)
    notes = " ".join(prediction_notes(found, by_depth=True))
    assert "The prediction depends only on how many are dropped." in notes
    window = {"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "sliding_window": 16}
    mixed = predict(build_model("gemma3_text", **window), plan_of(GONE), accelerator("a100"), SETTINGS)
    assert "also depends on which are dropped" in " ".join(prediction_notes(mixed, by_depth=True))
    assert "312 TFLOP/s, 2,039 GB/s (NVIDIA A100 datasheet" in notes
    assert "The ceiling is for 16-bit products" in notes
    assert "one device with enough memory" not in notes, "one holds it"
    half = replace(found, dtype="bfloat16", dense=replace(found.dense, weight_bytes=100 * 10**9))
    notes = " ".join(prediction_notes(half, by_depth=False))
    assert "deepest" not in notes
    assert "16-bit" not in notes
    assert "one device with enough memory" in notes
    here = replace(found, ceilings=MADE_UP)
    assert "16-bit" not in " ".join(prediction_notes(here, by_depth=False)), "measured in float32 itself"


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_costs_depend_only_on_the_number_dropped(kind):
    """The note below the table of a plan by depth says so."""
    model = build_model()
    of_kind = [sublayer for sublayer in find_sublayers(model) if sublayer.kind == kind]
    one, other = (predict(model, plan_of(some), MADE_UP, SETTINGS).dropped for some in (of_kind[:2], of_kind[2:]))
    assert (one.parameters, one.weight_bytes, one.kv_bytes) == (other.parameters, other.weight_bytes, other.kv_bytes)
    assert one.work == other.work
    assert one.prefill.seconds == pytest.approx(other.prefill.seconds)
    assert one.decode.seconds == pytest.approx(other.decode.seconds)
