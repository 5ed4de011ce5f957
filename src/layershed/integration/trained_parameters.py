"""What was unfrozen, and added to the optimizers, during a run: saved in its checkpoints, and restored on resuming.

Lightning restores neither the trainable parameters, nor groups that hooks of the module added. Its unfreezing callbacks
(BaseFinetuning) restore groups by the names that the parameters had before LoRA renamed them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from layershed.integration.fsdp_checkpoints import reshard
from layershed.integration.lightning_private import finetuning_groups
from layershed.integration.namespaces import DDPStrategy, LightningModule, ModelParallelStrategy, Trainer
from layershed.integration.preflight import callbacks_of
from layershed.integration.protocols import Refreezes
from layershed.integration.resumed_groups import TRAINED_KEY, restore_trained
from layershed.integration.run import averaged, rewrap, trainable_ids
from layershed.recovery.optimizer_groups import Layout, forget_parameters, layout_of

_LOAD, _STEP = "load_optimizer_state_dict", "training_step"
_LEFT_GATHERED = ("backward", "validation_step")  # where FSDP2 may leave gathered weights in their places


class TrainsWatch:
    """Notices in every step, without a walk over the modules, that other parameters train than in the step before.

    A parameter that nobody knew is noticed when an optimizer gets it.
    """

    def __init__(self) -> None:
        self._parameters: list[nn.Parameter] = []
        self._noted: tuple[object, ...] = ()

    def unchanged(self, trainer: Trainer) -> bool:
        """Whether everything is as it was noted."""
        return self._noted == self._now(trainer)

    def note(self, trainer: Trainer, module: nn.Module) -> None:
        """Note the parameters that a module has now, which of them train, and what the optimizers hold."""
        self._parameters = list(module.parameters())
        self._noted = self._now(trainer)

    def _now(self, trainer: Trainer) -> tuple[object, ...]:
        groups = [group["params"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        held = [id(parameter) for group in groups for parameter in group]
        return id(trainer.strategy.model), [parameter.requires_grad for parameter in self._parameters], held


class TrainedParameters:
    """Follows one fit. It replaces methods of the strategy; :meth:`release` restores them.

    DistributedDataParallel waits for the gradients of what was trainable when it was built, and averages them. It is
    built anew when something else is trainable: with more, the ranks would part in silence, and with less, it would
    wait forever or raise an error.

    FSDP2 leaves gathered weights in the places of frozen parameters. They are taken out before a hook could unfreeze
    them, or add them to an optimizer, instead of the parameters. ShardedCheckpoints restores what was unfrozen.

    Args:
        trainer: The Trainer, when the optimizers are built.
        pl_module: The module that it trains.
        forgets: Whether the optimizers of a resumed run give up dropped parameters; not if they held them from the
            start, because the model was changed by hand.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, *, forgets: bool = True) -> None:
        self.trainer, self.pl_module, self._forgets = trainer, pl_module, forgets
        self._configured = [len(optimizer.param_groups) for optimizer in trainer.optimizers]
        self._held = _names(layout_of(trainer.optimizers, pl_module))
        self._trainable = self._trainable_now()
        replaced: dict[str, Any] = {_LOAD: self.load}
        if isinstance(trainer.strategy, DDPStrategy | ModelParallelStrategy):
            replaced[_STEP] = self.step
        if isinstance(trainer.strategy, ModelParallelStrategy):
            replaced.update({name: partial(self.reshard_after, name) for name in _LEFT_GATHERED})
        self._averaged = trainable_ids(pl_module)
        self._watch = TrainsWatch()
        self._own: dict[str, Any] = {name: getattr(trainer.strategy, name) for name in replaced}
        self._on_instance = {name: vars(trainer.strategy)[name] for name in replaced if name in vars(trainer.strategy)}
        vars(trainer.strategy).update(replaced)

    def follows(self, trainer: Trainer) -> bool:
        """Whether it follows the fit of this Trainer that is under way."""
        return getattr(vars(trainer.strategy).get(_LOAD), "__self__", None) is self

    def release(self) -> None:
        """Restore the strategy's methods. Checkpoints that are saved later are still noted in."""
        own = vars(self.trainer.strategy)
        if self.follows(self.trainer):
            for name in self._own:
                del own[name]
            own.update(self._on_instance)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """``training_step``: after all hooks that may unfreeze, before the forward pass."""
        for callback in callbacks_of(self.trainer):
            if isinstance(callback, Refreezes):
                callback.refreeze()
        if isinstance(self.trainer.strategy, DDPStrategy) and not self._watch.unchanged(self.trainer):
            known = averaged(self.trainer)  # a drop may have built it anew since the last step
            if trainable_ids(self.pl_module) != (self._averaged if known is None else known):
                rewrap(self.trainer, self.pl_module)
            self._watch.note(self.trainer, self.pl_module)
        return self._own[_STEP](*args, **kwargs)

    def reshard_after(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """A method of the strategy, after which the module has the parameters that the optimizers hold."""
        result = self._own[name](*args, **kwargs)
        reshard(self.pl_module)
        return result

    def note(self, checkpoint: dict[str, Any]) -> None:
        """Save what others changed since the run began; nothing if nobody did."""
        if "optimizer_states" not in checkpoint:
            return
        groups = layout_of(self.trainer.optimizers, self.pl_module)
        unfrozen = sorted(self._trainable_now() - self._trainable)
        if unfrozen or _names(groups) - self._held or [len(own) for own in groups] != self._configured:
            checkpoint[TRAINED_KEY] = {"configured": self._configured, "groups": groups, "unfrozen": unfrozen}

    def load(self, checkpoint: dict[str, Any]) -> None:
        """``load_optimizer_state_dict``: after all hooks that set optimizers up, before the states are loaded."""
        configured = restore_trained(self.trainer.optimizers, self.pl_module, checkpoint)
        self._configured = configured or self._configured
        if self._forgets:
            forget_parameters(self.trainer.optimizers, self.pl_module)
        self._own[_LOAD](checkpoint)

    def _trainable_now(self) -> set[str]:
        return {name for name, parameter in self.pl_module.named_parameters() if parameter.requires_grad}


def rename_finetuned(checkpoint: dict[str, Any], pl_module: LightningModule) -> None:
    """Give the parameters that BaseFinetuning lists in a checkpoint the names that they have in the loaded model.

    Lightning would fail on a name that LoRA has changed since.
    """
    now = {name.replace(".base_layer.", "."): name for name, _ in pl_module.named_parameters()}
    for group in finetuning_groups(checkpoint):
        found = (now.get(name.replace(".base_layer.", ".")) for name in group["params"])
        group["params"] = [name for name in found if name is not None]


def _names(layout: Layout) -> set[str]:
    return {name for groups in layout for group in groups for name in group}
