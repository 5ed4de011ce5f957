"""Two ranks with LoRA: whole runs, and some resumed from their middle."""

import os
from datetime import timedelta

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from layershed.callbacks import Quantization
from tests.support.lora_runs import Headed, dropping, recovery
from tests.support.ranks.trainer import trainer_on_ranks
from tests.support.runs import (
    BATCH,
    Save,
    Watch,
    sequences,
    state_of,
    val_loader,
)

STEPS, CUT = 8, 6


RUNS = {
    "lora": lambda: [dropping(quality_batches=1), recovery(warmup_steps=3)],
    "qlora": lambda: [dropping(), Quantization(), recovery(finish="dequantize")],
    "rounds": lambda: [dropping(3, count=2, every_n_steps=2, rounds=2), recovery()],
    "adapter": lambda: [dropping(), recovery(finish="adapter")],
}


CONTINUED = ("qlora", "rounds")


def run(folder):
    """Run all of one rank, and some again from their middle; save each outcome, or its error."""
    rank = int(os.environ["RANK"])
    for name, resumed in [*((name, False) for name in RUNS), *((name, True) for name in CONTINUED)]:
        torch.manual_seed(100 + rank)  # nothing may depend on the rank's own random state
        losses = Watch(lambda trainer, _: trainer.callback_metrics["train_loss"].item())
        trainer = trainer_on_ranks(
            folder / f"{name}-{resumed}",
            [*RUNS[name](), losses, Save(folder / f"{name}.ckpt", CUT)],
            # a rank that waits in vain fails
            strategy=DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=20)),
            max_steps=STEPS,
        )
        module = Headed()
        items = sequences(2 * BATCH * STEPS)
        share = DistributedSampler(items, num_replicas=2, rank=rank, shuffle=False)
        data = StatefulDataLoader(items, batch_size=BATCH, sampler=share)
        try:
            trainer.fit(module, data, val_loader(2), ckpt_path=folder / f"{name}.ckpt" if resumed else None)
            found = {"state": state_of(trainer, module), "losses": [loss for _, loss in losses.seen]}
        except Exception as error:
            found = {"error": str(error)}
        torch.save(found, folder / f"{name}-{resumed}-{rank}.pt")
