"""Does the memory of the callbacks grow over a long run?

A tiny Llama trains for 20,000 optimizer steps with every callback: importance measured at every step, the loss noted at
every step, a validation every 10; in the middle two sublayers are dropped, the rest is quantized to nf4 and adapters
take over. Every 2,000 steps it prints what the callbacks hold (their attributes and whatever hangs on those in
containers, tensors and objects of layershed, modules of the model not), the size of a checkpoint, that of
importance.csv, and the resident memory of the process, in which PyTorch and Lightning have their part.

    OMP_NUM_THREADS=1 python benchmarks/long_run.py

Seen on a shared Xeon, torch 2.13.0, 221 s of processor time. What is left is a sawtooth: a curve of the report grows to
500 points and is then halved.

          step  callbacks hold      checkpoint  importance.csv        resident
         4,000        186.6 kB        355.4 kB        965.3 kB        491.7 MB
         8,000        187.9 kB        355.6 kB          1.9 MB        491.8 MB
        12,000        206.5 kB        149.1 kB          2.7 MB        558.3 MB
        16,000        202.3 kB        148.6 kB          3.4 MB        558.3 MB
        20,000        227.4 kB        152.3 kB          4.0 MB        558.4 MB
    20,000 steps: from step 4,000 to 8,000 callbacks hold 186.6 kB -> 187.9 kB (at most 191.5 kB), checkpoint 355.4 kB
    -> 355.6 kB, resident +0.1 MB; from step 12,000 to 20,000 callbacks hold 206.5 kB -> 227.4 kB (at most 227.4 kB),
    checkpoint 149.1 kB -> 152.3 kB, resident +0.0 MB
"""

import argparse
import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from layershed.callbacks import (
    Export,
    LoRARecovery,
    Quantization,
    RedundancyMonitor,
    Report,
    SpeedMonitor,
    SublayerDrop,
)
from layershed.wording import short_bytes

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
LOOKS = 10  # how often memory is read


class Tiny(LightningModule):
    """A Llama with a plain optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, pad_token_id=0)).train()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The language model's loss."""
        loss: Tensor = self.net(input_ids=batch, labels=batch, use_cache=False).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """The same on other data."""
        self.log("val_loss", self.net(input_ids=batch, labels=batch, use_cache=False).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def held(callback: Callback) -> int:
    """Bytes that a callback holds, the model and the trainer apart."""
    todo: list[Any] = [vars(callback)]
    seen: set[int] = set()
    size = 0
    while todo:
        item = todo.pop()
        if id(item) in seen or isinstance(item, type) or callable(item):
            continue
        seen.add(id(item))
        size += sys.getsizeof(item) + (item.nbytes if isinstance(item, Tensor) else 0)
        if isinstance(item, dict):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            todo += item
        elif type(item).__module__.startswith("layershed") and not isinstance(item, nn.Module):
            todo.append(vars(item))
    return size


class Look(Callback):
    """Reads memory every so many steps, last of the callbacks; a checkpoint is written and measured for it."""

    def __init__(self, every: int, *, show: bool) -> None:
        self.every, self.show = every, show
        self.steps: list[int] = []
        self.held: list[int] = []
        self.checkpoint: list[int] = []
        self.resident: list[int] = []
        self.callbacks: list[Callback] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read it."""
        if trainer.global_step % self.every:
            return
        folder = Path(trainer.default_root_dir)
        trainer.save_checkpoint(folder / "look.ckpt")
        self.steps.append(trainer.global_step)
        self.held.append(sum(map(held, self.callbacks)))
        self.checkpoint.append((folder / "look.ckpt").stat().st_size)
        self.resident.append(resident())
        if self.show:
            history = (folder / "importance.csv").stat().st_size
            figures = (self.held[-1], self.checkpoint[-1], history, self.resident[-1])
            line = "".join(f"{short_bytes(figure):>16}" for figure in figures)
            print(f"{trainer.global_step:>10,}{line}", flush=True)

    def between(self, first: int, last: int) -> str:
        """What became more from one look to another, and at most in between."""
        steps, more = (self.steps[first], self.steps[last]), (self.resident[last] - self.resident[first]) / 1e6
        holds, sizes = self.held[first : last + 1], self.checkpoint[first : last + 1]
        return (
            f"from step {steps[0]:,} to {steps[1]:,} callbacks hold {short_bytes(holds[0])} -> {short_bytes(holds[-1])}"
            f" (at most {short_bytes(max(holds))}), checkpoint {short_bytes(sizes[0])} -> {short_bytes(sizes[-1])}, "
            f"resident {more:+.1f} MB"
        )


def resident() -> int:
    """Bytes of memory that the process has."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def train(steps: int, looks: int, folder: str | Path, *, show: bool = False) -> Look:
    """A run with every callback, watched."""
    torch.manual_seed(0)
    look = Look(steps // looks, show=show)
    drop = SublayerDrop(steps // 2, count=2, calibration_batches=8, quality_batches=2)
    recovery = [Quantization("nf4"), LoRARecovery(rank=2, finish="dequantize")]
    speed, report = SpeedMonitor(prompt_tokens=8, new_tokens=4, runs=3), Report(every_n_steps=1)
    monitors = [RedundancyMonitor(1), RedundancyMonitor(steps // 100, metric="angular")]
    look.callbacks = [*monitors, drop, *recovery, speed, Export(), report]
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[*look.callbacks, look],
        default_root_dir=folder,
        val_check_interval=10,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    tokens = torch.randint(1, SIZES["vocab_size"], (400, 16))
    trainer.fit(Tiny(), DataLoader(tokens, batch_size=2), DataLoader(tokens[:4], batch_size=2))  # type: ignore[arg-type]
    return look


def main() -> None:
    """Print memory over the run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=20_000, help="optimizer steps; a multiple of 10")
    options = parser.parse_args()
    if options.steps < 200 or options.steps % LOOKS:
        parser.error(f"--steps {options.steps}: it must be a multiple of {LOOKS}, and at least 200")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers|.*Checkpoint directory")
    columns = ("callbacks hold", "checkpoint", "importance.csv", "resident")
    print(f"{'step':>10}" + "".join(f"{name:>16}" for name in columns))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        look = train(options.steps, LOOKS, folder, show=True)
    minutes = (time.perf_counter() - start) / 60
    print(f"{minutes:.1f} minutes; held at most {short_bytes(max(look.held))}; at the end {short_bytes(resident())}")
    # the drop brings adapters, and libraries that are imported for it: before and behind it are two stretches
    print(f"{options.steps:,} steps: {look.between(1, 3)}; {look.between(5, 9)}")


if __name__ == "__main__":
    main()
