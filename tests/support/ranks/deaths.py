"""Two processes, of which one is killed at a given place; the other must end, too."""

import os
import shutil
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.distributed.checkpoint import FileSystemWriter

import layershed.performance.speed
import layershed.performance.speedup_target
import layershed.performance.stopwatch
from layershed.callbacks import RedundancyMonitor, SublayerDrop, sublayer_drop
from layershed.integration import measurements
from layershed.performance.stopwatch import SpeedSettings
from tests.support.ranks import sharded
from tests.support.runs import BATCH, Foreign, loader, val_loader
from tests.support.ticking import MADE_UP, Ticking

STEPS, START = 6, 3
SHARDS = "folder of shards"
PLACES = ("training step", "scoring pass", "drop", "speed measurement", "checkpoint", SHARDS)


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


class DieAt(pl.Callback):
    """In the middle of training."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            die()


class Saving(pl.Callback):
    """Saves after every batch, where the sums of all ranks are gathered, and may die in the middle of it."""

    def __init__(self, dies):
        self.dies = dies

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "last.ckpt")

    def state_dict(self):
        return die() if self.dies else {}


class SavingShards(pl.Callback):
    """Saves twice by the same name, and may die once its shard of the second one is written."""

    def __init__(self, dies):
        self.dies = dies

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        path = Path(trainer.default_root_dir) / "last.ckpt"
        if self.dies and path.exists():
            write = FileSystemWriter.write_data
            FileSystemWriter.write_data = lambda *args: (write(*args).wait(), die())
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            shutil.copytree(path, path.with_name("first"))


def cut_short(batches_of):
    """Batches of which the second one kills."""

    def batches(*args):
        first, *_ = batches_of(*args)
        yield first
        die()

    return batches


def run(folder, place, dies):
    """Fit, with a speedup to reach, and die on the way."""
    torch.set_num_threads(1)
    clock, callbacks = Ticking(), [RedundancyMonitor(2)]
    layershed.performance.stopwatch.clock_for = lambda _device: clock
    layershed.performance.speed.measure_ceilings = lambda *_: MADE_UP
    amount = {"target_speedup": 1.2} if place == "speed measurement" else {"count": 2}
    drop = SublayerDrop(
        START, calibrate_on="train", quality_batches=1, speed=SpeedSettings(4, 2, runs=1, warmup=0), **amount
    )
    if place == "checkpoint":  # before the sums of the others are gathered
        callbacks.insert(0, Saving(dies))
    elif dies and place == "training step":
        callbacks.append(DieAt())
    elif dies and place == "scoring pass":
        measurements.calibration_batches = cut_short(measurements.calibration_batches)
    elif dies and place == "drop":
        sublayer_drop.bypass = die
    elif dies and place == "speed measurement":
        layershed.performance.speedup_target.measure_latency = die
    if place == SHARDS:
        callbacks = [SublayerDrop(1, count=2, calibration_batches=1, quality_batches=0), SavingShards(dies)]
        sharded.trainer_of(folder, *callbacks).fit(sharded.Sharded(), loader(2 * STEPS * BATCH))
        return
    module = Foreign()
    clock.watch(module.net)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        max_steps=STEPS,
        callbacks=[*callbacks, drop],
    )
    trainer.fit(module, loader(2 * STEPS * BATCH), val_loader())


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], os.environ["RANK"] == sys.argv[3])
