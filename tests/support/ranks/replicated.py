"""What each of two processes does under DDP, and the same in one over the batches of both."""

import os
from dataclasses import astuple

import torch
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from layershed.callbacks import ExactResume, LoRARecovery, Quantization, RedundancyMonitor, SublayerDrop
from layershed.integration.lightning_private import supports_exact_resume
from layershed.quality import evaluate_quality
from layershed.surgery import bypassed_sublayers
from tests.support.ranks.trainer import trainer_on_ranks
from tests.support.runs import BATCH, TOKENS, Foreign, Save, sequences, state_of

STEPS, START, WINDOW = 6, 3, 2
KEPT = ((TOKENS, TOKENS - 1), (3, 2))  # tokens that are no padding, in the rows of rank 0 and of rank 1


def dropping(**options):
    settings = {"count": 3, "calibration_batches": WINDOW, "quality_batches": 2}
    return SublayerDrop(START, **settings, **options)


RUNS = {
    "running": lambda: [dropping(), RedundancyMonitor(1)],
    "pass": lambda: [dropping(calibrate_on="train")],
    "lora": lambda: [dropping(), LoRARecovery(rank=4, warmup_steps=2)],
    "int8": lambda: [dropping(), Quantization("int8", start="end")],
    "qlora": lambda: [dropping(), Quantization(), LoRARecovery(rank=4, finish="dequantize")],
}


def padded(items, kept):
    """The rows with so many tokens, one after the other, and padding after."""
    found = []
    for number, item in enumerate(items):
        mask = (torch.arange(TOKENS) < kept[number % len(kept)]).long()
        ids = torch.where(mask.bool(), item["input_ids"], 0)
        found.append({"input_ids": ids, "labels": torch.where(mask.bool(), ids, -100), "attention_mask": mask})
    return found


def of_rank(rank, count, seed=0):
    """The rows that a rank sees, in order."""
    return padded(sequences(2 * count, seed)[rank::2], KEPT[rank])


def interleaved(count, seed=0):
    """What DistributedSampler deals out so."""
    pairs = zip(of_rank(0, count, seed), of_rank(1, count, seed), strict=True)
    return [item for pair in pairs for item in pair]


def of_both(count, seed=0):
    """The batches of both ranks as one, step by step."""
    first, second = of_rank(0, count, seed), of_rank(1, count, seed)
    starts = range(0, count, BATCH)
    return [item for start in starts for rows in (first, second) for item in rows[start : start + BATCH]]


def train(folder, name, ranks):
    """One run; on one rank it takes batches of twice the size."""
    callbacks = RUNS[name]()
    alone = {} if ranks > 1 else {"devices": 1, "strategy": "auto"}
    trainer = trainer_on_ranks(folder / name, callbacks, max_steps=STEPS, use_distributed_sampler=False, **alone)
    module = Foreign()
    trainer.fit(module, loader(ranks, BATCH * STEPS), loader(ranks, 2 * BATCH, seed=100))
    return {
        "state": state_of(trainer, module),
        "plan": callbacks[0].plan.to_dict(),
        "bypassed": [(s.block, s.kind) for s in bypassed_sublayers(module)],
        "quality": {when: (q.loss, q.accuracy, q.tokens) for when, q in callbacks[0].quality.items()},
    }


def loader(ranks, count, seed=0):
    if ranks == 1:
        return DataLoader(of_both(count, seed), batch_size=2 * BATCH)
    items = interleaved(count, seed)
    return DataLoader(items, BATCH, sampler=DistributedSampler(items, 2, int(os.environ["RANK"]), shuffle=False))


def lonely(rank):
    """Batches of which rank 1 has none with a token to predict."""
    row = padded(sequences(2), (8, 1))[rank]
    return [{"input_ids": row["input_ids"][None], "labels": row["labels"][None]}]


class Seen(Foreign):
    """Notes its training batches."""

    def __init__(self):
        super().__init__(attention_dropout=0.2)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["input_ids"].tolist())
        return super().training_step(batch, batch_idx)


def resumed_within_an_epoch(folder, own):
    """What a rank sees and ends with from the second batch of the second epoch on: left alone, and resumed there.

    Args:
        folder: Where the checkpoint is.
        own: Whether the loader has a DistributedSampler of its own, instead of the one that Lightning puts in.
    """
    path, found = folder / f"own-{own}.ckpt", {}
    for which, seed in (("whole", 7), ("resumed", 8)):
        torch.manual_seed(seed + 10 * int(os.environ["RANK"]))
        trainer = trainer_on_ranks(
            folder / which,
            [dropping(), ExactResume(), *([Save(path, 6)] if which == "whole" else [])],
            max_steps=9,
            use_distributed_sampler=not own,
        )
        items = sequences(2 * BATCH * 4)
        # Lightning knows torch's RandomSampler, but not that of torchdata, which shuffle=True would bring
        sampler = DistributedSampler(items, 2, int(os.environ["RANK"]), seed=5) if own else RandomSampler(items)
        module = Seen()
        trainer.fit(
            module,
            StatefulDataLoader(items, BATCH, sampler=sampler),
            loader(2, 2 * BATCH, seed=100),
            ckpt_path=None if which == "whole" else path,
        )
        found[which] = {"state": state_of(trainer, module), "seen": module.seen[-3:], "batches": len(module.seen)}
    return found


def run(folder):
    """Every run of one rank."""
    results = {name: train(folder, name, 2) for name in RUNS}
    if supports_exact_resume():  # ExactResume refuses an older Lightning
        results["within an epoch"] = {own: resumed_within_an_epoch(folder, own) for own in (True, False)}
    results["lonely"] = astuple(evaluate_quality(Foreign(), lonely(int(os.environ["RANK"]))))
    torch.save(results, folder / f"{os.environ['RANK']}.pt")
