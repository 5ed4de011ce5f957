"""Folders of shards, as torch.distributed.checkpoint writes them: whole or not at all, and read without running a line.

Such a folder holds:

- ``*.distcp``: the shards of every rank, tensors beside pickles of everything else,
- ``.metadata``: a pickle that says what is where in them (see :mod:`layershed.files.shard_index`),
- ``meta.pt``: what Lightning adds.

The folder may be untrusted, and torch by itself runs what its pickles ask for. Here the pickles in the shards and in
``meta.pt`` are read with ``weights_only=True``, which knows tensors and plain values. ``read_notes(path,
weights_only=False)`` is the one exception, for ``meta.pt`` alone: the user has said that they trust the writer.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from layershed.errors import CheckpointError
from layershed.files.checkpoint_file import read_checkpoint, sync, system_error, unwritten
from layershed.files.shard_index import INDEX_FILE, read_index

NOTES_FILE = "meta.pt"


@contextmanager
def replacing_shards(path: Path, *, leads: bool, wait: Callable[[], object]) -> Iterator[Path]:
    """Give a folder for every rank to fill. It replaces the given folder at the end; until then the former one stays.

    Args:
        path: The checkpoint, on a file system that all ranks share.
        leads: Whether this rank is the one that renames.
        wait: Returns when every rank has called it.

    Raises:
        CheckpointError: If the disk is full, or nothing can be written there; the former one stays.
    """
    beside, former = _beside(path)
    if leads:
        mend(path)
        for rest in (beside, former):  # of a run that was killed
            _delete(rest)
        path.parent.mkdir(parents=True, exist_ok=True)
    wait()
    try:
        yield beside
    except BaseException as error:
        if leads:
            _delete(beside)
        reason = next(filter(None, map(system_error, _reasons(error))), None)
        if reason is None:
            raise
        raise unwritten(path, reason) from error
    wait()
    if leads:
        sync(beside / NOTES_FILE)  # torch has synced its own
        if os.path.lexists(path):
            path.rename(former)
        beside.rename(path)
        sync(path.parent)
        _delete(former)
    wait()


def mend(path: Path) -> None:
    """Finish a replacement that was interrupted between its two renames: the new folder is whole then."""
    beside, former = _beside(path)
    if not os.path.lexists(path) and os.path.lexists(former):
        (beside if _missing_part(beside) is None else former).rename(path)


def read_notes(path: Path, *, weights_only: bool | None = None) -> Mapping[str, Any]:
    """Read what a folder of shards holds beside weights and optimizer states.

    Args:
        path: The folder.
        weights_only: False runs whatever the pickle in ``meta.pt`` asks for. The other files never run anything.

    Raises:
        CheckpointError: If a part is missing or cut off, or would have to run code.
    """
    damage = _missing_part(path)
    if damage is not None:
        others = sorted(
            (other for other in path.parent.glob("[!.]*/") if other != path and _missing_part(other) is None),
            key=lambda other: other.stat().st_mtime_ns,
        )
        hint = (
            f"the newest intact one beside it is {str(others[-1])!r}" if others else "there is no intact one beside it"
        )
        raise CheckpointError(f"The folder of shards {str(path)!r} is corrupt: {damage}; {hint}.")
    notes = read_checkpoint(path / NOTES_FILE, weights_only=weights_only is not False)
    if not isinstance(notes, Mapping):
        raise CheckpointError(f"The folder of shards {str(path)!r} has a {NOTES_FILE} that Lightning did not write.")
    return notes


def keys_of(path: Path, part: str) -> set[str]:
    """The keys of a part of a checkpoint, such as those of ``state_dict``."""
    return {key for top, key, *_ in read_index(path).planner_data.values() if top == part}


def read_shards(path: Path, state: dict[str, Any], *, alone: bool = False) -> None:
    """Fill a nested state dict in place.

    Args:
        path: The folder.
        state: The tensors and other values to fill, under the names that they were saved with.
        alone: Whether this process reads by itself. Otherwise every rank of the process group must call it.

    Raises:
        CheckpointError: If one is missing from the checkpoint, has another shape, or would have to run code.
    """
    options = {"no_dist": True} if alone and torch.distributed.is_initialized() else {}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
            load(state, storage_reader=_Reader(path), planner=_Planner(), **options)
    except CheckpointException as error:
        reasons = _reasons(error)
        refused = next((reason for reason in reasons if isinstance(reason, CheckpointError)), None)
        if refused is not None:
            raise CheckpointError(f"The folder of shards {str(path)!r}: {refused}") from None
        raise CheckpointError(
            f"The weights in {str(path)!r} do not fit ({reasons[0]}); build the module from the config that it was "
            "trained with, and list the callbacks that the run had."
        ) from error


def _reasons(error: BaseException) -> list[BaseException]:
    """The errors of all ranks."""
    if isinstance(error, CheckpointException):
        return [reason for reason, _ in error.failures.values()]
    return [error] if isinstance(error, Exception) else []


def _beside(path: Path) -> tuple[Path, Path]:
    """Where the new folder is written and where the former one waits; no search for *.ckpt finds either."""
    return path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.former")


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _missing_part(path: Path) -> str | None:
    """What is missing from a folder of shards, judged by the lengths in its index, without reading every byte."""
    for name in (NOTES_FILE, INDEX_FILE):
        if not (path / name).is_file():
            return f"it has no {name}"
    try:
        index = read_index(path)
        ends: dict[str, int] = {}
        for place in index.storage_data.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    except Exception as error:  # unpickling raises errors of many kinds for damaged bytes
        return f"its {INDEX_FILE} cannot be read ({error})"
    for name, end in ends.items():
        size = (path / name).stat().st_size if (path / name).is_file() else 0
        if size < end:
            return f"{name} has {size} of {end} bytes"
    return None


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_index(Path(self.path))


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            content = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{read_item.dest_index.fqn} holds more than tensors and plain values. Nothing of it was run."
            ) from error
        # torch would unpickle untrusted bytes, so it gets a new pickle of their content
        own = io.BytesIO()
        torch.save(content, own)
        own.seek(0)
        super().load_bytes(read_item, own)
