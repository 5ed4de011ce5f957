"""The state of the random number generators, as plain values that a checkpoint can hold."""

from __future__ import annotations

import random
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed

from layershed.devices import device_random_states, set_device_random_states
from layershed.integration.lightning_private import is_stateful, wrapped_sampler
from layershed.integration.namespaces import Trainer, TrainerStatus

T = TypeVar("T")


def random_states() -> dict[str, Any]:
    """The states of Python, NumPy, torch and every device of the accelerator."""
    state: Any = np.random.get_state(legacy=True)
    _, keys, *rest = state
    return {
        "python": random.getstate(),
        "numpy": [keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        **device_random_states(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """The inverse of :func:`random_states`; with another number of devices, their states stay as they are."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(("MT19937", *states["numpy"]))
    torch.set_rng_state(states["torch"].cpu())
    set_device_random_states(states)


def own_generators(loader: Any) -> list[torch.Generator]:
    """The generators of a loader and its samplers, each once."""
    batching = getattr(loader, "batch_sampler", None)
    samplers = [getattr(each, "sampler", None) for each in (loader, batching)]
    # with several processes, Lightning wraps the samplers
    wrapped = [wrapped_sampler(sampler) for sampler in samplers]
    owners = (loader, batching, *samplers, *wrapped)
    found = (getattr(owner, "generator", None) for owner in owners)
    return list(dict.fromkeys(own for own in found if isinstance(own, torch.Generator)))


def loader_states(loaders: list[Any]) -> list[torch.Tensor]:
    """The states of the generators of loaders that have no state of their own."""
    return [generator.get_state() for generator in _without_state(loaders)]


def set_loader_states(states: list[torch.Tensor], loaders: list[Any]) -> None:
    """The inverse of :func:`loader_states`; loaders of another kind stay as they are."""
    generators = _without_state(loaders)
    if [len(state) for state in states] == [len(generator.get_state()) for generator in generators]:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state.cpu())


def _without_state(loaders: list[Any]) -> list[torch.Generator]:
    return [own for loader in loaders if not is_stateful(loader) for own in own_generators(loader)]


def of_every_rank(own: T, trainer: Trainer) -> list[T]:
    """The values of all ranks of the trainer, in their order; call it on every rank.

    - A trainer of one process does not communicate: an existing process group may have another owner.
    - A rank that saves after an error (ModelCheckpoint's save_on_exception) does not communicate: the other ranks would
      not answer.
    """
    alone = trainer.world_size == 1 or trainer.state.status == TrainerStatus.INTERRUPTED
    if alone or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    every = [own] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, own)
    return every
