"""Two ranks under FSDP2, of which a callback or a hook unfreezes the backbone: whole runs, and some resumed."""

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch.distributed.fsdp import fully_shard
from torchdata.stateful_dataloader import StatefulDataLoader

from layershed.surgery import bypassed_sublayers
from tests.support.finetuned import DROPS, Backbone, Blockwise
from tests.support.ranks.sharded import share, state_of, trainer_of
from tests.support.ranks.unfreezing import Frozen
from tests.support.runs import BATCH, Save, sequences

EPOCH, STEPS = 4, 12
UNFROZEN_AT = EPOCH
CUTS = (3, 5, 7)


class Sharded(Backbone):
    """FSDP2 leaves the gathered embedding and norm of a frozen backbone in their places after a forward pass."""

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for block in self.backbone.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(self.backbone, mesh=mesh)
        fully_shard(self.head, mesh=mesh)


class ByHook(Sharded):
    """Unfreezes by a hook of its own; a resumed run must not need the hook a second time."""

    def __init__(self):
        super().__init__()
        self.backbone.requires_grad_(False)

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step == UNFROZEN_AT:
            self.backbone.requires_grad_(True)
            held = {id(p) for group in self.trainer.optimizers[0].param_groups for p in group["params"]}
            new = [p for p in self.backbone.parameters() if id(p) not in held]
            self.trainer.optimizers[0].add_param_group({"params": new, "lr": 1e-3})


WAYS = {
    "backbone": lambda: BackboneFinetuning(
        unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-3, lambda_func=lambda _: 1.5
    ),
    "blockwise": Blockwise,
    "hook": None,
}

RUNS = [(way, drop, True) for way in WAYS for drop in DROPS]  # as folders of shards; and some as single files
RUNS += [("backbone", "drop before", False), ("blockwise", "LoRA after", False), ("hook", "LoRA before", False)]


def fit(folder, way, drop, shards, cut):
    saved = folder / f"{way}-{drop}-{shards}"
    saved.mkdir(exist_ok=True)
    frozen, finetuning = Frozen(), [WAYS[way]()] if WAYS[way] else []
    saving = [] if cut else [Save(saved / f"{step}.ckpt", step) for step in CUTS]
    trainer = trainer_of(folder / "run", *DROPS[drop](), *finetuning, frozen, *saving, shards=shards, max_steps=STEPS)
    module = ByHook() if way == "hook" else Sharded()
    torch.manual_seed(7)
    trainer.fit(
        module,
        share(sequences(2 * BATCH * EPOCH), StatefulDataLoader),
        share(sequences(2 * BATCH, seed=100)),
        ckpt_path=saved / f"{cut}.ckpt" if cut else None,
    )
    trainable = sorted(name for name, parameter in module.named_parameters() if parameter.requires_grad)
    dropped = [(s.block, s.kind) for s in bypassed_sublayers(module)]
    return {"state": state_of(trainer, module), "trainable": trainable, "dropped": dropped, "frozen": frozen.seen}


def main(folder):
    """Run all of one rank, whole and from their middle; save each outcome, or its error."""
    torch.set_num_threads(1)
    results = {}
    for way, drop, shards in RUNS:
        for cut in (None, *CUTS):
            try:
                results[way, drop, shards, cut] = fit(folder, way, drop, shards, cut)
            except Exception as error:
                results[way, drop, shards, cut] = {"error": f"{type(error).__name__}: {error}"}
    torch.save(results, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
