"""What the Trainer's strategy means for a model that changes while it trains: which fit, and how FSDP2 saves and loads.

FSDP2 (ModelParallelStrategy) reads weights and optimizer states in one go, once the optimizers are there and before
any callback has its state. By then the model must have the checkpoint's structure, and the optimizers its parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
)
from lightning.pytorch.strategies.xla import XLAStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from layershed.checkpoint import CHECKPOINT_KEY, apply_structure
from layershed.discovery import find_transformer
from layershed.errors import CheckpointError, StrategyError
from layershed.optimizers import complete_state, forget_parameters, without_empty_groups
from layershed.overrides import overridden
from layershed.recovery import lora_settings, set_enabled

_UNSTARTED_KEY = "layershed_unstarted"
METADATA_FILE = "meta.pt"  # of a folder that save_distributed_checkpoint=True wrote


def is_sharded(trainer: Trainer) -> bool:
    """Whether the weights are sharded by FSDP2."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def fit_strategy(trainer: Trainer, callback: Callback, pl_module: LightningModule, transformer: str | None) -> None:
    """Refuse a strategy under which the model cannot change, and have FSDP2 save and load a changed one.

    Args:
        trainer: The Trainer, in the setup hook.
        callback: Who asks.
        pl_module: The module that is to change.
        transformer: Path of the transformer in it.

    Raises:
        StrategyError: If the strategy is FSDP1, DeepSpeed or another that keeps the weights elsewhere.
    """
    strategy: Any = trainer.strategy
    name, asker = type(strategy).__name__, type(callback).__name__
    known = isinstance(strategy, DDPStrategy | ModelParallelStrategy)
    if isinstance(strategy, DeepSpeedStrategy | XLAStrategy) or (isinstance(strategy, ParallelStrategy) and not known):
        raise StrategyError(
            f"{asker}: the model cannot change while {name} holds its weights; use ModelParallelStrategy (FSDP2) with "
            "fully_shard in configure_model, or DDPStrategy."
        )
    if not isinstance(strategy, ModelParallelStrategy):
        return
    if strategy._tensor_parallel_size not in ("auto", 1):
        raise StrategyError(
            f"{asker}: ModelParallelStrategy(tensor_parallel_size={strategy._tensor_parallel_size}) splits single "
            "sublayers, which is not supported; set tensor_parallel_size=1 and data_parallel_size to the number of "
            "devices."
        )
    _ShardedCheckpoints(trainer, pl_module, transformer).install()


def refuse_sharded_speed(trainer: Trainer, what: str) -> None:
    """Refuse to measure the speed of sharded weights, which would be that of gathering them.

    Raises:
        StrategyError: If FSDP2 shards the weights.
    """
    if is_sharded(trainer):
        raise StrategyError(
            f"{what}: under ModelParallelStrategy the time of gathering shards would be measured; leave it out, and "
            "measure the exported model (train.py benchmark)."
        )


def reshard(pl_module: LightningModule) -> None:
    """Have the module's parameters be those that the optimizers hold.

    After a forward pass without a backward one, FSDP2 leaves other objects in their places: the gathered weights.
    """
    for module in pl_module.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def train_adapters(transformer: nn.Module) -> None:
    """Switch adapters on that have been there from the start, and train nothing else of the transformer."""
    resting = {id(parameter) for module, _ in overridden(transformer) for parameter in module.parameters()}
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_("lora_" in name and id(parameter) not in resting)
        parameter.grad = None
    set_enabled(transformer, True)


def restore_empty_rates(trainer: Trainer) -> None:
    """Give groups without parameters, of which FSDP2 loads nothing, the learning rate that their schedule was at."""
    for config in trainer.lr_scheduler_configs:
        groups = config.scheduler.optimizer.param_groups
        for group, rate in zip(groups, config.scheduler.get_last_lr(), strict=True):
            if not group["params"]:
                group["lr"] = rate


class _ShardedCheckpoints:
    """How FSDP2 writes and reads the checkpoints of a model that changes: three methods of the strategy's."""

    def __init__(self, trainer: Trainer, pl_module: LightningModule, transformer: str | None) -> None:
        self.trainer, self.pl_module, self.transformer = trainer, pl_module, transformer
        self.strategy: Any = trainer.strategy
        self._unstarted: list[list[str]] = []

    def install(self) -> None:
        """For good: a checkpoint may be saved once the run is over."""
        self.strategy.__dict__.update(
            load_checkpoint=self.load, optimizer_state=self.optimizer_state, save_checkpoint=self.save
        )

    def load(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Look at what is dropped before a weight is read."""
        trainer, strategy = self.trainer, self.strategy
        path = Path(strategy.broadcast(checkpoint_path))
        reshard(self.pl_module)
        noted = _read_notes(path, weights_only)
        transformer = find_transformer(self.pl_module, name=self.transformer)
        _check_loadable(noted, transformer)
        apply_structure(noted, self.pl_module, name=self.transformer)
        forget_parameters(trainer.optimizers, transformer)
        # off again where LoRARecovery says that it had not begun; of the weights alone nobody says so
        set_enabled(transformer, True)
        states = noted.get("callbacks", {})
        for callback in getattr(trainer, "callbacks", []):
            if hasattr(callback, "before_sharded_load") and callback.state_key in states:
                callback.before_sharded_load(trainer, self.pl_module, states[callback.state_key])
        with without_empty_groups(trainer.optimizers):
            content: dict[str, Any] = type(strategy).load_checkpoint(strategy, path, weights_only)
        parameters = dict(self.pl_module.named_parameters())
        for optimizer, names in zip(trainer.optimizers, noted.get(_UNSTARTED_KEY, ()), strict=False):
            for name in names:
                optimizer.state.pop(parameters[name], None)
        return content

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """A state of which everything can be read back."""
        raw: Optimizer = getattr(optimizer, "_optimizer", optimizer)
        reshard(self.pl_module)
        # shards are found by the number of their group; a whole state is found by names, and others read it, too
        groups = [raw] if self.strategy._save_distributed_checkpoint else []
        completed = complete_state(raw)
        try:
            with without_empty_groups(groups):
                state: dict[str, Any] = type(self.strategy).optimizer_state(self.strategy, raw)
        finally:
            for parameter in completed:
                raw.state.pop(parameter, None)
        names = {id(parameter): name for name, parameter in self.pl_module.named_parameters()}
        self._unstarted.append([names[id(parameter)] for parameter in completed])
        return state

    def save(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Note which parameters had no state."""
        if "optimizer_states" in checkpoint:
            checkpoint[_UNSTARTED_KEY], self._unstarted = self._unstarted, []
        type(self.strategy).save_checkpoint(self.strategy, checkpoint, filepath, storage_options)


def _read_notes(path: Path, weights_only: bool | None) -> Mapping[str, Any]:
    """A checkpoint without its weights; of a single file they are mapped, not read."""
    if path.is_dir() and (path / METADATA_FILE).is_file():
        content = torch.load(path / METADATA_FILE, map_location="cpu", weights_only=weights_only)
    elif path.is_file():
        content = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
    else:
        content = None
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"ckpt_path={str(path)!r}: it is neither a checkpoint file nor a folder of shards with a {METADATA_FILE}."
        )
    return content


def _check_loadable(noted: Mapping[str, Any], transformer: Any) -> None:
    """Refuse what would have to be put in, or taken out, now that the weights are sharded."""
    structure = noted.get(CHECKPOINT_KEY) or {}
    if structure.get("quantized"):
        raise CheckpointError(
            "The checkpoint's weights are quantized, and ModelParallelStrategy cannot shard such; load it in one "
            "process."
        )
    found, present = structure.get("adapters"), lora_settings(transformer)
    if found == present:
        return
    raise CheckpointError(
        f"The checkpoint {'has no' if found is None else 'has recovery'} adapters and this run "
        f"{'has none' if present is None else 'has some'} of their settings; under ModelParallelStrategy they cannot "
        "change once the weights are sharded: list the LoRARecovery that the interrupted run had, or none."
    )
