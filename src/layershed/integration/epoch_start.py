"""How an epoch of a plain train loader began, so that a resumed run can read it again up to where it stood.

A DataLoader without a state draws its order from the random number generators: with worker processes as its iterator
is made, else with the first batch, and anything may have been drawn in between. Both moments are noted, and for a
loader without a length, which Lightning reads one batch ahead, the one before the batch ahead. What the first batch was
and the last one are noted, too: a loader that draws from elsewhere is found out by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher

from layershed.integration.digest import digest
from layershed.integration.rng import of_every_rank, own_generators, random_states, set_random_states

EPOCH_KEY = "layershed_epoch_start"
_NOTES = "_layershed_epoch_start"  # outlives the fit: a checkpoint may be saved behind it
_LOOP, _EPOCH_LOOP = "_load_combined_loader_states", ("on_run_start", "_on_before_fetch")


def watch_epochs(trainer: Trainer) -> None:
    """Note how every epoch of this fit begins; a second call changes nothing."""
    loop: Any = trainer.fit_loop
    if _LOOP in vars(loop):
        return
    notes = vars(loop)[_NOTES] = EpochNotes(loop)
    vars(loop)[_LOOP] = notes.loader_set_up
    vars(loop.epoch_loop).update(zip(_EPOCH_LOOP, (notes.epoch_begins, notes.before_fetch), strict=True))


def leave_epochs(trainer: Trainer) -> None:
    """Give the loops their own methods back."""
    loop: Any = trainer.fit_loop
    vars(loop).pop(_LOOP, None)
    for name in (*_EPOCH_LOOP, "reset"):
        vars(loop.epoch_loop).pop(name, None)


def batches_read(loop: Any) -> int | None:
    """Batches behind the place within an epoch where a run stands; None between two epochs."""
    progress = loop.epoch_loop.batch_progress
    return None if progress.is_last_batch or not progress.current.ready else int(progress.current.processed)


def notes_of(loop: Any) -> EpochNotes:
    """What is noted of a fit loop's epoch; nothing where nobody watches."""
    notes: EpochNotes = vars(loop).get(_NOTES) or EpochNotes(loop)
    return notes


def note_epoch_start(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Note how the epoch began and where the loaders' own generators stand; call it on every rank."""
    loop: Any = trainer.fit_loop
    loaders = loaders_of(loop)
    if all_stateful(loaders):
        return
    notes, progress = notes_of(loop), loop.epoch_loop.batch_progress.current
    epoch = None
    if "begun" in notes.epoch:
        epoch = dict(notes.epoch)
        if progress.ready == progress.processed:  # else a batch is under way
            epoch["last"] = digest(notes.last)
    own = {"epoch": epoch, "generators": _generator_states(loaders)}
    checkpoint[EPOCH_KEY] = of_every_rank(own, trainer)


def set_own_generators(noted: Sequence[dict[str, Any]], trainer: Trainer) -> None:
    """Put the loaders' own generators where the checkpoint's stood."""
    if len(noted) == trainer.world_size:
        _set_generators(noted[trainer.global_rank]["generators"], loaders_of(trainer.fit_loop))


class EpochNotes:
    """What stands in place of three methods of a fit's loops, and what it noted of the epoch.

    Args:
        loop: Lightning's fit loop.
    """

    def __init__(self, loop: Any) -> None:
        self.loop = loop
        self.epoch: dict[str, Any] = {}
        self.last: Any = None

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
            if isinstance(fetcher, _PrefetchDataFetcher) and not all_stateful(loaders_of(self.loop)):
                self.watch(fetcher)

    def before_fetch(self) -> None:
        """Of the epoch loop."""
        loop = self.loop.epoch_loop
        if self.loop._data_fetcher.length is None and not all_stateful(loaders_of(self.loop)):
            self.epoch["ahead"] = self._states()
        type(loop)._on_before_fetch(loop)

    def watch(self, fetcher: Any) -> _Watched:
        """Note which batches a fetcher reads, of which it may hold the first already."""
        fetcher.iterator = watched = _Watched(fetcher.iterator, self)
        for batch, *_ in fetcher.batches:
            self.read(batch)
        return watched

    def read(self, batch: Any) -> None:
        """A batch was read."""
        self.last = batch
        if "first" not in self.epoch:
            self.epoch["first"] = digest(batch)

    def _about_to_create(self) -> dict[str, Any]:
        kept = any(getattr(loader, "_iterator", None) is not None for loader in loaders_of(self.loop))
        return {"created": self._states(), "kept": kept}

    def _states(self) -> dict[str, Any]:
        return {"random": random_states(), "generators": _generator_states(loaders_of(self.loop))}


class _Watched:
    """Stands in place of a fetcher's iterator for an epoch.

    Args:
        iterator: The fetcher's own.
        notes: Who is told of every batch.
    """

    def __init__(self, iterator: Any, notes: EpochNotes) -> None:
        self.iterator, self.notes = iterator, notes
        self.held: list[tuple[Any, dict[str, Any]]] = []

    def __next__(self) -> Any:
        if self.held:
            found, random = self.held.pop()
            set_random_states(random)
            return found
        found = next(self.iterator)
        self.notes.read(found[0])
        return found

    def hold(self, random: dict[str, Any]) -> None:
        """Read one, and give it out later, as if the random states were these because of it."""
        self.held.append((next(self), random))


def loaders_of(loop: Any) -> list[Any]:
    """The train loaders."""
    loader = loop._combined_loader
    return [] if loader is None else list(loader.flattened)


def all_stateful(loaders: list[Any]) -> bool:
    """Whether every one of them says where it stands."""
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


def put_back(states: dict[str, Any], loaders: list[Any]) -> None:
    """Have all random number generators be where they were."""
    set_random_states(states["random"])
    _set_generators(states["generators"], loaders)
