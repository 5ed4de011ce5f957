"""A drop inside a training run: what the optimizer forgets, and what a Lightning checkpoint says about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from layershed.discovery import find_transformer
from layershed.errors import CheckpointError, PlanError
from layershed.overrides import overridden
from layershed.plan import Drop, DropPlan
from layershed.surgery import bypass, bypassed_sublayers, restore

CHECKPOINT_KEY = "layershed"


def forget_parameters(optimizers: Iterable[Optimizer], transformer: nn.Module) -> None:
    """Take the parameters of bypassed sublayers out of the optimizers, with their state, in place.

    In place, because learning-rate schedulers hold on to the very group objects. Doing it twice changes nothing.

    Args:
        optimizers: The run's optimizers.
        transformer: The model with bypassed sublayers.
    """
    gone = {id(parameter) for module, _ in overridden(transformer) for parameter in module.parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in gone:
                    optimizer.state.pop(parameter, None)
            group["params"][:] = [parameter for parameter in group["params"] if id(parameter) not in gone]


def write_dropped(checkpoint: dict[str, Any], model: nn.Module) -> None:
    """Note in a Lightning checkpoint what is bypassed, as plain primitives.

    Args:
        checkpoint: The checkpoint that is being written.
        model: The module that holds the transformer.
    """
    drops = tuple(Drop(sublayer) for sublayer in bypassed_sublayers(model))
    if drops:
        checkpoint[CHECKPOINT_KEY] = DropPlan(drops).to_dict()


def apply_dropped(checkpoint: Mapping[str, Any], model: nn.Module, *, name: str | None = None) -> None:
    """Bring the model into the state that a checkpoint notes: the same sublayers bypassed, and no others.

    Args:
        checkpoint: A checkpoint that :func:`write_dropped` has seen, or any other.
        model: The module that holds the transformer.
        name: Path of the transformer inside it, needed where it holds more than one.

    Raises:
        CheckpointError: If the checkpoint drops what this model does not have.
    """
    content = checkpoint.get(CHECKPOINT_KEY)
    try:
        wanted = set(DropPlan.from_dict(content)) if content is not None else set()
        if wanted == set(bypassed_sublayers(model)):
            return
        transformer = find_transformer(model, name=name)
        others = set(bypassed_sublayers(transformer)) - wanted
        if wanted:
            bypass(transformer, wanted)
    except PlanError as error:
        raise CheckpointError(f"The checkpoint's dropped sublayers do not fit this model: {error}") from None
    if others:
        restore(transformer, others)
