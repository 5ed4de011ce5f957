"""What a checkpoint notes of the parameters that its run unfroze and gave its optimizers, and how it is restored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from layershed.recovery.optimizer_groups import Layout, restore_layout

TRAINED_KEY = "layershed_trained"


def restore_trained(optimizers: Sequence[Optimizer], module: nn.Module, checkpoint: Mapping[str, Any]) -> Any:
    """Unfreeze what the interrupted run unfroze, and give the optimizers its groups; their states are loaded later.

    Args:
        optimizers: The optimizers of the resumed run.
        module: The module whose parameters they hold.
        checkpoint: The checkpoint; its weights are not needed.

    Returns:
        The numbers of groups with which the interrupted run began; None if the checkpoint does not say.
    """
    noted = checkpoint.get(TRAINED_KEY) or {"configured": None, "groups": _former_layout(checkpoint), "unfrozen": []}
    if noted["groups"] is not None:
        restore_layout(optimizers, module, noted["groups"], configured=noted["configured"])
    parameters = dict(module.named_parameters())
    for name in noted["unfrozen"]:
        if name in parameters and parameters[name].is_floating_point():
            parameters[name].requires_grad_(True)
    return noted["configured"]


def _former_layout(checkpoint: Mapping[str, Any]) -> Layout | None:
    """The groups that LoRARecovery saved, if nobody else changed them."""
    states = checkpoint.get("callbacks", {}).values()
    found = [state["layout"] for state in states if isinstance(state, dict) and state.get("layout")]
    return found[0] if found else None
