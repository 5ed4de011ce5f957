"""Two ranks with every callback, and one run resumed from within the window of calibration."""

import os

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from layershed.callbacks import (
    Export,
    RedundancyMonitor,
    Report,
    SpeedMonitor,
    SublayerDrop,
)
from layershed.reporting import html_report
from layershed.surgery import bypassed_sublayers
from tests.support.ranks.trainer import trainer_on_ranks
from tests.support.runs import (
    BATCH,
    Foreign,
    Save,
    sequences,
    state_of,
    val_loader,
)

STEPS, START, WINDOW = 7, 4, 3


class Losses(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(outputs["loss"].item())


RUNS = {"running": ("whole", "resumed"), "train": ("whole",)}


def _run(folder, calibrate_on):
    """Run one rank, and once more from within the window of calibration; save both outcomes."""
    results = {}
    for name in RUNS[calibrate_on]:
        drop = SublayerDrop(START, count=3, calibrate_on=calibrate_on, calibration_batches=WINDOW, quality_batches=2)
        losses = Losses()
        callbacks = [RedundancyMonitor(2), drop, losses, Save(folder / "cut.ckpt", START - 1)]
        if (calibrate_on, name) == ("running", "whole"):
            callbacks += [SpeedMonitor(prompt_tokens=6, new_tokens=2, runs=1), Export(), Report(every_n_steps=2)]
        trainer = trainer_on_ranks(folder / name, callbacks, max_steps=STEPS)
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


def run(folder):
    """The runs of one rank, without the pictures of their reports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html_report, "inline_svg", lambda _figure, _name: "")
        for how in RUNS:
            (folder / how).mkdir(exist_ok=True)
            _run(folder / how, how)
