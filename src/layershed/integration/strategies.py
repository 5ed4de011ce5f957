"""Which strategies of the Trainer allow the model to change during training, and what is refused."""

from __future__ import annotations

from typing import Any

from torch import nn

from layershed.errors import StrategyError
from layershed.integration.fsdp_checkpoints import ShardedCheckpoints
from layershed.integration.lightning_private import tensor_parallel_size
from layershed.integration.namespaces import (
    Callback,
    DDPStrategy,
    DeepSpeedStrategy,
    LightningModule,
    ModelParallelStrategy,
    ParallelStrategy,
    Trainer,
    XLAStrategy,
)
from layershed.recovery.lora import set_enabled
from layershed.stand_ins.carried import dropped_parameters


def is_sharded(trainer: Trainer) -> bool:
    """Whether the weights are sharded by FSDP2."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def fit_strategy(trainer: Trainer, callback: Callback, pl_module: LightningModule, transformer: str | None) -> None:
    """Refuse a strategy under which the model cannot change, and make FSDP2 save and load a changed model.

    Args:
        trainer: The Trainer, in the setup hook.
        callback: The callback that changes the model, for the message.
        pl_module: The module that will change.
        transformer: Path of the transformer in it.

    Raises:
        StrategyError: If the strategy is FSDP1, DeepSpeed or another that holds the weights itself, or if tensor
            parallelism splits sublayers.
    """
    strategy: Any = trainer.strategy
    name, asker = type(strategy).__name__, type(callback).__name__
    known = isinstance(strategy, DDPStrategy | ModelParallelStrategy)
    if isinstance(strategy, DeepSpeedStrategy | XLAStrategy) or (isinstance(strategy, ParallelStrategy) and not known):
        raise StrategyError(
            f"{asker}: the model cannot change while {name} holds its weights. Instead, use ModelParallelStrategy "
            "(FSDP2) with fully_shard in configure_model, or DDPStrategy."
        )
    if not isinstance(strategy, ModelParallelStrategy):
        return
    if tensor_parallel_size(strategy) not in ("auto", 1):
        raise StrategyError(
            f"{asker}: ModelParallelStrategy(tensor_parallel_size={tensor_parallel_size(strategy)}) splits single "
            "sublayers, which is not supported. Instead, set tensor_parallel_size=1 and data_parallel_size to the "
            "number of devices."
        )
    ShardedCheckpoints(trainer, pl_module, transformer).install()


def refuse_sharded_speed(trainer: Trainer, what: str) -> None:
    """Refuse to measure the speed of sharded weights: it would include the time to gather them.

    Raises:
        StrategyError: If FSDP2 shards the weights.
    """
    if is_sharded(trainer):
        raise StrategyError(
            f"{what}: under ModelParallelStrategy the time of gathering shards would be measured. Leave it out, and "
            "measure the exported model (train.py benchmark)."
        )


def train_adapters(transformer: nn.Module) -> None:
    """Switch on the adapters that are in the model from the start; freeze the rest of the transformer."""
    resting = {id(parameter) for parameter in dropped_parameters(transformer)}
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_("lora_" in name and id(parameter) not in resting)
        parameter.grad = None
    set_enabled(transformer, True)


def restore_empty_rates(trainer: Trainer) -> None:
    """Restore the scheduled learning rate of groups without parameters: FSDP2 loads nothing for them."""
    for config in trainer.lr_scheduler_configs:
        groups = config.scheduler.optimizer.param_groups
        for group, rate in zip(groups, config.scheduler.get_last_lr(), strict=True):
            if not group["params"]:
                group["lr"] = rate
