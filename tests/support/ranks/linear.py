"""Two ranks under DDP that search, put linear maps in place, and train them on; each writes what it ended with."""

import os
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, DistributedSampler

import layershed as ls
from layershed.callbacks import SublayerDrop
from tests.support.ranks.trainer import trainer_on_ranks
from tests.support.runs import BATCH, Foreign, Watch, sequences, state_of


class Maps(Watch):
    """Notes the maps right after the drop."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 2:
            self.seen = {
                sublayer.name: each.up.weight.detach().clone()
                for sublayer, each in ls.linear_maps(pl_module.net).items()
            }


def main(folder):
    """Train, and save what is left."""
    torch.set_num_threads(1)
    maps = Maps(None)
    drop = SublayerDrop(2, count=2, method="best", calibration_batches=4, quality_batches=0)
    trainer = trainer_on_ranks(folder, [drop, maps], max_steps=4)
    module, items = Foreign(), sequences(2 * BATCH * 5)
    share = DistributedSampler(items, num_replicas=2, rank=int(os.environ["RANK"]), shuffle=False)
    trainer.fit(module, DataLoader(items, batch_size=BATCH, sampler=share))
    found = {"state": state_of(trainer, module), "plan": drop.plan.to_dict(), "maps": maps.seen}
    torch.save(found, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
