"""The index of a folder of shards (``.metadata``), read without running a line of it.

Threat model:

- Anybody may have written the folder: a colleague, a hub, an attacker.
- torch reads the index with a plain ``pickle.load``. A pickle can import any function, call it with any arguments, and
  set attributes of any class that it can name. So the writer of the index can run anything.
- Here the pickle reaches nothing of Python's or torch's but dtypes, which nothing can change. For each name in
  ``_MAKERS`` it gets a class of ours, made for this one read, whose instances only note what the pickle asks for. Any
  other name is an error. When the pickle is read, the notes of known classes become torch's own objects.
- A file name in the index must be the name of a file in the folder, so that no other file is read as a shard.

An attacker can still describe tensors that do not exist, or cost time and memory.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Self

import torch
from torch.distributed.checkpoint import metadata as kinds
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.serialization import _get_layout

from layershed.errors import CheckpointError

INDEX_FILE = ".metadata"
# plain dataclasses: made without a call, and filled with a state
_FILLED = (
    Metadata,
    kinds.BytesStorageMetadata,
    kinds.ChunkStorageMetadata,
    kinds.MetadataIndex,
    kinds.StorageMeta,
    kinds.TensorProperties,
    kinds.TensorStorageMetadata,
    _StorageInfo,
)
_MAKERS: dict[tuple[str, str], Callable[..., Any]] = {
    **{(kind.__module__, kind.__name__): kind for kind in (*_FILLED, kinds._MEM_FORMAT_ENCODING)},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _get_layout,
    **{(module, "PosixPath"): PurePosixPath for module in ("pathlib", "pathlib._local")},
    **{(module, "WindowsPath"): PureWindowsPath for module in ("pathlib", "pathlib._local")},
}


def read_index(folder: Path) -> Metadata:
    """The index that torch wrote into a folder of shards.

    Raises:
        CheckpointError: If the index asks for anything but its own classes, or names a file outside the folder.
        Exception: Of any other kind, if pickle cannot read its bytes.
    """
    with (folder / INDEX_FILE).open("rb") as file:
        index = _made(_Unpickler(file).load(), {})
    if not isinstance(index, Metadata):
        raise CheckpointError("torch did not write it")
    for name in {place.relative_path for place in index.storage_data.values()}:
        if not isinstance(name, str) or os.path.basename(name) != name:
            raise CheckpointError(f"it names {name!r}, which is outside the folder")
    return index


class _Note:
    """One object of a pickle: what its class was called with, and the state that it was filled with."""

    maker: Callable[..., Any]
    args: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *args: Any) -> Self:
        note = super().__new__(cls)
        note.args = args
        return note

    def __setstate__(self, state: Any = None) -> None:
        if not isinstance(self, _Note):  # pickle calls it unbound, with the state alone, to change a class
            raise CheckpointError("it would change a class, and nothing of it was run")
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(kind := vars(torch).get(name), torch.dtype):
            return kind
        if (module, name) not in _MAKERS:
            raise CheckpointError(f"it asks for {module}.{name}, and nothing of it was run")
        return type(name, (_Note,), {"maker": staticmethod(_MAKERS[module, name])})


def _made(found: Any, known: dict[int, Any]) -> Any:
    """What was unpickled, with torch's own objects in place of notes; each is made once, however often it occurs."""
    if id(found) not in known:
        known[id(found)] = _made_anew(found, known)
    return known[id(found)]


def _made_anew(found: Any, known: dict[int, Any]) -> Any:
    if type(found) is dict:
        return {_made(key, known): _made(value, known) for key, value in found.items()}
    if type(found) in (list, tuple):
        return type(found)(_made(value, known) for value in found)
    if not isinstance(found, _Note):
        return found
    args, state = _made(found.args, known), _made(found.state, known)
    if state is None:
        return found.maker(*args)
    if found.maker not in _FILLED:
        raise CheckpointError(f"it would change {found.maker!r}, and nothing of it was run")
    made = object.__new__(found.maker)
    if hasattr(made, "__setstate__"):
        made.__setstate__(state)
    else:
        vars(made).update(state)
    return made
