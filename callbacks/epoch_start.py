"""How an epoch of a plain train loader began, so that a resumed run reads it again up to where it stood.

A DataLoader without a state draws its order from the random number generators: with worker processes as its iterator
is made, else with the first batch, and anything may have been drawn in between. Both moments are noted, and for a
loader without a length, which Lightning reads one batch ahead, the one before the batch ahead. What the first batch was
is noted, too: a loader that draws from elsewhere is found out by it.
"""

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
from torch.utils.data import IterableDataset

from layershed.callbacks.digest import digest
from layershed.callbacks.randomness import of_every_rank, own_generators, random_states, set_random_states
from layershed.errors import CheckpointError

EPOCH_KEY = "layershed_epoch_start"
_NOTES = "_layershed_epoch_start"  # outlives the fit: a checkpoint may be saved behind it
_LOOP, _EPOCH_LOOP = "_load_combined_loader_states", ("on_run_start", "_on_before_fetch")


def watch_epochs(trainer: Trainer) -> None:
    """Note how every epoch of this fit begins; a second call changes nothing."""
    loop: Any = trainer.fit_loop
    if _LOOP in vars(loop):
        return
    notes = vars(loop)[_NOTES] = _Notes(loop)
    vars(loop)[_LOOP] = notes.loader_set_up
    vars(loop.epoch_loop).update(zip(_EPOCH_LOOP, (notes.epoch_begins, notes.before_fetch), strict=True))


def leave_epochs(trainer: Trainer) -> None:
    """Give the loops their own methods back."""
    loop: Any = trainer.fit_loop
    vars(loop).pop(_LOOP, None)
    for name in (*_EPOCH_LOOP, "reset"):
        vars(loop.epoch_loop).pop(name, None)


def batches_read(loop: Any) -> int:
    """Batches behind the place within an epoch where a run stands; 0 between two epochs."""
    progress = loop.epoch_loop.batch_progress
    return 0 if progress.is_last_batch else int(progress.current.processed)


def note_epoch_start(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Note how the epoch began and where the loaders' own generators stand; call it on every rank."""
    loop: Any = trainer.fit_loop
    loaders = _loaders(loop)
    if _all_stateful(loaders):
        return
    notes = vars(loop).get(_NOTES)
    within = notes is not None and "begun" in notes.epoch and batches_read(loop)
    own = {"epoch": dict(notes.epoch) if within else None, "generators": _generator_states(loaders)}
    checkpoint[EPOCH_KEY] = of_every_rank(own, trainer)


def set_own_generators(noted: Sequence[dict[str, Any]], trainer: Trainer) -> None:
    """Put the loaders' own generators where the checkpoint's stood."""
    if len(noted) == trainer.world_size:
        _set_generators(noted[trainer.global_rank]["generators"], _loaders(trainer.fit_loop))


def read_again(noted: Sequence[dict[str, Any]], position: dict[str, Any], trainer: Trainer) -> bool:
    """Begin the interrupted epoch as it began, and read what the checkpoint's run had read of it.

    Args:
        noted: What :func:`note_epoch_start` noted on every rank.
        position: The random states at the checkpoint, on this rank.
        trainer: Whose loop has its state and its loaders.

    Returns:
        Whether it could be done.

    Raises:
        CheckpointError: If the loader has fewer batches than were read.
    """
    loop: Any = trainer.fit_loop
    loaders, fetcher, seen = _loaders(loop), loop._data_fetcher, batches_read(loop)
    epochs = [each["epoch"] for each in noted]
    if len(epochs) != trainer.world_size or None in epochs or not _begins_anew(fetcher, loaders):
        return False
    epoch = epochs[trainer.global_rank]
    for loader in loaders:
        _set_sampler_epoch(loader, loop.epoch_progress.current.processed)
    if not epoch["kept"]:
        loop._combined_loader.reset()  # worker processes that were kept would not draw a new seed
    _set(epoch["created"], loaders)
    iter(fetcher)
    _set(epoch["begun"], loaders)
    try:
        same = digest(next(fetcher)[0]) == epoch["first"]
        if not all(of_every_rank(same, trainer)):  # other data, or a generator that is not known here
            iter(fetcher)
            return False
        rank_zero_info(
            f"The run is resumed after {seen} batches of an epoch, and the train loader cannot say where it stood: "
            "they are read again, and not trained on. A loader with state_dict and load_state_dict, such as "
            "torchdata's StatefulDataLoader, would not need it."
        )
        differs = seen > 1 and _read(fetcher, seen - 1, epoch.get("ahead"), position, loaders) and _may_choose(loaders)
    except StopIteration:
        raise CheckpointError(
            f"The checkpoint stands after {seen} batches of an epoch, and the train loader now has fewer; resume with "
            "the data and the batch size of the interrupted run."
        ) from None
    if differs:
        rank_zero_warn(
            "The train loader draws from the global random number generators as it goes, by turns with the model: if "
            "that decides which data come, they are others than in the interrupted run; give it a generator of its "
            "own, or state_dict and load_state_dict."
        )
    fetcher.fetched -= seen  # Lightning adds them as the epoch goes on
    if _NOTES in vars(loop):
        vars(loop)[_NOTES].epoch = dict(epoch)
    _silence_lightning(loop.epoch_loop)
    return True


class _Notes:
    """What stands in place of three methods of a fit's loops, and what it noted of the epoch.

    Args:
        loop: Lightning's fit loop.
    """

    def __init__(self, loop: Any) -> None:
        self.loop = loop
        self.epoch: dict[str, Any] = {}

    def loader_set_up(self) -> None:
        """Of the fit loop, which makes the first iterator right after."""
        type(self.loop)._load_combined_loader_states(self.loop)
        self.epoch = self._about_to_create()

    def epoch_begins(self, fetcher: Any) -> None:
        """Of the epoch loop, which may make an iterator here, and draws from it right after."""
        loop = self.loop.epoch_loop
        created, iterator = self._about_to_create(), fetcher.combined_loader._iterator
        type(loop).on_run_start(loop, fetcher)
        if fetcher.combined_loader._iterator is not iterator:
            self.epoch = created
        if self.epoch and not loop.batch_progress.current.ready:
            self.epoch["begun"] = self._states()
            if isinstance(fetcher, _PrefetchDataFetcher):
                _note_first(fetcher, self.epoch)

    def before_fetch(self) -> None:
        """Of the epoch loop."""
        loop = self.loop.epoch_loop
        if self.loop._data_fetcher.length is None and not _all_stateful(_loaders(self.loop)):
            self.epoch["ahead"] = self._states()
        type(loop)._on_before_fetch(loop)

    def _about_to_create(self) -> dict[str, Any]:
        kept = any(getattr(loader, "_iterator", None) is not None for loader in _loaders(self.loop))
        return {"created": self._states(), "kept": kept}

    def _states(self) -> dict[str, Any]:
        return {"random": random_states(), "generators": _generator_states(_loaders(self.loop))}


def _note_first(fetcher: Any, epoch: dict[str, Any]) -> None:
    """Note which the first batch of an epoch is, which the fetcher may hold already."""
    if fetcher.batches:
        epoch["first"] = digest(fetcher.batches[0][0])
    else:
        fetcher.iterator = _First(fetcher, epoch)


class _First:
    """Stands in place of a fetcher's iterator for one batch."""

    def __init__(self, fetcher: Any, epoch: dict[str, Any]) -> None:
        self.fetcher, self.epoch, self.iterator = fetcher, epoch, fetcher.iterator

    def __next__(self) -> Any:
        self.fetcher.iterator = self.iterator
        found = next(self.iterator)
        self.epoch["first"] = digest(found[0])
        return found


def _read(fetcher: Any, count: int, ahead: Any, position: dict[str, Any], loaders: list[Any]) -> bool:
    """Draw so many batches; whether numbers were drawn for them that may be others than in the interrupted run."""
    before = random_states()
    for _ in range(count - bool(ahead)):
        next(fetcher)
    reached, then = random_states(), ahead["random"] if ahead else position
    if ahead:
        _set(ahead, loaders)
        next(fetcher)
    # a generator that is where it was then has served nobody else, and drew the same
    return any(
        not _equal(before[name], reached[name]) and not _equal(reached[name], then[name])
        for name in ("python", "numpy", "torch")
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
    samplers = [getattr(loader, name, None) for loader in loaders for name in ("sampler", "batch_sampler")]
    origins = {type(sampler).__module__.split(".")[0] for sampler in samplers if sampler is not None}
    iterable = (isinstance(getattr(loader, "dataset", None), IterableDataset) for loader in loaders)
    return len(loaders) > 1 or not origins <= {"torch", "lightning"} or any(iterable)


def _silence_lightning(loop: Any) -> None:
    """Have Lightning not say, once, that the loader is not resumable."""

    def reset() -> None:
        vars(loop).pop("reset", None)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
            type(loop).reset(loop)

    vars(loop)["reset"] = reset


def _loaders(loop: Any) -> list[Any]:
    loader = loop._combined_loader
    return [] if loader is None else list(loader.flattened)


def _all_stateful(loaders: list[Any]) -> bool:
    return all(isinstance(loader, _Stateful) for loader in loaders)


def _generators(loaders: list[Any]) -> list[torch.Generator]:
    return [own for loader in loaders if not isinstance(loader, _Stateful) for own in own_generators(loader)]


def _generator_states(loaders: list[Any]) -> list[torch.Tensor]:
    return [generator.get_state() for generator in _generators(loaders)]


def _set_generators(states: list[torch.Tensor], loaders: list[Any]) -> None:
    # else they are other loaders
    if [len(state) for state in states] == [len(state) for state in _generator_states(loaders)]:
        for generator, state in zip(_generators(loaders), states, strict=True):
            generator.set_state(state.cpu())


def _set(states: dict[str, Any], loaders: list[Any]) -> None:
    set_random_states(states["random"])
    _set_generators(states["generators"], loaders)


def _equal(left: Any, right: Any) -> bool:
    return torch.equal(left, right.cpu()) if isinstance(left, torch.Tensor) else bool(left == right)
