"""Batches for calibration and quality, without moving the loaders of the training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from layershed.batches import as_inputs, describe
from layershed.errors import CalibrationError
from layershed.integration.lightning_private import set_up_train_loader, set_up_val_loaders
from layershed.integration.namespaces import CombinedLoader, Trainer, isolate_rng, sized_len
from layershed.integration.rng import own_generators


def calibration_batches(trainer: Trainer, split: str) -> Iterator[Any]:
    """Batches of the train or val split, from its start, in order; each rank gets its own share.

    No more than ``limit_train_batches`` or ``limit_val_batches`` lets the run see in an epoch.

    Raises:
        CalibrationError: If the loader is missing, or the train loader's data cannot be read a second time.
    """
    if split == "val":
        batches = validation_batches(trainer)
        if batches is None:
            raise CalibrationError("calibrate_on='val': the run has no validation data. Use 'running' or 'train'.")
        return batches
    set_up_train_loader(trainer)
    return _limited(_read_again(trainer, trainer.train_dataloader), trainer.num_training_batches)


def validation_batches(trainer: Trainer) -> Iterator[Any] | None:
    """Batches of the first validation loader, from its start, or None if the run has none.

    No more than ``limit_val_batches`` lets the run see.
    """
    if not trainer.enable_validation:
        return None
    set_up_val_loaders(trainer)
    # one loader, or a list or a dict of them
    loaders = CombinedLoader(trainer.val_dataloaders).flattened
    if not loaders or sized_len(loaders[0]) == 0:
        return None
    limits = trainer.num_val_batches
    return _limited(_isolated(loaders[0]), limits[0] if isinstance(limits, list) else limits)


def _limited(batches: Iterator[Any], limit: float) -> Iterator[Any]:
    return batches if limit == float("inf") else islice(batches, int(limit))


def check_text(batches: Iterator[Any] | None, instead: str, main: str = "input_ids") -> None:
    """Refuse, before training, batches that are not a model's inputs.

    Args:
        batches: The batches that will be read later, or None.
        instead: The setting that avoids reading them, for the message.
        main: Name of the model's main input.

    Raises:
        CalibrationError: If the first batch does not hold the main input.
    """
    first = None if batches is None else next(batches, None)
    if first is not None and as_inputs(first, main) is None:
        alone = "token ids of shape (batch, tokens)" if main == "input_ids" else f"a tensor of {main}"
        raise CalibrationError(
            f"A batch is {describe(first)}. It is neither a mapping with {main} nor {alone}. Set {instead}."
        )


def _read_again(trainer: Trainer, loader: Any) -> Iterator[Any]:
    """A second, sequential reader of the train loader's data; iterating the loader itself would move its position."""
    # a loader with its own batch sampler has no batch size (Lightning gives torchdata's loader one)
    batching = loader if getattr(loader, "batch_sampler", None) is None else loader.batch_sampler
    size = getattr(batching, "batch_size", None)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or size is None:
        raise CalibrationError(
            "calibrate_on='train' needs a DataLoader over a map-style dataset. Use 'running' or 'val'."
        )
    sampler: DistributedSampler[Any] = DistributedSampler(
        loader.dataset, num_replicas=trainer.world_size, rank=trainer.global_rank, shuffle=False
    )
    again = DataLoader(
        loader.dataset,
        batch_size=size,
        sampler=sampler,
        collate_fn=loader.collate_fn,
        drop_last=getattr(batching, "drop_last", False),
    )
    return _isolated(again)


def _isolated(loader: Any) -> Iterator[Any]:
    """Iterate without moving the random states of training and validation."""
    iterator, end = None, object()
    while True:
        # around every batch: a shuffling sampler draws with the first one, a random transform with each
        with isolate_rng(include_cuda=False), _kept(loader):
            iterator = iter(loader) if iterator is None else iterator
            batch = next(iterator, end)
        if batch is end:
            return
        yield batch


@contextmanager
def _kept(loader: Any) -> Iterator[None]:
    """Restore the states of the loader's own generators."""
    generators = own_generators(loader)
    states = [generator.get_state() for generator in generators]
    yield
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
