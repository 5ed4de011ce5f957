"""How FSDP2 (ModelParallelStrategy) writes and reads the checkpoints of a model that changes during training.

- Lightning reads weights and optimizer states together, after the optimizers are built and before any callback has its
  state. By then the model must have the checkpoint's structure, and the optimizers its parameters.
- Lightning skips unknown keys and would evaluate the dense model. The weights of dropped sublayers therefore have other
  names.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from layershed.discovery.find import find_transformer
from layershed.errors import CheckpointError
from layershed.files.checkpoint_file import read_checkpoint
from layershed.files.checkpoint_shards import NOTES_FILE, mend, read_notes, read_shards, replacing_shards
from layershed.files.shard_index import INDEX_FILE
from layershed.integration.lightning_private import raw_optimizer, saves_shards, trainer_of
from layershed.integration.namespaces import LightningModule, ModelParallelStrategy, Trainer
from layershed.integration.preflight import callbacks_of
from layershed.integration.protocols import LoadsShards
from layershed.recovery.lora import lora_settings, set_enabled
from layershed.recovery.optimizer_groups import complete_state, forget_parameters, without_empty_groups
from layershed.saving.checkpoint import CHECKPOINT_KEY, apply_structure, read_sharded_weights
from layershed.stand_ins.contexts import withheld
from layershed.stand_ins.install import MARK

_UNSTARTED_KEY = "layershed_unstarted"


class ShardedCheckpoints:
    """Replaces three methods of the strategy while a Trainer runs.

    Args:
        trainer: The Trainer, whose strategy is ModelParallelStrategy.
        pl_module: The module that will change.
        transformer: Path of the transformer in it.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, transformer: str | None) -> None:
        self.trainer, self.pl_module, self.transformer = trainer, pl_module, transformer
        self.strategy: Any = trainer.strategy
        self.replaced: dict[str, Any] = {}  # what the user had set on this one strategy
        self._unstarted: list[list[str]] = []

    def install(self) -> None:
        """Replace the methods on this one strategy; :func:`give_back_strategy` undoes it."""
        give_back_strategy(self.trainer)  # another callback may have replaced them
        own = {"load_checkpoint": self.load, "optimizer_state": self.optimizer_state, "save_checkpoint": self.save}
        self.replaced = {name: vars(self.strategy)[name] for name in own if name in vars(self.strategy)}
        vars(self.strategy).update(own)

    def load(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Give the model the checkpoint's structure, then load the weights and the optimizer states."""
        trainer, strategy = self.trainer, self.strategy
        path = Path(strategy.broadcast(checkpoint_path))
        if trainer.is_global_zero:
            mend(path)
        strategy.barrier()
        reshard(self.pl_module)
        noted = _read_notes(path, weights_only)
        transformer = find_transformer(self.pl_module, name=self.transformer)
        _check_loadable(noted, transformer)
        if trainer.optimizers and not all(own["state"] for own in noted.get("optimizer_states", ())):
            raise CheckpointError(
                f"ckpt_path={str(path)!r}: an optimizer without a state, such as SGD without momentum, cannot be "
                "resumed from a single file under ModelParallelStrategy. Give it momentum, or write folders "
                "(save_distributed_checkpoint=True)."
            )
        apply_structure(noted, self.pl_module, name=self.transformer)
        forget_parameters(trainer.optimizers, transformer)
        # LoRARecovery switches them off again if it had not begun; a checkpoint of weights alone does not say
        set_enabled(transformer, True)
        states = noted.get("callbacks", {})
        for callback in callbacks_of(trainer):
            if isinstance(callback, LoadsShards) and callback.state_key in states:
                callback.before_sharded_load(trainer, self.pl_module, states[callback.state_key])
        with without_empty_groups(trainer.optimizers), withheld(self.pl_module):
            if path.is_dir():
                self._load_shards(path)
                content = dict(noted)
            else:
                load = type(strategy).load_checkpoint
                # Lightning takes it from 2.6 on
                more = (weights_only,) if "weights_only" in signature(load).parameters else ()
                content = load(strategy, path, *more)
        parameters = dict(self.pl_module.named_parameters())
        for optimizer, names in zip(trainer.optimizers, noted.get(_UNSTARTED_KEY, ()), strict=False):
            for name in names:
                optimizer.state.pop(parameters[name], None)
        return content

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer state that loads completely."""
        raw: Optimizer = raw_optimizer(optimizer)
        reshard(self.pl_module)
        # shards are found by group number; a whole state is found by names, also by other readers
        groups = [raw] if saves_shards(self.strategy) else []
        completed = complete_state(raw)
        try:
            with without_empty_groups(groups), withheld(self.pl_module):
                state: dict[str, Any] = type(self.strategy).optimizer_state(self.strategy, raw)
        finally:
            for parameter in completed:
                raw.state.pop(parameter, None)
        names = {id(parameter): name for name, parameter in self.pl_module.named_parameters()}
        self._unstarted.append([names[id(parameter)] for parameter in completed])
        return state

    def save(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Note the parameters without a state, and write a folder of shards whole or not at all."""
        if "optimizer_states" in checkpoint:
            checkpoint[_UNSTARTED_KEY], self._unstarted = self._unstarted, []
        strategy = self.strategy
        write = type(strategy).save_checkpoint
        if not saves_shards(strategy):
            write(strategy, checkpoint, filepath, storage_options)
            return
        path = Path(strategy.broadcast(filepath))
        with replacing_shards(path, leads=self.trainer.is_global_zero, wait=strategy.barrier) as beside:
            write(strategy, checkpoint, beside, storage_options)

    def _load_shards(self, path: Path) -> None:
        """As Lightning does it, but without executing anything in the folder."""
        model = self.strategy.model
        weights, strict = get_model_state_dict(model), self.pl_module.strict_loading
        read_sharded_weights(path, weights, strict=strict)
        model.load_state_dict(weights, strict=strict)
        for number, optimizer in enumerate(self.trainer.optimizers):
            key = f"optimizer_{number}"
            state: dict[str, Any] = {key: get_optimizer_state_dict(model, optimizer)}
            read_shards(path, state)
            set_optimizer_state_dict(model, optimizer, state[key], options=StateDictOptions(cpu_offload=True))


def give_back_strategy(trainer: Trainer) -> None:
    """Restore the strategy's own methods."""
    own = vars(trainer.strategy)
    for name, value in list(own.items()):
        owner = getattr(value, "__self__", None)
        if isinstance(owner, ShardedCheckpoints):
            del own[name]
            own.update({name: owner.replaced[name]} if name in owner.replaced else {})


def withhold_weights(checkpoint: dict[str, Any], pl_module: LightningModule) -> None:
    """Rename the weights of dropped sublayers in an FSDP2 checkpoint to names that a dense model does not have.

    The module's own checkpoint hook calls it, so it also applies to a checkpoint saved after the run.
    """
    weights = checkpoint.get("state_dict")
    trainer = trainer_of(pl_module)
    if weights is None or trainer is None or not isinstance(trainer.strategy, ModelParallelStrategy):
        return
    plain = _names(pl_module)
    with withheld(pl_module):
        renamed = dict(zip(plain, _names(pl_module), strict=True))
    marked = {name for name in weights if name.endswith(MARK)}  # the names say it already
    checkpoint["state_dict"] = {renamed.get(name, name): weights[name] for name in weights if name not in marked}


def _names(module: nn.Module) -> list[str]:
    tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return [name for name, _ in tensors]


def reshard(pl_module: LightningModule) -> None:
    """Make the module's parameters the objects that the optimizers hold.

    After a forward pass without a backward pass, FSDP2 leaves the gathered weights in their places.
    """
    for module in pl_module.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _read_notes(path: Path, weights_only: bool | None) -> Mapping[str, Any]:
    """A checkpoint without its weights; those of a single file are mapped, not read."""
    content: Any = None
    if (path / NOTES_FILE).is_file() or (path / INDEX_FILE).is_file():
        content = read_notes(path, weights_only=weights_only)
    elif path.is_file():
        content = read_checkpoint(path, mmap=zipfile.is_zipfile(path), weights_only=weights_only is not False)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"ckpt_path={str(path)!r}: it is neither a checkpoint file nor a folder of shards with a {NOTES_FILE}."
        )
    return content


def _check_loadable(noted: Mapping[str, Any], transformer: Any) -> None:
    """Refuse a checkpoint whose structure the model cannot take once its weights are sharded."""
    structure = noted.get(CHECKPOINT_KEY) or {}
    if structure.get("quantized"):
        raise CheckpointError(
            "The checkpoint's weights are quantized, and ModelParallelStrategy cannot shard them. Load it in one "
            "process."
        )
    found, present = structure.get("adapters"), lora_settings(transformer)
    if found == present:
        return
    raise CheckpointError(
        f"The checkpoint {'has no adapters' if found is None else 'has LoRA adapters'}, and this run "
        f"{'has none' if present is None else 'has adapters of other settings'}. Under ModelParallelStrategy adapters "
        "cannot change once the weights are sharded. List the LoRARecovery of the interrupted run, or none if it had "
        "none."
    )
