"""What each of two processes does where the quality comes from the module's own validation, or a plan is given."""

import os
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics.classification import MulticlassAccuracy

import layershed as ls
from layershed.callbacks import SublayerDrop
from layershed.integration.own_validation import own_quality
from layershed.integration.run import run_directory
from tests.support.ranks.trainer import trainer_on_ranks
from tests.support.runs import BATCH, Foreign, sequences

VALIDATION = 5  # rows; each rank gets three, the first one twice

REDUCTIONS = ("sum", "min", "max")


class AskEach(pl.Callback):
    """Asks for each of the metrics that are not means."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.found = {}
        for how in REDUCTIONS:
            quality = own_quality(trainer, pl_module, iter(trainer.val_dataloaders), 9, f"val_{how}")
            self.found[how] = quality.values[f"val_{how}"]


class Graded(Foreign):
    """Logs a metric over all ranks; fails in validation on one rank, if asked to."""

    def __init__(self, fails=None):
        super().__init__()
        self.val_acc, self.fails = MulticlassAccuracy(97, average="micro"), fails

    def validation_step(self, batch, batch_idx):
        if self.fails is not None and self.fails == self.trainer.global_rank:
            raise RuntimeError("a broken row")
        logits = self.net(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        self.val_acc.update(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())
        self.log("val_acc", self.val_acc)
        for how in REDUCTIONS:
            self.log(f"val_{how}", batch["input_ids"].float().mean(), reduce_fx=how)
        self.log("val_alone", 1.0, rank_zero_only=True) if self.trainer.is_global_zero else None
        return self.loss(batch)


def share(count, seed, batch=BATCH):
    items = sequences(count, seed)
    return DataLoader(items, batch, sampler=DistributedSampler(items, 2, int(os.environ["RANK"]), shuffle=False))


def fit(folder, drop, module, **options):
    settings = {"max_steps": 4, "use_distributed_sampler": False, "check_val_every_n_epoch": 9, **options}
    trainer = trainer_on_ranks(folder, [drop], **settings)
    trainer.fit(module, share(24, 0), share(VALIDATION, 100, batch=2))
    return trainer


def run(folder):
    """The runs of one rank."""
    rank, found = os.environ["RANK"], {}
    drop = SublayerDrop(2, count=2, quality="val_acc")
    module = Graded()
    fit(folder / "own", drop, module)
    found["quality"] = {when: quality.values for when, quality in drop.quality.items()}
    found["weights"] = module.state_dict()
    drop = SublayerDrop(2, count=2, quality="val_acc")
    trainer = fit(folder / "failing", drop, Graded(fails=1))
    found["failing"] = trainer.global_step, drop.quality, len(drop.plan)
    ask = AskEach()
    fit(folder / "reduced", ask, Graded(), max_steps=1, num_sanity_val_steps=1)
    found["reduced"] = ask.found
    drop = SublayerDrop(2, plan=folder / "own" / "drop_plan.json", quality_batches=0)
    module = Graded()
    fit(folder / "given", drop, module)
    found["given"] = [sublayer.name for sublayer in ls.dropped_sublayers(module)]
    here = folder / "here"
    here.mkdir(exist_ok=True)
    before = Path.cwd()
    os.chdir(here)
    try:
        trainer = fit(None, SublayerDrop(2, count=1, quality_batches=0), Graded())
        found["temporary"] = str(run_directory(trainer))
        trainer.strategy.barrier()
        found["left"] = [path.name for path in here.iterdir()]
    finally:
        os.chdir(before)
    torch.save(found, folder / f"{rank}.pt")
