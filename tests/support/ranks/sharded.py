"""The work of each of two processes under FSDP2: uninterrupted runs, resumed runs, and evaluated checkpoints."""

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from layershed.callbacks import ExactResume, Export, LoRARecovery, RedundancyMonitor, SublayerDrop
from layershed.errors import CheckpointError
from layershed.saving.checkpoint import load_checkpoint
from layershed.surgery import bypassed_sublayers
from tests.support.runs import BATCH, Foreign, HeadLoss, Save, sequences

STEPS, START, WINDOW = 7, 4, 3
AFTER = "after the fit"
CUTS = (3, 4, 6)  # within the window of calibration, at the drop, after it


class Sharded(Foreign):
    """The weights of the embedding and the norms stand in a group of their own, which LoRA leaves empty."""

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for block in self.net.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def configure_optimizers(self):
        groups = {True: [], False: []}
        for name, parameter in self.named_parameters():
            groups["norm" in name or "embed" in name].append(parameter)
        settings = [{"params": groups[True], "weight_decay": 0.0}, {"params": groups[False], "weight_decay": 0.1}]
        optimizer = torch.optim.AdamW(settings, lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Headed(HeadLoss, Sharded):
    """Modules outside the transformer keep training with their state, beside adapters without a state yet."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(97, 97)
        torch.nn.init.zeros_(self.head.weight)

    def configure_model(self):
        super().configure_model()
        fully_shard(self.head, mesh=self.device_mesh["data_parallel"])


def dropping():
    return SublayerDrop(START, count=3, calibration_batches=WINDOW, quality_batches=2)


def recovering():
    return LoRARecovery(rank=4, warmup_steps=2, finish="adapter")


RUNS = {"drop": lambda: [dropping()], "lora": lambda: [dropping(), recovering()]}
RUNS["headed"] = RUNS["lora"]
RUNS["exact"] = lambda: [dropping(), ExactResume()]


def trainer_of(folder, *callbacks, shards=True, max_steps=STEPS):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    strategy = ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        save_distributed_checkpoint=shards,
        process_group_backend="gloo",
    )
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        callbacks=list(callbacks),
        max_steps=max_steps,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        **quiet,
    )


def share(items, loader=DataLoader):
    return loader(items, batch_size=BATCH, sampler=DistributedSampler(items, 2, int(os.environ["RANK"]), shuffle=False))


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def state_of(trainer, module):
    """Everything of a run that the next step would depend on, with its shards put together."""
    weights = {name: whole(tensor) for name, tensor in module.state_dict().items()}  # which reshards, too
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    optimizer = trainer.optimizers[0]
    return {
        "weights": weights,
        "optimizer": {
            names[id(parameter)]: {name: whole(value) for name, value in state.items()}
            for parameter, state in optimizer.state.items()
        },
        "groups": [
            {**group, "params": [names[id(parameter)] for parameter in group["params"]]}
            for group in optimizer.param_groups
            if group["params"]
        ],
        "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "step": trainer.global_step,
    }


def fit(folder, name, shards, kept, cut=None):
    """One run that keeps the checkpoints of some steps; returns its results."""
    saved = folder / f"{name}-{shards}"
    saved.mkdir(exist_ok=True)
    watch, callbacks = RedundancyMonitor(2), RUNS[name]()
    keep = [Save(saved / f"{step}.ckpt", step) for step in kept]
    run = folder / f"{name}-{shards}-{cut}"
    trainer = trainer_of(run, watch, *callbacks, Export(), *keep, shards=shards)
    module = Headed() if name == "headed" else Sharded()
    torch.manual_seed(7)
    trainer.fit(
        module,
        share(sequences(2 * BATCH * STEPS), StatefulDataLoader),
        share(sequences(4 * BATCH, seed=100)),
        ckpt_path=None if cut is None else saved / f"{cut}.ckpt",
    )
    if cut is None:
        trainer.save_checkpoint(saved / f"{AFTER}.ckpt")
    strategy = trainer.strategy
    return {
        "replaced": [name for name in vars(strategy) if callable(getattr(type(strategy), name, None))],
        "state": state_of(trainer, module),
        "plan": callbacks[0].plan.to_dict(),
        "bypassed": [(s.block, s.kind) for s in bypassed_sublayers(module)],
        "quality": {when: (q.loss, q.accuracy) for when, q in callbacks[0].quality.items()},
        "trainable": [name for name, parameter in module.named_parameters() if parameter.requires_grad],
    }


def evaluate(folder, name, shards, cut):
    """What a checkpoint predicts, and the loss that validation and test find."""
    trainer = trainer_of(folder / "evaluated", *RUNS[name](), shards=shards)
    path, items = folder / f"{name}-{shards}" / f"{cut}.ckpt", share(sequences(2 * BATCH, seed=100))
    logits = trainer.predict(Sharded(), items, ckpt_path=path)
    val = trainer.validate(Sharded(), items, ckpt_path=path, verbose=False)[0]["val_loss"]
    test = trainer.test(Sharded(), items, ckpt_path=path, verbose=False)[0]["test_loss"]
    return {"logits": logits, "val": val, "test": test}


def refused(folder, shards):
    """What a run with adapters says to a checkpoint without, and the other way round."""
    found = {}
    for name, other in (("lora", "drop"), ("drop", "lora")):
        path = folder / f"{other}-{shards}" / f"{STEPS}.ckpt"
        try:
            trainer_of(folder / "refused", *RUNS[name](), shards=shards).validate(Sharded(), [], ckpt_path=path)
        except CheckpointError as error:
            found[name] = str(error)
    return found


def loaded_densely(folder, name, shards, step):
    """What a Trainer that knows nothing of layershed says to the checkpoint of a dropped model, if anything."""
    path = folder / f"{name}-{shards}" / f"{step}.ckpt"
    try:
        trainer_of(folder / "dense", shards=shards).validate(Sharded(), share(sequences(2 * BATCH)), ckpt_path=path)
    except BaseException as error:  # torch's CheckpointException is no Exception
        return f"{type(error).__name__}: {error}"
    return None


def main(folder, combinations):
    """Fit, resume and evaluate.

    Args:
        folder: Where the results go.
        combinations: Of each run its name, whether its checkpoints are folders of shards, the steps from which it is
            resumed, and the steps whose checkpoints are evaluated.
    """
    torch.set_num_threads(1)
    results = {}
    for name, shards, cuts, evaluated, densely in combinations:
        kept = sorted({*cuts, *evaluated, STEPS})
        for cut in (None, *cuts):
            results["fit", name, shards, cut] = fit(folder, name, shards, kept, cut)
        for step in densely:
            results["dense", name, shards, step] = loaded_densely(folder, name, shards, step)
        for cut in evaluated:
            results["evaluate", name, shards, cut] = evaluate(folder, name, shards, cut)
    if os.environ["RANK"] == "0":  # one of two reads by itself, and waits for nobody
        found = Foreign()
        load_checkpoint(found, folder / "drop-True" / f"{STEPS}.ckpt")
        results["alone"] = dict(found.state_dict())
    for shards in (True, False):
        if {("drop", shards), ("lora", shards)} <= {combination[:2] for combination in combinations}:
            results["refused", shards] = refused(folder, shards)
    torch.save(results, folder / f"{os.environ['RANK']}.pt")


EARLY_AND_LATE = (CUTS[0], STEPS)  # before the drop and after it
RESUMED_ONLY = ("headed", "exact")
DROPPED = (STEPS, AFTER)
EVERY = [
    (name, shards, CUTS, () if name in RESUMED_ONLY else EARLY_AND_LATE, DROPPED)
    for name in RUNS
    for shards in (True, False)
]
SOME = [
    ("drop", True, (), EARLY_AND_LATE, DROPPED),
    ("lora", True, (), (STEPS,), DROPPED),
    ("headed", True, (START,), (), ()),
    ("drop", False, (CUTS[0],), (STEPS,), DROPPED),
    ("exact", True, (CUTS[0],), (), ()),
]

if __name__ == "__main__":
    main(Path(sys.argv[1]), {"every": EVERY, "some": SOME}[sys.argv[2]])
