"""What was unfrozen, and added to the optimizers, during a run: saved in its checkpoints, and restored on resuming.

Lightning restores neither the trainable parameters, nor groups that hooks of the module added. Its unfreezing callbacks
(BaseFinetuning) restore groups by the names that the parameters had before LoRA renamed them.
"""

from __future__ import annotations

from typing import Any

from layershed.integration.lightning_private import finetuning_groups
from layershed.integration.namespaces import LightningModule, Trainer
from layershed.recovery.optimizer_groups import Layout, forget_parameters, layout_of, restore_layout

_KEY = "layershed_trained"


class TrainedParameters:
    """Follows one fit. It replaces one method of the strategy; :meth:`release` restores it.

    Args:
        trainer: The Trainer, when the optimizers are built.
        pl_module: The module that it trains.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trainer, self.pl_module = trainer, pl_module
        self._configured = [len(optimizer.param_groups) for optimizer in trainer.optimizers]
        self._held = _names(layout_of(trainer.optimizers, pl_module))
        self._trainable = self._trainable_now()
        self._own: Any = vars(trainer.strategy).get("load_optimizer_state_dict")
        vars(trainer.strategy)["load_optimizer_state_dict"] = self.load

    def follows(self, trainer: Trainer) -> bool:
        """Whether it follows the fit of this Trainer that is under way."""
        return getattr(vars(trainer.strategy).get("load_optimizer_state_dict"), "__self__", None) is self

    def release(self) -> None:
        """Restore the strategy's method. Checkpoints that are saved later are still noted in."""
        own = vars(self.trainer.strategy)
        if self.follows(self.trainer):
            del own["load_optimizer_state_dict"]
            own.update({} if self._own is None else {"load_optimizer_state_dict": self._own})

    def note(self, checkpoint: dict[str, Any]) -> None:
        """Save what others changed since the run began; nothing if nobody did."""
        if "optimizer_states" not in checkpoint:
            return
        groups = layout_of(self.trainer.optimizers, self.pl_module)
        unfrozen = sorted(self._trainable_now() - self._trainable)
        if unfrozen or _names(groups) - self._held or [len(own) for own in groups] != self._configured:
            checkpoint[_KEY] = {"configured": self._configured, "groups": groups, "unfrozen": unfrozen}

    def load(self, checkpoint: dict[str, Any]) -> None:
        """``load_optimizer_state_dict``: after all hooks that set optimizers up, before the states are loaded."""
        noted = checkpoint.get(_KEY) or {"configured": None, "groups": _former_layout(checkpoint), "unfrozen": []}
        if noted["groups"] is not None:
            restore_layout(self.trainer.optimizers, self.pl_module, noted["groups"], configured=noted["configured"])
        self._configured = noted["configured"] or self._configured
        parameters = dict(self.pl_module.named_parameters())
        for name in noted["unfrozen"]:
            if name in parameters and parameters[name].is_floating_point():
                parameters[name].requires_grad_(True)
        forget_parameters(self.trainer.optimizers, self.pl_module)
        load = self._own or type(self.trainer.strategy).load_optimizer_state_dict.__get__(self.trainer.strategy)
        load(checkpoint)

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


def _former_layout(checkpoint: dict[str, Any]) -> Layout | None:
    """The groups of a checkpoint of an earlier version, in which only LoRARecovery saved them."""
    states = checkpoint.get("callbacks", {}).values()
    found = [state["layout"] for state in states if isinstance(state, dict) and state.get("layout")]
    return found[0] if found else None


def _names(layout: Layout) -> set[str]:
    return {name for groups in layout for group in groups for name in group}
