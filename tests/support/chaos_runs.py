"""The runs that benchmarks/chaos.py kills: one process of a run, from the last checkpoint on."""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import layershed.files.checkpoint_file
import layershed.reporting.html_report
from layershed.callbacks import ExactResume, LoRARecovery, Quantization, RedundancyMonitor, Report, SublayerDrop
from layershed.cli.main import main as command_line

KINDS, MODULES = ("one-shot", "iterative", "lora", "nf4"), ("ours", "foreign")
STEPS, SAVE_EVERY, TOKENS = 20, 2, 16  # 8 batches an epoch: checkpoints also at its end, and after the last step
NET = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,
    "bos_token_id": None,
    "eos_token_id": 1,
}
RESULT, CHECKPOINTS = "result.pt", "*/checkpoints"


@dataclass(frozen=True)
class Kill:
    """When a process dies.

    Args:
        where: ``time``, by the parent, so many seconds after training began; or by itself while it writes a checkpoint:
            ``middle`` of the file, before the ``fsync``, before the ``replace``, or ``after`` it.
        number: Of the write, counted from 1; or the seconds.
    """

    where: str
    number: float


class Keep(pl.Callback):
    """Tells the parent when training begins, and leaves everything there is to compare, as the last callback."""

    tell: Callable[[], None] = staticmethod(lambda: None)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Training begins."""
        type(self).tell()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save it."""
        states = {}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SublayerDrop | Report):
                states[type(callback).__name__] = callback.state_dict()
        result = {
            "weights": pl_module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "step": trainer.global_step,
            "callbacks": states,
            "logs": str(trainer.log_dir),
            "rng": torch.get_rng_state(),
        }
        # whole or not at all, as it says that the run is done
        layershed.files.checkpoint_file.write_atomically(Path(trainer.default_root_dir) / RESULT, result)


class Plain(pl.LightningModule):
    """Somebody else's module: it knows nothing of layershed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = LlamaForCausalLM(LlamaConfig(**{**NET, "vocab_size": 97})).train()
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Next-token cross-entropy."""
        loss: Tensor = self.net(**batch, use_cache=False).loss
        return loss

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """As usual."""
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """As usual."""
        self.log("val_loss", self.loss(batch), batch_size=len(batch["input_ids"]))

    def configure_optimizers(self) -> Any:
        """AdamW and a cosine."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def settings_of(kind: str) -> dict[str, dict[str, Any]]:
    """The callbacks of a kind of run, by their names, in their order."""
    rounds = {"every_n_steps": 5, "rounds": 2} if kind == "iterative" else {}
    found: dict[str, dict[str, Any]] = {
        "ExactResume": {},
        "RedundancyMonitor": {"every_n_steps": 2},
        "SublayerDrop": {"start": 7, "count": 2, "calibration_batches": 3, "quality_batches": 2, **rounds},
    }
    if kind == "nf4":
        found["Quantization"] = {"mode": "nf4"}
    if kind in ("lora", "nf4"):
        finish = "merge" if kind == "lora" else "adapter"
        found["LoRARecovery"] = {"rank": 4, "dropout": 0.1, "warmup_steps": 3, "finish": finish}
    found["Report"] = {"every_n_steps": 2}
    return found


def segment(module: str, kind: str, folder: Path, kill: Kill | None, tell: Any) -> None:
    """One process: from the last checkpoint in the folder to the end, unless it is killed."""
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    os.chdir(folder)
    # pictures take most of the time
    layershed.reporting.html_report.inline_svg = lambda figure, name: ""  # type: ignore[attr-defined]
    Keep.tell = staticmethod(lambda: tell.send("training"))
    if kill is not None and kill.where != "time":
        _die_while_writing(kill)
    code = _ours(kind, folder) if module == "ours" else _foreign(kind, folder)
    sys.exit(code)


def _ours(kind: str, folder: Path) -> int:
    """By the command line."""
    if not (folder / "run.yaml").exists():
        _write_config(kind, folder)
    return command_line(["fit", "--config=run.yaml", "--ckpt_path=last"])


def _write_config(kind: str, folder: Path) -> None:
    text = "\n\n".join(f"{number} plus {number} is {2 * number}, and then some." for number in range(40))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    saving = {"every_n_train_steps": SAVE_EVERY, "save_last": True}
    classes = [*settings_of(kind).items(), (f"{__name__}.Keep", {}), ("ModelCheckpoint", saving)]
    config = {
        "seed_everything": 7,
        "model": {
            "config": {"model_type": "llama", **NET, "vocab_size": 259, "pad_token_id": 0},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.1}},
        },
        "data": {"source": "text.txt", "block_size": TOKENS, "batch_size": 4, "max_tokens": 8 * 4 * TOKENS},
        "trainer": {
            "default_root_dir": str(folder),
            "accelerator": "cpu",
            "max_steps": STEPS,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": name, "init_args": settings} for name, settings in classes],
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def _foreign(kind: str, folder: Path) -> int:
    """By a script of somebody else's."""
    pl.seed_everything(7, verbose=False)
    known = (ExactResume, RedundancyMonitor, SublayerDrop, Quantization, LoRARecovery, Report)
    classes = {each.__name__: each for each in known}
    callbacks = [classes[name](**settings) for name, settings in settings_of(kind).items()]
    saving = ModelCheckpoint(folder / "foreign" / "checkpoints", every_n_train_steps=SAVE_EVERY, save_last=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        log_every_n_steps=1,
        logger=CSVLogger(folder, name=""),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, Keep(), saving],
    )
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(3, 97, (24, TOKENS), generator=generator)
    items: Any = [{"input_ids": row, "labels": row} for row in rows]
    train = StatefulDataLoader(items[:16], batch_size=2, shuffle=True)
    val: DataLoader[Any] = DataLoader(items[16:], batch_size=2)
    trainer.fit(Plain(), train, val, ckpt_path="last")
    return 0


def _die_while_writing(kill: Kill) -> None:
    """Have this process kill itself in the n-th write of a checkpoint."""
    own: Any = layershed.files.checkpoint_file
    real: dict[str, Any] = {"save": torch.save, "fsync": os.fsync, "replace": os.replace}
    writes = 0

    def due() -> bool:
        return writes == kill.number

    def save(content: Any, file: Any, *args: Any) -> None:
        nonlocal writes
        writes += 1
        if kill.where == "middle" and due():
            whole = BytesIO()
            real["save"](content, whole)
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            _die()
        real["save"](content, file, *args)

    def fsync(descriptor: int) -> None:
        if kill.where == "fsync" and due():
            _die()
        real["fsync"](descriptor)

    def replace(source: Any, target: Any) -> None:
        saves = str(target).endswith(".ckpt")
        if saves and kill.where == "replace" and due():
            _die()
        real["replace"](source, target)
        if saves and kill.where == "after" and due():
            _die()

    own.torch = _With(torch, save=save)
    own.os = _With(os, fsync=fsync, replace=replace)


class _With:
    """A module, some of whose functions are others."""

    def __init__(self, module: Any, **functions: Any) -> None:
        self._module = module
        vars(self).update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _die() -> None:
    with suppress(ProcessLookupError):
        os.kill(os.getpid(), signal.SIGKILL)
