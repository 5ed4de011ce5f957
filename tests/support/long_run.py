"""A long run with every callback, and the memory that the callbacks hold during it."""

import os
import sys
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
from layershed.formatting import short_bytes

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
