"""Reading an interrupted epoch again, up to where the run stood: for train loaders that cannot say where that was."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, IterableDataset

from layershed.errors import CheckpointError
from layershed.integration.digest import digest
from layershed.integration.epoch_start import batches_read, loaders_of, notes_of, put_back
from layershed.integration.rng import of_every_rank, random_states


def read_again(noted: Sequence[dict[str, Any]], random: Sequence[dict[str, Any]], trainer: Trainer) -> bool:
    """Begin the interrupted epoch as it began, and read what the checkpoint's run had read of it.

    Args:
        noted: What :func:`note_epoch_start` noted on every rank.
        random: The random states of every rank at the checkpoint.
        trainer: Whose loop has its state and its loaders.

    Returns:
        Whether it could be done.

    Raises:
        CheckpointError: If the loader has fewer batches than were read.
    """
    loop: Any = trainer.fit_loop
    loaders, fetcher, seen = loaders_of(loop), loop._data_fetcher, batches_read(loop) or 0
    epochs = [each["epoch"] for each in noted]
    if not len(random) == len(epochs) == trainer.world_size or None in epochs or not _begins_anew(fetcher, loaders):
        return False
    epoch = epochs[trainer.global_rank]
    for loader in loaders:
        _set_sampler_epoch(loader, loop.epoch_progress.current.processed)
    if not epoch["kept"]:
        loop._combined_loader.reset()  # worker processes that were kept would not draw a new seed
    put_back(epoch["created"], loaders)
    iter(fetcher)
    put_back(epoch["begun"], loaders)
    notes = notes_of(loop)
    notes.epoch = {name: value for name, value in epoch.items() if name != "last"}
    watched, drawn = notes.watch(fetcher), False
    try:
        same = not seen or digest(next(fetcher)[0]) == epoch.get("first")
        if not all(of_every_rank(same, trainer)):  # other data, or a generator that is not known here
            notes.epoch = {}
            iter(fetcher)
            return False
        if seen > 1:
            drawn = _read(fetcher, seen - 1, epoch.get("ahead"), loaders)
        if "last" not in epoch and not fetcher.batches:
            watched.hold(random[trainer.global_rank])  # the batch that was under way, with nothing drawn since
    except StopIteration:
        raise CheckpointError(
            f"The checkpoint stands after {seen} batches of an epoch, and the train loader now has fewer; resume with "
            "the data and the batch size of the interrupted run."
        ) from None
    rank_zero_info(
        f"The run is resumed after {seen} batches of an epoch, and the train loader cannot say where it stood: "
        "they were read again, and are not trained on. A loader with state_dict and load_state_dict, such as "
        "torchdata's StatefulDataLoader, would not need it."
    )
    other = seen > 0 and "last" in epoch and digest(notes.last) != epoch["last"]
    _tell_what_may_differ(other and (_may_choose(loaders) or not drawn), epoch["kept"])
    fetcher.fetched -= seen  # Lightning adds them as the epoch goes on
    _silence_lightning(loop.epoch_loop)
    return True


def _read(fetcher: Any, count: int, ahead: Any, loaders: list[Any]) -> bool:
    """Draw so many batches; whether they drew random numbers, which may be others than in the interrupted run."""
    before = random_states()
    for _ in range(count - bool(ahead)):
        next(fetcher)
    reached = random_states()
    if ahead:
        put_back(ahead, loaders)
        next(fetcher)
    return any(not _equal(before[name], reached[name]) for name in ("python", "numpy", "torch"))


def _tell_what_may_differ(other: bool, kept: bool) -> None:
    if other:
        rank_zero_warn(
            "The last batch before the checkpoint is another one than in the interrupted run, and those to come may be "
            "others, too: the train loader draws from the global random number generators as it goes, by turns with "
            "the model, or the data have changed; give it a generator of its own (an attribute generator of the "
            "loader or its sampler), or state_dict and load_state_dict."
        )
    if kept:
        rank_zero_info(
            "The worker processes are new (persistent_workers=True keeps them over epochs): random numbers that the "
            "dataset draws in them may be others than in the interrupted run."
        )


def _begins_anew(fetcher: Any, loaders: list[Any]) -> bool:
    """Whether a new iterator gives the first batch again."""
    if not isinstance(fetcher, _PrefetchDataFetcher) or any(isinstance(loader, _Stateful) for loader in loaders):
        return False
    sources = (each for loader in loaders for each in (loader, getattr(loader, "dataset", None)))
    return not any(isinstance(source, Iterator) for source in sources)


def _may_choose(loaders: list[Any]) -> bool:
    """Whether what is drawn as it goes may decide what comes next.

    A sampler of torch's or Lightning's draws its order with the first batch: what is drawn later is the items' own.
    Of several loaders the shorter ones begin again.
    """
    batching = [getattr(loader, "batch_sampler", None) for loader in loaders]
    samplers = [*batching, *(getattr(each, "sampler", None) for each in (*loaders, *batching))]
    origins = {type(sampler).__module__.split(".")[0] for sampler in samplers if sampler is not None}
    foreign = not all(isinstance(loader, DataLoader) for loader in loaders)
    iterable = any(isinstance(getattr(loader, "dataset", None), IterableDataset) for loader in loaders)
    return foreign or iterable or len(loaders) > 1 or not origins <= {"torch", "lightning"}


def _silence_lightning(loop: Any) -> None:
    """Have Lightning not say, once, that the loader is not resumable."""

    def reset() -> None:
        vars(loop).pop("reset", None)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
            type(loop).reset(loop)

    vars(loop)["reset"] = reset


def _equal(left: Any, right: Any) -> bool:
    return torch.equal(left, right.cpu()) if isinstance(left, torch.Tensor) else bool(left == right)
