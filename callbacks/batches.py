"""Batches for calibration and quality, without touching the loaders that training draws from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from layershed.errors import CalibrationError


def calibration_batches(trainer: Trainer, split: str) -> Iterator[Any]:
    """Batches of the train or val split, from its start, in order; each rank its own share.

    Raises:
        CalibrationError: If there is no such loader, or the train loader's data cannot be read a second time.
    """
    if split == "val":
        batches = validation_batches(trainer)
        if batches is None:
            raise CalibrationError("calibrate_on='val': the run has no validation data; use 'running' or 'train'.")
        return batches
    trainer.fit_loop.setup_data()
    return _read_again(trainer, trainer.train_dataloader)


def validation_batches(trainer: Trainer) -> Iterator[Any] | None:
    """Batches of the first validation loader, from its start, or None if the run has none."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    if not trainer.limit_val_batches:
        return None
    loop.setup_data()
    loaders = trainer.val_dataloaders
    loader = loaders[0] if isinstance(loaders, list | tuple) and loaders else loaders
    return None if not loader else _isolated(loader)


def _read_again(trainer: Trainer, loader: Any) -> Iterator[Any]:
    """A second, sequential reader of a train loader's data: iterating the loader itself would move its position."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        raise CalibrationError(
            "calibrate_on='train' needs a DataLoader over a map-style dataset; use 'running' or 'val'."
        )
    sampler: DistributedSampler[Any] = DistributedSampler(
        loader.dataset, num_replicas=trainer.world_size, rank=trainer.global_rank, shuffle=False
    )
    again = DataLoader(
        loader.dataset, batch_size=loader.batch_size, sampler=sampler, collate_fn=loader.collate_fn, drop_last=True
    )
    return _isolated(again)


def _isolated(loader: Any) -> Iterator[Any]:
    """Iterate without drawing from the random state that training uses."""
    with torch.random.fork_rng(devices=[]):
        iterator = iter(loader)
    yield from iterator
