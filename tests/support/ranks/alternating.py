"""Two ranks under DDP, of which a callback freezes and unfreezes the backbone in turns, beside a drop."""

import gc
import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from tests.support.finetuned import DROPS, Backbone
from tests.support.ranks.trainer import trainer_on_ranks
from tests.support.runs import BATCH, sequences, state_of

STEPS = 20


class Whole(Backbone):
    """Its optimizer holds all parameters."""

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Alternating(pl.Callback):
    """Trains the backbone in every other step. Notes how many wrappers and gradient hooks are alive."""

    def __init__(self):
        self.alive, self.hooks = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.backbone.requires_grad_(bool(trainer.global_step % 2))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step % 10:
            return
        gc.collect()
        self.alive.append(sum(isinstance(each, DistributedDataParallel) for each in gc.get_objects()))
        self.hooks.append(sum(len(p._backward_hooks or ()) for p in pl_module.parameters()))


def main(folder):
    """Train, and save what is left."""
    torch.set_num_threads(1)
    alternating = Alternating()
    trainer = trainer_on_ranks(folder, [alternating, *DROPS["drop before"]()], max_steps=STEPS)
    module, items = Whole(), sequences(2 * BATCH * 8)
    share = DistributedSampler(items, num_replicas=2, rank=int(os.environ["RANK"]), shuffle=False)
    trainer.fit(module, DataLoader(items, batch_size=BATCH, sampler=share))
    found = {"state": state_of(trainer, module), "alive": alternating.alive, "hooks": alternating.hooks}
    torch.save(found, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
