"""Two ranks under DDP, of which a callback unfreezes the backbone: whole runs, and some resumed from their middle."""

import os
import sys
from datetime import timedelta
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from layershed.recovery.lora import adapted_modules
from layershed.stand_ins.record import overridden
from layershed.surgery import bypassed_sublayers
from tests.support.finetuned import DROPS, Backbone
from tests.support.ranks.trainer import trainer_on_ranks
from tests.support.runs import BATCH, Save, sequences, state_of, val_loader

EPOCH, STEPS = 4, 12
UNFROZEN_AT = EPOCH
CUTS = (3, 5, 7)


class Frozen(pl.Callback):
    """Notes steps in which dropped weights, or the base under LoRA, were trainable or held by an optimizer."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        resting = [p for module, _ in overridden(pl_module) for p in module.parameters()]
        # under FSDP2 adapters are in the model from the start, but the base trains until recovery begins
        if any(getattr(callback, "began", None) is not None for callback in trainer.callbacks):
            resting += [p for layer in adapted_modules(pl_module).values() for p in layer.base_layer.parameters()]
        if any(p.requires_grad or id(p) in held for p in resting):
            self.seen.append(trainer.global_step)


def fit(folder, name, cut, unused):
    rank = int(os.environ["RANK"])
    torch.manual_seed(100 + rank)  # nothing may depend on the rank's own random state
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-3, lambda_func=lambda _: 1.5)
    frozen = Frozen()
    saving = [] if cut else [Save(folder / f"{name}-{unused}-{step}.ckpt", step) for step in CUTS]
    trainer = trainer_on_ranks(
        folder,
        [*DROPS[name](), finetuning, frozen, *saving],
        strategy=DDPStrategy(
            process_group_backend="gloo", timeout=timedelta(seconds=20), find_unused_parameters=unused
        ),
        max_steps=STEPS,
    )
    module, items = Backbone(), sequences(2 * BATCH * EPOCH)
    share = DistributedSampler(items, num_replicas=2, rank=rank, shuffle=False)
    data = StatefulDataLoader(items, batch_size=BATCH, sampler=share)
    path = folder / f"{name}-{unused}-{cut}.ckpt" if cut else None
    trainer.fit(module, data, val_loader(2), ckpt_path=path)
    trainable = sorted(name for name, parameter in module.named_parameters() if parameter.requires_grad)
    dropped = [(s.block, s.kind) for s in bypassed_sublayers(module)]
    return {"state": state_of(trainer, module), "trainable": trainable, "dropped": dropped, "frozen": frozen.seen}


def main(folder):
    """Run all of one rank, whole and from their middle; save each outcome, or its error."""
    torch.set_num_threads(1)
    results = {}
    for unused in (False, True):
        for name in DROPS:
            for cut in (None, *CUTS):
                try:
                    results[name, unused, cut] = fit(folder, name, cut, unused)
                except Exception as error:
                    results[name, unused, cut] = {"error": f"{type(error).__name__}: {error}"}
    torch.save(results, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
