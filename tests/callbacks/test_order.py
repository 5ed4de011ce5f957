"""All callbacks in one run: in any order, resumed, and on two ranks."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from layershed import load_pretrained
from layershed.callbacks import (
    Export,
    RedundancyMonitor,
    Report,
    SpeedMonitor,
    SublayerDrop,
)
from tests.support.runs import (
    FILES,
    Interrupt,
    Interrupted,
    causal_lm,
    fit_foreign,
    same,
    state_of,
    val_loader,
)
from tests.support.thinned import one_of


def every_callback():
    return [
        RedundancyMonitor(2),
        SublayerDrop(3, count=2, every_n_steps=2, rounds=2, calibration_batches=2, quality_batches=2),
        SpeedMonitor(prompt_tokens=6, new_tokens=2, runs=1),
        Export(),
        Report(every_n_steps=2),
    ]


@pytest.mark.parametrize(
    "orders", one_of([[(0, 1, 2, 3, 4), (4, 2, 1, 3, 0)], [(0, 1, 2, 3, 4), (4, 2, 1, 3, 0), (2, 4, 1, 0, 3)]])
)
def test_order_of_callbacks_does_not_change_the_run(make_trainer, tmp_path, unpainted, orders):
    runs = []
    # Export alone has its place, after what changes the model
    for number, order in enumerate(orders):
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
    assert all(same(runs[0], run) for run in runs[1:])


def test_monitor_order_decides_if_a_drop_step_is_measured_before_or_after(make_trainer, tmp_path):
    """Set by the order of listing. Only the training batch counts, not the batches that the drop reads."""

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
def test_all_callbacks_together_resumed_equal_uninterrupted(make_trainer, tmp_path, text_data, unpainted):
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


# Two ranks. Everything below runs in two processes of its own, and a reference in this one.
