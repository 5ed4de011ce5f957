"""All callbacks in one run: in any order, resumed, and on two ranks."""

import json
import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

import layershed.reporting.html_report
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
from layershed.recovery.distillation import Distillation
from layershed.surgery import bypassed_sublayers, dropped_sublayers
from tests.support.runs import (
    BATCH,
    Foreign,
    HandRun,
    Interrupt,
    Interrupted,
    Save,
    causal_lm,
    fit_foreign,
    ranked,
    same,
    sequences,
    state_of,
    val_loader,
)
from tests.support.two_ranks import run_two_ranks

FILES = {"importance.csv", "drop_plan.json", "speed.json", "pruned", "report.html"}


def every_callback():
    return [
        RedundancyMonitor(2),
        SublayerDrop(3, count=2, every_n_steps=2, rounds=2, calibration_batches=2, quality_batches=2),
        SpeedMonitor(prompt_tokens=6, new_tokens=2, runs=1),
        Export(),
        Report(every_n_steps=2),
    ]


def test_any_order_of_listing_gives_the_same_run(make_trainer, tmp_path, unpainted):
    runs = []
    # Export alone has its place, behind what changes the model
    for number, order in enumerate([(0, 1, 2, 3, 4), (4, 2, 1, 3, 0), (2, 4, 1, 0, 3)]):
        callbacks = every_callback()
        drop = callbacks[1]
        trainer = make_trainer(*(callbacks[index] for index in order), name=str(number), max_steps=8)
        module = fit_foreign(trainer, attention_dropout=0.2)
        folder = tmp_path / str(number)
        assert {path.name for path in folder.iterdir()} >= FILES
        pruned = load_pretrained(folder / "pruned")
        module.eval()
        batch = next(iter(val_loader()))
        with torch.no_grad():
            assert torch.equal(pruned(input_ids=batch["input_ids"]).logits, module.predict_step(batch, 0))
        importance = (folder / "importance.csv").read_text().splitlines()
        # steps 3 and 5 drop, and are not measured: the rows do not depend on who comes first
        assert {line.split(",")[0] for line in importance[1:]} == {"2", "4", "6", "8"}
        runs.append((state_of(trainer, module), drop.plan, drop.quality, importance))
        assert len(drop.plan) == 4
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])


def test_the_step_of_a_drop_is_measured_before_or_after_it(make_trainer, tmp_path):
    """By the order of listing: in both cases over the training batch alone, not over what the drop reads."""

    def run(name, *callbacks):
        fit_foreign(make_trainer(*callbacks, name=name, max_steps=5))
        lines = (tmp_path / name / "importance.csv").read_text().splitlines()[1:]
        return {tuple(line.split(",")[:3]): line for line in lines}

    def drop():
        return SublayerDrop(4, count=2, calibrate_on="val", quality_batches=2)

    plain = run("plain", RedundancyMonitor(4))
    before = run("before", RedundancyMonitor(4), drop())
    after = run("after", drop(), RedundancyMonitor(4))
    assert before == plain
    assert len(plain) == 12
    assert len(after) in (9, 10)
    assert after.items() < plain.items()


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_a_resumed_run_ends_like_the_uninterrupted_one(make_trainer, tmp_path, text_data, unpainted):
    """Killed between the two rounds, in mid-epoch and between two measurements."""

    def run(name, *callbacks, ckpt_path=None):
        own = every_callback()
        last = ModelCheckpoint(tmp_path / f"{name}-ckpt", save_last=True, every_n_train_steps=1)
        trainer = make_trainer(*own, last, *callbacks, name=name, csv=True, enable_checkpointing=True, max_steps=10)
        module = causal_lm()
        trainer.fit(module, datamodule=text_data(), ckpt_path=ckpt_path)
        metrics = {name for name in trainer.callback_metrics if not name.startswith("val_")}
        importance = (tmp_path / name / "importance.csv").read_text()
        return state_of(trainer, module), own[1].plan, own[1].quality, importance, metrics

    whole = run("whole")
    with pytest.raises(Interrupted):
        run("killed", Interrupt(4))
    resumed = run("resumed", ckpt_path=tmp_path / "killed-ckpt" / "last.ckpt")
    assert [same(*pair) for pair in zip(resumed, whole, strict=True)] == [True] * 5
    assert {path.name for path in (tmp_path / "resumed").iterdir()} >= FILES
    assert {"speed/decode_speedup", "importance/attention_mean", "drop/loss_end"} <= whole[4]


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
@pytest.mark.parametrize("quantized", ["before", "end"])
def test_drop_quantization_lora_and_distillation_together_export_what_was_trained_and_resume(
    make_trainer, tmp_path, text_data, unpainted, quantized
):
    """Killed between the rounds, with adapters in and the teacher on, and behind both."""

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
    for cut in (4, 7):
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


# Two ranks. Everything below runs in two processes of its own, and a reference in this one.

STEPS, START, WINDOW = 7, 4, 3


class Losses(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(outputs["loss"].item())


RUNS = {"running": ("whole", "resumed"), "train": ("whole",)}


def two_ranks(folder, calibrate_on):
    """One rank's run, and one resumed from within the window of calibration; saves what there is to compare."""
    torch.set_num_threads(1)
    layershed.reporting.html_report._image = lambda _figure: layershed.reporting.html_report._Image("", 1, 1)
    results = {}
    for name in RUNS[calibrate_on]:
        drop = SublayerDrop(START, count=3, calibrate_on=calibrate_on, calibration_batches=WINDOW, quality_batches=2)
        losses = Losses()
        callbacks = [RedundancyMonitor(2), drop, losses, Save(folder / "cut.ckpt", START - 1)]
        if (calibrate_on, name) == ("running", "whole"):
            callbacks += [SpeedMonitor(prompt_tokens=6, new_tokens=2, runs=1), Export(), Report(every_n_steps=2)]
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            logger=False,
            default_root_dir=folder / name,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            num_sanity_val_steps=0,
            max_steps=STEPS,
            callbacks=callbacks,
        )
        module = Foreign()
        # as many as the steps need, every second one for each rank
        items = sequences(2 * BATCH * STEPS)
        share = DistributedSampler(items, num_replicas=2, rank=int(os.environ["RANK"]), shuffle=False)
        trainer.fit(
            module,
            StatefulDataLoader(items, batch_size=BATCH, sampler=share),
            val_loader(4),
            ckpt_path=folder / "cut.ckpt" if name == "resumed" else None,
        )
        results[name] = {
            "state": state_of(trainer, module),
            "plan": drop.plan.to_dict(),
            "quality": {when: (q.loss, q.accuracy) for when, q in drop.quality.items()},
            "bypassed": [(s.block, s.kind) for s in bypassed_sublayers(module)],
            "losses": losses.seen,
        }
    torch.save(results, folder / f"{calibrate_on}-{trainer.global_rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks saved, and the folder of their files."""
    folder = tmp_path_factory.mktemp("ranks")
    run_two_ranks("tests.callbacks.test_together", folder)
    found = {how: [torch.load(folder / how / f"{how}-{rank}.pt", weights_only=True) for rank in (0, 1)] for how in RUNS}
    return folder, found


@pytest.mark.parametrize("calibrate_on", ["running", "train"])
def test_both_ranks_drop_the_same_and_hold_the_same_weights(ranks, calibrate_on):
    _, found = ranks
    first, second = (result["whole"] for result in found[calibrate_on])
    assert same(first["state"], second["state"])
    assert first["plan"] == second["plan"]
    assert first["bypassed"] == second["bypassed"]
    assert first["quality"] == second["quality"]
    assert first["losses"] != second["losses"]  # they did see different data


@pytest.mark.parametrize("calibrate_on", ["running", "train"])
def test_two_ranks_are_one_run_over_the_batches_of_both(ranks, calibrate_on):
    """By hand in one process: each step averages the gradients of both ranks' batches."""
    _, found = ranks
    items = sequences(2 * BATCH * STEPS)
    batches = [
        next(iter(torch.utils.data.DataLoader(items[rank::2][BATCH * step : BATCH * (step + 1)], batch_size=BATCH)))
        for step in range(STEPS)
        for rank in (0, 1)
    ]
    hand = HandRun(accumulate=2)
    quality = {}
    for step in hand.train(batches):
        if step == START - WINDOW:
            hand.seen()
        if step == START:
            running = hand.seen()
            scores = running if calibrate_on == "running" else hand.importances(batches[: 2 * WINDOW])
            quality["before"] = hand.quality(val_loader(4))
            hand.drop(ranked(scores, "joint", 3))
            quality["after"] = hand.quality(val_loader(4))
    quality["end"] = hand.quality(val_loader(4))
    result = found[calibrate_on][0]["whole"]
    drops = result["plan"]["drops"]
    assert [(entry["block"], entry["kind"]) for entry in drops] == hand.dropped
    assert [entry["score"] for entry in drops] == pytest.approx([scores[key] for key in hand.dropped], rel=1e-4)
    for when, (loss, accuracy) in quality.items():
        assert result["quality"][when] == (pytest.approx(loss, rel=1e-4), pytest.approx(accuracy, abs=1e-6))
    for name, weight in hand.module.state_dict().items():
        torch.testing.assert_close(result["state"]["weights"][name], weight, rtol=1e-4, atol=1e-5)


def test_resumed_ranks_equal_uninterrupted_ones(ranks):
    """Cut within the window: every rank goes on with its own sums."""
    folder, found = ranks
    for result in found["running"]:
        whole, resumed = result["whole"], result["resumed"]
        assert resumed["losses"] == whole["losses"][START - 1 :]
        assert same({**resumed, "losses": 0}, {**whole, "losses": 0})
    written = [(folder / "running" / name / "importance.csv").read_text() for name in ("whole", "resumed")]
    assert written[0] == written[1]
    assert len(written[0].splitlines()) > 1 + 2 * 12


def test_two_ranks_write_every_file_once_and_whole(ranks):
    folder, found = ranks
    assert {path.name for path in (folder / "running" / "whole").iterdir()} == FILES
    assert len(dropped_sublayers(load_pretrained(folder / "running" / "whole" / "pruned"))) == 3
    plan = json.loads((folder / "running" / "whole" / "drop_plan.json").read_text())
    assert plan == found["running"][0]["whole"]["plan"]


if __name__ == "__main__":
    for how in RUNS:
        (Path(sys.argv[1]) / how).mkdir(exist_ok=True)
        two_ranks(Path(sys.argv[1]) / how, how)
