"""Export: the folder holds the trained model, for drops by a callback and by hand."""

import json

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from layershed import load_pretrained
from layershed.callbacks import (
    Export,
    LoRARecovery,
    Quantization,
    RedundancyMonitor,
    Report,
    SpeedMonitor,
    SublayerDrop,
)
from layershed.discovery.find import find_sublayers
from layershed.errors import ExportError
from layershed.recovery.distillation import Distillation
from layershed.saving.pretrained import load_plan, save_pretrained
from layershed.surgery import bypass, bypassed_sublayers, dropped_sublayers, restore
from tests.support.runs import (
    FILES,
    Foreign,
    HandRun,
    Interrupt,
    Interrupted,
    causal_lm,
    fit_foreign,
    same,
    state_of,
    unmarked,
    val_loader,
)
from tests.support.thinned import one_of


def logits_by_hand(net, dropped=(), **overrides):
    """Of a model with these weights whose dropped branches are multiplied by zero."""
    hand = HandRun(**overrides)
    hand.module.net.load_state_dict(unmarked(net.state_dict()))
    hand.drop(list(dropped))
    return logits(hand.module.net)


def logits(net):
    net.eval()
    with torch.no_grad():
        return torch.cat([net(input_ids=batch["input_ids"]).logits for batch in val_loader()])


class ByHand(pl.Callback):
    """Bypasses these sublayers after the second step."""

    def __init__(self, *indices):
        self.indices = indices

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 2:
            found = find_sublayers(pl_module)
            bypass(pl_module, [found[index] for index in self.indices])


def test_export_folder_holds_the_dropped_model_plan_and_tokenizer(make_trainer, tmp_path, text_data):
    drop = SublayerDrop(3, count=3)
    module = causal_lm()
    make_trainer(drop, Export(), csv=True, max_steps=6).fit(module, datamodule=text_data())
    folder = tmp_path / "run" / "pruned"
    keys = [(s.block, s.kind) for s in drop.plan]
    loaded = load_pretrained(folder)
    assert torch.equal(logits(loaded), logits_by_hand(module.model, keys, vocab_size=259, eos_token_id=1))
    assert load_plan(folder) == drop.plan
    scores = [entry["score"] for entry in json.loads((folder / "drop_plan.json").read_text())["drops"]]
    assert scores == sorted(scores)
    assert len(scores) == 3
    text = "two plus two é"
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == [byte + 3 for byte in text.encode()] + [1]
    # fewer weights in the folder, and all of them still in the module
    kept = sum(parameter.numel() for parameter in loaded.parameters())
    assert kept < sum(parameter.numel() for parameter in module.model.parameters())
    assert len(bypassed_sublayers(module)) == 3
    restore(module)
    assert torch.equal(logits(module.model), logits_by_hand(module.model, vocab_size=259, eos_token_id=1))


def test_export_without_a_drop_writes_an_ordinary_folder(make_trainer, tmp_path):
    module = fit_foreign(make_trainer(Export("saved"), max_steps=3))
    folder = tmp_path / "run" / "saved"
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits_by_hand(module.net))
    assert torch.equal(logits(load_pretrained(folder)), logits_by_hand(module.net))
    assert not (folder / "drop_plan.json").exists()
    assert not (folder / "tokenizer_config.json").exists()


def test_export_of_a_bypass_by_hand_has_a_plan_without_scores(make_trainer, tmp_path):
    target = tmp_path / "elsewhere"
    module = fit_foreign(make_trainer(ByHand(0, 3), Export(str(target)), max_steps=4))
    keys = [(0, "attention"), (1, "mlp")]
    loaded = load_pretrained(target)
    assert torch.equal(logits(loaded), logits_by_hand(module.net, keys))
    assert [(s.block, s.kind) for s in dropped_sublayers(loaded)] == keys
    assert [(entry.sublayer.name, entry.score) for entry in load_plan(target).drops] == [
        ("attention.0", None),
        ("mlp.1", None),
    ]


def test_export_includes_a_bypass_by_hand_beside_sublayer_drop(make_trainer, tmp_path):
    drop = SublayerDrop(3, "mlp", count=1, quality_batches=0)
    module = fit_foreign(make_trainer(ByHand(0), drop, Export(), max_steps=5))
    keys = [(0, "attention"), *((s.block, s.kind) for s in drop.plan)]
    assert torch.equal(logits(load_pretrained(tmp_path / "run" / "pruned")), logits_by_hand(module.net, keys))


def test_export_ignores_another_runs_plan_in_the_directory(make_trainer, tmp_path):
    """Without a logger every run has the same directory; the second export replaces the first."""
    fit_foreign(make_trainer(SublayerDrop(2, count=2, quality_batches=0), Export(), max_steps=3))
    assert (tmp_path / "run" / "drop_plan.json").exists()
    module = fit_foreign(make_trainer(Export(), max_steps=3))
    folder = tmp_path / "run" / "pruned"
    assert torch.equal(logits(load_pretrained(folder)), logits_by_hand(module.net))
    assert not (folder / "drop_plan.json").exists()


def test_export_takes_one_of_two_transformers_by_name(make_trainer, tmp_path):
    class Two(Foreign):
        def __init__(self):
            super().__init__()
            self.other = Foreign(num_hidden_layers=2).net.requires_grad_(False)

    drop = SublayerDrop(2, count=2, quality_batches=0, transformer="net")
    module = fit_foreign(make_trainer(drop, Export(transformer="net"), max_steps=3), Two())
    keys = [(s.block, s.kind) for s in drop.plan]
    assert torch.equal(logits(load_pretrained(tmp_path / "run" / "pruned")), logits_by_hand(module.net, keys))


def test_export_refuses_a_folder_with_other_files_before_training(make_trainer, tmp_path):
    class Never(pl.Callback):
        def on_train_batch_start(self, *_):
            raise AssertionError("a batch was trained")

    folder = tmp_path / "run" / "pruned"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("my only copy")
    with pytest.raises(ExportError, match="holds no saved model"):
        fit_foreign(make_trainer(Export(), Never(), max_steps=2))
    assert (folder / "thesis.txt").read_text() == "my only copy"


def test_export_combines_removed_and_newly_dropped_sublayers(make_trainer, tmp_path):
    """Fine-tuning a folder that layershed saved, and dropping more of it."""
    first = Foreign()
    found = find_sublayers(first)
    bypass(first, [found[0], found[3]])
    save_pretrained(first, tmp_path / "first")

    class Loaded(Foreign):
        def __init__(self):
            super().__init__()
            self.net = load_pretrained(tmp_path / "first").train()

    drop = SublayerDrop(2, count=2, quality_batches=2)
    module = fit_foreign(make_trainer(drop, Export(), max_steps=4), Loaded())
    folder = tmp_path / "run" / "pruned"
    now = [(s.block, s.kind) for s in drop.plan]
    before = [(0, "attention"), (1, "mlp")]
    assert not set(now) & set(before)
    loaded = load_pretrained(folder)
    assert sorted(before + now) == [(s.block, s.kind) for s in dropped_sublayers(loaded)]
    weights = {**first.net.state_dict(), **module.net.state_dict()}  # what is gone from one is zeroed anyway
    hand = HandRun()
    hand.module.net.load_state_dict(unmarked(weights))
    hand.drop(before + now)
    assert torch.equal(logits(loaded), logits(hand.module.net))
    entries = load_plan(folder).drops
    assert [(e.sublayer.block, e.sublayer.kind) for e in entries] == before + now
    assert [e.step for e in entries] == [None, None, 2, 2]


@pytest.mark.parametrize("model_type", ["gpt2"])
def test_export_of_another_architecture_is_exact(make_trainer, tmp_path, model_type):
    class Other(Foreign):
        def __init__(self):
            super().__init__(model_type=model_type)

    drop = SublayerDrop(2, count=2, quality_batches=0)
    module = fit_foreign(make_trainer(drop, Export(), max_steps=4), Other())
    assert len(drop.plan) == 2
    assert torch.equal(logits(load_pretrained(tmp_path / "run" / "pruned")), logits(module.net))


def whole_recipe(quantized):
    """Drop in two rounds, quantize at the first one, recover by LoRA on top, and every watcher beside."""
    return [
        RedundancyMonitor(2),
        SublayerDrop(3, count=2, every_n_steps=2, rounds=2, calibration_batches=2, quality_batches=2),
        *([Quantization()] if quantized == "before" else []),
        LoRARecovery(rank=4, finish="adapter" if quantized == "before" else "merge", warmup_steps=2),
        *([Quantization(start="end")] if quantized == "end" else []),
        SpeedMonitor(prompt_tokens=6, new_tokens=2, runs=1),
        Export(),
        Report(every_n_steps=2),
    ]


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.parametrize(("quantized", "cuts"), one_of([("before", (4,)), ("before", (7,)), ("end", (4, 7))]))
def test_export_after_drop_quantization_lora_and_distillation_equals_training(
    make_trainer, tmp_path, text_data, unpainted, quantized, cuts
):
    """Killed between the rounds, with adapters in and the teacher on, and after both."""

    def run(name, *callbacks, ckpt_path=None):
        own = whole_recipe(quantized)
        last = ModelCheckpoint(tmp_path / f"{name}-ckpt", save_last=True, every_n_train_steps=1)
        trainer = make_trainer(*own, last, *callbacks, name=name, csv=True, enable_checkpointing=True, max_steps=9)
        module = causal_lm(distillation=Distillation(kind="both", temperature=2.0))
        trainer.fit(module, datamodule=text_data(), ckpt_path=ckpt_path)
        return trainer, module, own[1]

    trainer, module, drop = run("whole")
    folder = tmp_path / "whole"
    assert {path.name for path in folder.iterdir()} >= FILES
    plan = json.loads((folder / "drop_plan.json").read_text())
    assert plan == drop.plan.to_dict()
    assert [entry["step"] for entry in plan["drops"]] == [3, 3, 5, 5]
    assert dropped_sublayers(module) == tuple(sorted(drop.plan))
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    # the drop, the rounding and the adapters part the student from its teacher
    assert metrics["train_divergence"] > 0
    assert metrics["train_loss"] == pytest.approx(
        (metrics["train_lm_loss"] + metrics["train_divergence"]) / 2, rel=1e-5
    )
    assert {"recovery/trainable_parameters", "quantization/bytes", "drop/loss_end"} <= metrics.keys()

    state, importance = state_of(trainer, module), (folder / "importance.csv").read_text()
    for cut in cuts:
        with pytest.raises(Interrupted):
            run(f"killed-{cut}", Interrupt(cut))
        again, resumed, own = run(f"resumed-{cut}", ckpt_path=tmp_path / f"killed-{cut}-ckpt" / "last.ckpt")
        assert same(state_of(again, resumed), state)
        assert (own.plan, own.quality) == (drop.plan, drop.quality)
        assert (tmp_path / f"resumed-{cut}" / "importance.csv").read_text() == importance

    loaded = load_pretrained(folder / "pruned")
    assert dropped_sublayers(loaded) == dropped_sublayers(module)
    assert (folder / "pruned" / "adapter").is_dir() == (quantized == "before")
    module.eval()
    batch = next(iter(text_data_batches(text_data)))
    with torch.no_grad():
        found, wanted = (net(input_ids=batch["input_ids"]).logits for net in (loaded, module.model))
    assert torch.equal(found, wanted)


def text_data_batches(text_data):
    data = text_data()
    data.setup()
    return data.val_dataloader()
