"""The callbacks' defaults in runs of models that are no causal language models, and of unusual ones that are."""

import csv

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import AutoConfig, AutoModelForImageClassification, set_seed

import layershed as ls
import layershed.discovery.registry as registry
import layershed.performance.stopwatch as stopwatch
from layershed.callbacks import ExactResume, Export, LoRARecovery, RedundancyMonitor, Report, SpeedMonitor, SublayerDrop
from layershed.errors import MeasurementError, SelectionError
from layershed.formatting import short_bytes
from layershed.performance.forward import ForwardReport
from layershed.performance.speed import SpeedReport
from tests.support.hand_written import GPT
from tests.support.models import build_model
from tests.support.runs import Foreign, Save, fit_foreign, same, state_of
from tests.support.seq2seq import batch as pairs
from tests.support.seq2seq import by_hand, seq2seq

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}


class Any(pl.LightningModule):
    """A module around any model.

    Args:
        net: The model.
        loss: Of the model and a batch.
    """

    def __init__(self, net, loss):
        super().__init__()
        self.net, self._loss = net, loss

    def training_step(self, batch, batch_idx):
        return self._loss(self.net, batch)

    def validation_step(self, batch, batch_idx):
        return self._loss(self.net, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def images():
    set_seed(0)
    config = AutoConfig.for_model("vit", **SIZES, image_size=8, patch_size=4, num_labels=2)
    model = AutoModelForImageClassification.from_config(config)
    data = DataLoader([(torch.randn(3, 8, 8), number % 2) for number in range(12)], batch_size=2)
    return Any(model, lambda net, batch: net(pixel_values=batch[0], labels=batch[1]).loss), data


def translation(run=lambda net, batch: net(**batch).logits):
    batches = [{**pairs(seed), "labels": pairs(seed)["decoder_input_ids"]} for seed in range(6)]

    def loss(net, batch):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return nn.functional.cross_entropy(run(net, inputs).flatten(0, 1), batch["labels"].flatten())

    return Any(seq2seq().train(), loss), DataLoader(batches, batch_size=None)


def translation_by_hand():
    return translation(lambda net, batch: net.lm_head(by_hand(net, batch)) + net.final_logits_bias)


@pytest.fixture
def adapter(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", {})
    ls.register_adapter(GPT, ls.SublayerAdapter(lambda model: {"idx": torch.arange(4)[None]}))


def hand_written():
    set_seed(0)
    rows = DataLoader([torch.randint(11, (8,)) for _ in range(12)], batch_size=2)

    def loss(net, batch):
        return nn.functional.cross_entropy(net(batch)[0][:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    return Any(GPT(layers=4), loss), rows


MODELS = {
    "vit": (images, "images", {"forward"}),
    "bart": (translation, "tokens", {"forward", "encoder"}),
    "bart by hand": (translation_by_hand, "tokens", {"forward", "encoder"}),
    "hand-written": (hand_written, "tokens", {"forward"}),
}


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("name", MODELS)
def test_defaults_measure_quality_speed_and_sdr_of_any_model(make_trainer, tmp_path, adapter, unpainted, name):
    make, unit, phases = MODELS[name]
    module, data = make()
    drop, speed = SublayerDrop(3, count=2), SpeedMonitor(runs=1)
    ours = [RedundancyMonitor(2), drop, LoRARecovery(), speed, Export(), Report(every_n_steps=1)]
    trainer = make_trainer(*ours, max_steps=5, csv=True)
    trainer.fit(module, data, data)
    assert len(ls.dropped_sublayers(module)) == 2
    metrics = trainer.callback_metrics
    assert {"drop/loss_before", "drop/loss_after", "drop/loss_end", "speed/sdr"} <= metrics.keys()
    assert {name.split("/")[1].removesuffix("_speedup") for name in metrics if name.endswith("_speedup")} == phases
    assert isinstance(speed.report, ForwardReport)
    assert speed.report.forward.unit == unit
    assert f"speed/forward_{unit}_per_s" in metrics
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f"Median {unit} per second" in page
    assert "undefined (1 pair; an interval needs 6)" in page
    assert "rank 8, alpha 16, from step 3, merged at the end" in page
    size = sum(path.stat().st_size for path in (tmp_path / "run" / "pruned").glob("*.safetensors"))
    assert f"pruned, {short_bytes(size)} of weights" in page
    other = SpeedMonitor()
    other.load_state_dict(speed.state_dict())
    assert other.report == speed.report


def test_sdr_of_any_model_is_hundredths_of_loss_per_percent_of_forward_speed(make_trainer, monkeypatch):
    """With seven runs on a made-up clock, which gains a quarter."""
    module, data = images()
    seconds = iter(range(10**6))
    monkeypatch.setattr("layershed.performance.forward.clock_for", lambda _device: Uneven(seconds))
    trainer = make_trainer(SublayerDrop(3, count=2), SpeedMonitor(runs=7), max_steps=4)
    trainer.fit(module, data, data)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert metrics["speed/forward_speedup"] == pytest.approx(1.25)
    lost = metrics["drop/loss_after"] - metrics["drop/loss_before"]
    assert metrics["speed/sdr"] == pytest.approx(100 * lost / 25, rel=1e-4)


def test_calibration_in_a_pass_reads_pictures(make_trainer):
    module, data = images()
    data = DataLoader([{"pixel_values": pixels, "labels": label} for pixels, label in data.dataset], batch_size=2)
    module._loss = lambda net, batch: net(**batch).loss
    for split in ("train", "val"):
        drop = SublayerDrop(2 if split == "train" else 4, count=1, calibrate_on=split)
        make_trainer(drop, max_steps=5, name=split).fit(module, data, data)
        assert len(drop.plan) == 1


class Uneven:
    """A clock whose first measurement of each pair takes five seconds, and whose second takes four."""

    def __init__(self, numbers):
        self.numbers = numbers

    def mark(self):
        return None

    def seconds(self, start, end):
        return 4.0 if next(self.numbers) % 2 else 5.0


def test_sdr_of_a_metric_that_sublayer_drop_measures_comes_with_the_measurement(make_trainer, monkeypatch):
    class Graded(Any):
        def validation_step(self, batch, batch_idx):
            loss = super().validation_step(batch, batch_idx)
            self.log("val_score", -loss)
            return loss

    module, data = images()
    module.__class__ = Graded
    seconds = iter(range(10**6))
    monkeypatch.setattr("layershed.performance.forward.clock_for", lambda _device: Uneven(seconds))
    speed = SpeedMonitor(runs=7, quality="val_score", quality_mode="max")
    trainer = make_trainer(SublayerDrop(3, count=2, quality="val_score"), speed, max_steps=4)
    trainer.fit(module, data, data)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    lost = metrics["drop/val_score_before"] - metrics["drop/val_score_after"]
    assert lost == pytest.approx(metrics["drop/loss_after"] - metrics["drop/loss_before"], rel=1e-4)
    assert metrics["speed/sdr"] == pytest.approx(100 * lost / 25, rel=1e-4)


@pytest.mark.default_cases(1)
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("at", [4, 7])
def test_resumed_run_of_a_hand_written_model_equals_the_uninterrupted_one(make_trainer, tmp_path, adapter, at):
    """With a drop, a quality of its own and LoRA, cut before and after them."""

    def run(name, *more, ckpt_path=None):
        module, data = hand_written()
        data = StatefulDataLoader(data.dataset, batch_size=2)
        ours = [ExactResume(), SublayerDrop(5, count=2), LoRARecovery(finish="adapter"), *more]
        trainer = make_trainer(*ours, name=name, max_steps=9)
        torch.manual_seed(5)
        trainer.fit(module, data, data, ckpt_path=ckpt_path)
        return state_of(trainer, module), ours[1].quality

    whole = run("whole", Save(tmp_path / "cut.ckpt", at))
    resumed = run("resumed", ckpt_path=tmp_path / "cut.ckpt")
    assert same(whole[0], resumed[0])
    assert whole[1] == resumed[1]
    assert len(whole[1]) == 3
    assert any("lora_A" in name for name in whole[0]["weights"])
    loaded = hand_written()[0]
    ls.load_checkpoint(loaded, tmp_path / "cut.ckpt")
    assert len(ls.dropped_sublayers(loaded)) == (2 if at > 5 else 0)


def importances(folder):
    with open(folder / "importance.csv", encoding="utf-8", newline="") as file:
        return {(row["step"], row["kind"], row["block"]): float(row["value"]) for row in csv.DictReader(file)}


def test_encoder_and_decoder_by_hand_are_watched_and_dropped_as_the_whole_model(make_trainer, tmp_path):
    plans = {}
    for name, make in (("whole", translation), ("by_hand", translation_by_hand)):
        module, data = make()
        drop = SublayerDrop(4, count=3)
        make_trainer(RedundancyMonitor(1), drop, max_steps=6, name=name).fit(module, data, data)
        plans[name] = drop.plan, drop.quality["after"].values["loss"], importances(tmp_path / name)
    (plan, loss, watched), (other, other_loss, other_watched) = plans["whole"], plans["by_hand"]
    assert tuple(other) == tuple(plan)
    assert other_loss == pytest.approx(loss, rel=1e-4)
    assert other_watched == pytest.approx(watched, rel=1e-3, abs=1e-6)
    assert len(watched) > 6 * 6


def test_body_and_head_called_by_hand_are_watched_and_dropped_as_the_whole_model(make_trainer, tmp_path):
    class ByHand(Foreign):
        def loss(self, batch):
            states = self.net.model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
            logits = self.net.lm_head(states)
            return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    plans = {}
    for name, kind in (("whole", Foreign), ("by_hand", ByHand)):
        drop = SublayerDrop(4, count=3)
        module = fit_foreign(make_trainer(RedundancyMonitor(1), drop, max_steps=6, name=name), kind())
        plans[name] = tuple(drop.plan), drop.quality, importances(tmp_path / name), ls.dropped_sublayers(module)
    assert plans["by_hand"] == plans["whole"]


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    ("name", "lengths", "words"),
    [
        ("hand-written", {"prompt_tokens": 64}, "prompt_tokens=64 has no effect: .* over 12 tokens"),
        (
            "vit",
            {"prompt_tokens": 16, "new_tokens": 7},
            "prompt_tokens=16 and new_tokens=7 have no effect: .* 3 images",
        ),
        ("bart", {"prompt_tokens": 9}, None),
    ],
)
def test_length_without_effect_gives_one_warning(make_trainer, adapter, name, lengths, words):
    module, data = MODELS[name][0]()
    speed = SpeedMonitor(**lengths, batch_size=3, runs=1)
    if words is None:
        make_trainer(SublayerDrop(2, count=1), speed, max_steps=3).fit(module, data, data)
        assert speed.report.units == 27
        return
    trainer = make_trainer(SublayerDrop(2, count=1), speed, max_steps=3)
    with pytest.warns(UserWarning, match=words) as caught:
        trainer.fit(module, data, data)
    assert len([each for each in caught if "SpeedMonitor" in str(each.message)]) == 1
    assert trainer.callback_metrics[f"speed/forward_{speed.report.forward.unit}"] == speed.report.units


@pytest.mark.slow
def test_default_lengths_fit_into_a_short_causal_model(make_trainer):
    speed = SpeedMonitor(runs=1)
    fit_foreign(make_trainer(SublayerDrop(2, count=1), speed, max_steps=3), max_position_embeddings=40)
    assert isinstance(speed.report, SpeedReport)
    assert speed.report.prompt_tokens + speed.report.new_tokens <= 40
    assert min(speed.report.prompt_tokens, speed.report.new_tokens) > 0
    with pytest.raises(MeasurementError, match="do not fit into the model's 40 positions"):
        fit_foreign(make_trainer(SpeedMonitor(prompt_tokens=30, new_tokens=20)), max_position_embeddings=40)


def test_causal_model_that_cannot_decode_is_measured_by_its_forward_pass_with_one_warning(make_trainer, monkeypatch):
    def refuse(_transformer):
        raise MeasurementError("speed: it could not decode.")

    monkeypatch.setattr(stopwatch, "_try_out", refuse)
    speed = SpeedMonitor(runs=1)
    trainer = make_trainer(SublayerDrop(2, count=1), speed, max_steps=3)
    with pytest.warns(UserWarning, match="SpeedMonitor: It measures the forward pass instead of decoding") as caught:
        fit_foreign(trainer)
    assert len([each for each in caught if "SpeedMonitor" in str(each.message)]) == 1
    assert isinstance(speed.report, ForwardReport)
    assert trainer.global_step == 3


class Inlined(nn.Module):
    """A block whose attention is computed in its own forward."""

    def __init__(self, width=16):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.ln_1(x)).chunk(3, dim=-1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.ln_2(x))


def test_empty_scope_quotes_what_is_left_alone(make_trainer, adapter):
    module, data = hand_written()
    module.net.h = nn.ModuleList(Inlined() for _ in range(3))
    module.net.more = nn.ModuleList()
    with pytest.raises(SelectionError, match=r"Left alone: h\.0\.out \(it is not computed by modules of its own\)"):
        make_trainer(SublayerDrop(2, "attention", count=1), max_steps=3).fit(module, data, data)
    with pytest.raises(SelectionError, match=r"Left alone: h\.0\.out .*ls\.find_left_alone"):
        ls.drop_sublayers(module.net, data, "attention", count=1)
    trainer = make_trainer(SublayerDrop(2, "mlp", count=1, quality_batches=0), max_steps=3)
    trainer.fit(module, data, data)
    assert len(ls.dropped_sublayers(module)) == 1


def test_scope_error_of_a_model_with_all_its_sublayers_quotes_nothing(make_trainer):
    model = build_model()
    with pytest.raises(SelectionError) as caught:
        ls.drop_sublayers(model, [], "cross_attention", count=1)
    assert "Left alone" not in str(caught.value)
