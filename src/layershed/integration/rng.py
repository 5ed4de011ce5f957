"""The state of the random number generators, as plain values that a checkpoint can hold."""

from __future__ import annotations

import random
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerStatus

T = TypeVar("T")


def random_states() -> dict[str, Any]:
    """Of Python, NumPy, torch and every CUDA device."""
    state: Any = np.random.get_state(legacy=True)
    _, keys, *rest = state
    return {
        "python": random.getstate(),
        "numpy": [keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """The inverse of :func:`random_states`; with other devices than then, those of the devices stay as they are."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(("MT19937", *states["numpy"]))
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


def own_generators(loader: Any) -> list[torch.Generator]:
    """Those that a loader and its samplers were given, each once."""
    batching = getattr(loader, "batch_sampler", None)
    samplers = [getattr(each, "sampler", None) for each in (loader, batching)]
    # of several processes, Lightning wraps them
    wrapped = [getattr(getattr(sampler, "dataset", None), "_sampler", None) for sampler in samplers]
    owners = (loader, batching, *samplers, *wrapped)
    found = (getattr(owner, "generator", None) for owner in owners)
    return list(dict.fromkeys(own for own in found if isinstance(own, torch.Generator)))


def of_every_rank(own: T, trainer: Trainer) -> list[T]:
    """What every rank of the trainer gives, in their order; call it on every rank.

    A process group may be there that is somebody else's: a trainer of one process asks nobody. Nor does a rank that has
    raised an error, and saves once more (ModelCheckpoint's save_on_exception): the others would not answer.
    """
    alone = trainer.world_size == 1 or trainer.state.status == TrainerStatus.INTERRUPTED
    if alone or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    every = [own] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, own)
    return every
