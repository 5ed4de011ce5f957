"""The positions of train loaders on every rank: Lightning saves those of rank 0 for all of them."""

from __future__ import annotations

import pickle
from typing import Any

from layershed.integration.lightning_private import saved_fit_loop
from layershed.integration.namespaces import Trainer
from layershed.integration.rng import of_every_rank

POSITIONS_KEY = "layershed_positions"


def note_positions(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Save in a checkpoint the positions of all ranks, if they differ; call it on every rank of a fit."""
    every = of_every_rank(saved_fit_loop(checkpoint).get("combined_loader"), trainer)
    if len({pickle.dumps(position) for position in every}) > 1:
        checkpoint[POSITIONS_KEY] = every


def take_up_positions(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Let Lightning load the positions of this rank; call it before Lightning loads the loops' state.

    The saved positions are those of as many ranks; with another number, Lightning's own are loaded.
    """
    every = checkpoint.get(POSITIONS_KEY, ())
    if len(every) == trainer.world_size:
        saved_fit_loop(checkpoint)["combined_loader"] = every[trainer.global_rank]
