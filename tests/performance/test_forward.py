"""Speed of a forward pass, on a clock that only the model moves."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, set_seed

import layershed as ls
import layershed.discovery.registry as registry
from layershed.errors import MeasurementError
from layershed.performance.forward import counted_in, forward_inputs, measure_forward
from layershed.surgery import bypass, bypassed_sublayers
from tests.support.hand_written import GPT
from tests.support.seq2seq import seq2seq

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}


def bert(**overrides):
    set_seed(0)
    return AutoModel.from_config(AutoConfig.for_model("bert", vocab_size=97, **{**SIZES, **overrides}))


def vit():
    set_seed(0)
    config = AutoConfig.for_model("vit", **SIZES, image_size=8, patch_size=4)
    return AutoModelForImageClassification.from_config(config)


def speech():
    set_seed(0)
    config = AutoConfig.for_model(
        "wav2vec2", vocab_size=32, **SIZES, conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2),
        num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return AutoModel.from_config(config)


@pytest.fixture
def gpt(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", {})
    ls.register_adapter(GPT, ls.SublayerAdapter(lambda model: {"idx": torch.arange(4)[None]}))
    set_seed(0)
    return GPT()


class Costly:
    """Moves a clock by 10 for a pass, and by 2 for each attention that runs."""

    def __init__(self, model):
        self.now, self.sides = 0.0, []
        self.model = model
        model.register_forward_pre_hook(self.begin)
        for sublayer in ls.find_sublayers(model):
            if sublayer.kind == "attention":
                inner = [
                    module for module in model.get_submodule(sublayer.path).modules() if not list(module.children())
                ]
                inner[0].register_forward_pre_hook(self.attend)

    def begin(self, *_):
        self.now += 10.0
        self.sides.append("dropped" if bypassed_sublayers(self.model) else "dense")

    def attend(self, *_):
        self.now += 2.0

    def clock(self):
        return self.now


def test_speeds_are_units_over_the_median_seconds_dense_and_dropped_in_turns():
    model = bert()
    costly = Costly(model)
    bypass(model, [s for s in ls.find_sublayers(model) if s.kind == "attention"][:2])
    costly.sides.clear()
    report = measure_forward(model, tokens=7, batch_size=3, runs=6, warmup=1, clock=costly.clock)
    assert costly.sides[:14] == ["dense", "dropped"] * 7
    assert report.forward.dense == pytest.approx(3 * 7 / 16)
    assert report.forward.dropped == pytest.approx(3 * 7 / 12)
    assert report.forward.speedup.median == pytest.approx(16 / 12)
    assert (report.forward.unit, report.units, report.runs) == ("tokens", 21, 6)
    assert report.forward_ms == pytest.approx((16e3, 12e3))
    assert report.forward.measurable


def test_sizes_count_what_runs():
    model = bert()
    whole = sum(parameter.numel() for parameter in model.parameters())
    first = ls.find_sublayers(model)[0]
    bypass(model, [first])
    report = measure_forward(model, runs=1)
    kept = measure_forward(model, runs=1)
    layer = model.encoder.layer[0].attention
    assert report.parameters_dense == whole
    assert whole - report.parameters_dropped == sum(parameter.numel() for parameter in layer.parameters())
    assert report.file_bytes_dropped < report.file_bytes_dense
    assert (report.peak_memory_dense, report.peak_memory_dropped) == (kept.peak_memory_dense, kept.peak_memory_dropped)
    assert report.peak_memory_dense > report.file_bytes_dense


@pytest.mark.parametrize(
    ("make", "unit", "units"),
    [(bert, "tokens", 2 * 16), (vit, "images", 2), (speech, "sequences", 2), (seq2seq, "tokens", 2 * 16)],
    ids=["bert", "vit", "wav2vec2", "bart"],
)
def test_unit_says_what_is_counted(make, unit, units):
    model = make()
    before = torch.get_rng_state()
    bypass(model, ls.find_sublayers(model)[:1])
    report = measure_forward(model, tokens=16, batch_size=2, runs=1)
    assert (report.forward.unit, report.units) == (unit, units)
    assert f"{unit}/s" in str(report)
    assert torch.equal(torch.get_rng_state(), before)
    assert ls.ForwardReport.from_dict(report.to_dict()) == report


def test_encoder_decoder_has_a_phase_for_its_encoder():
    """Dropping in the decoder makes the whole pass faster, and not the encoder."""
    model = seq2seq()
    costly = Costly(model)
    model.model.encoder.register_forward_pre_hook(costly.begin)
    decoders = [s for s in ls.find_sublayers(model) if s.kind == "attention" and "decoder" in s.path]
    bypass(model, decoders)
    report = measure_forward(model, tokens=6, runs=6, clock=costly.clock)
    assert list(report.phases) == ["forward", "encoder"]
    assert report.phases["encoder"].speedup.median == 1.0
    assert report.phases["encoder"].dense == pytest.approx(6 / (10 + 2 * 3))
    assert report.forward.speedup.median == pytest.approx((20 + 2 * 6) / (20 + 2 * 3))


def test_hand_written_model_gets_the_inputs_of_its_adapter_as_often_as_asked(gpt):
    bypass(gpt, ls.find_sublayers(gpt)[:1])
    report = measure_forward(gpt, batch_size=3, runs=1)
    assert (report.forward.unit, report.units) == ("tokens", 3 * 4)
    given = measure_forward(gpt, inputs={"idx": torch.zeros(2, 8, dtype=torch.long)}, runs=1)
    assert given.units == 16


@pytest.mark.parametrize(("name", "places"), [("bert", 10), ("roberta", 12)])
def test_tokens_fit_into_the_models_positions(name, places):
    set_seed(0)
    config = AutoConfig.for_model(name, vocab_size=97, **SIZES, max_position_embeddings=places)
    model = AutoModel.from_config(config).eval()
    inputs = forward_inputs(model, 128, 2)
    model(**inputs)
    assert counted_in(inputs)[1] <= 2 * places


def test_unmeasurable_calls_are_refused(gpt):
    with pytest.raises(MeasurementError, match="nothing is bypassed"):
        measure_forward(gpt)
    bypass(gpt, ls.find_sublayers(gpt)[:1])
    with pytest.raises(MeasurementError, match="runs=0"):
        measure_forward(gpt, runs=0)
    with pytest.raises(MeasurementError, match=r"Compile in place"):
        measure_forward(nn.Sequential(torch.compile(gpt, backend="eager")))
