"""A CheckpointIO for Lightning that writes each checkpoint whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import fsspec
import torch

from layershed.files.checkpoint_file import (
    local_path,
    read_checkpoint,
    refuse_folder,
    system_error,
    unwritten,
    write_atomically,
)
from layershed.integration.lightning_private import replace_wrapped_checkpoint_io, wraps_checkpoint_io
from layershed.integration.namespaces import InheritedCheckpointIO, TorchCheckpointIO, classes

# Lightning before 2.6 always runs the pickle
_TAKES_WEIGHTS_ONLY = "weights_only" in signature(InheritedCheckpointIO.load_checkpoint).parameters


class AtomicCheckpointIO(InheritedCheckpointIO):
    """Writes Lightning's checkpoint files safely in runs that may be killed at any moment.

    - A local file is written beside the file that it replaces, synced to the disk, and renamed. Until then the former
      file stays. Lightning's own writer uses a temporary folder, which may be on another disk, and does not sync.
    - A torn file is refused with an error that names the newest intact file beside it.
    - Lightning itself reads and writes remote files.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; if that fails, the former one stays and no partial file is left.

        Raises:
            CheckpointError: If the disk is full or the folder is not writable.
        """
        target = local_path(path)
        if target is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, checkpoint)
        except (OSError, RuntimeError) as error:
            reason = system_error(error)
            if reason is None:
                raise
            raise unwritten(target, reason) from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, _location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Args:
            path: Its path or URL.
            map_location: Where the tensors go, as in ``torch.load``.
            weights_only: False executes the file's pickle: use it only for files that you trust.

        Raises:
            CheckpointError: If the file is torn or a folder, or needs ``weights_only=False`` to load.
            FileNotFoundError: If the file does not exist.
        """
        weights_only = weights_only is not False  # also for a URL, where Lightning's default would run the pickle
        target = local_path(path)
        if target is not None:
            refuse_folder(target)
        if target is None or not target.is_file():
            if _TAKES_WEIGHTS_ONLY:
                return super().load_checkpoint(path, map_location, weights_only)
            with fsspec.open(str(path), "rb") as file:
                loaded: dict[str, Any] = torch.load(file, map_location=map_location, weights_only=weights_only)
            return loaded
        content: dict[str, Any] = read_checkpoint(target, map_location=map_location, weights_only=weights_only)
        return content


def keep_checkpoints_whole(strategy: Any) -> None:
    """Replace Lightning's own CheckpointIO by :class:`AtomicCheckpointIO`, also inside a plugin that wraps it.

    Args:
        strategy: A Trainer's strategy. A strategy with its own way to write checkpoints stays as it is.
    """
    try:
        current = strategy.checkpoint_io
    except NotImplementedError:
        return
    if type(current) in classes(TorchCheckpointIO):
        strategy.checkpoint_io = AtomicCheckpointIO()
    while wraps_checkpoint_io(current):  # such as AsyncCheckpointIO
        wrapper, current = current, current.checkpoint_io
        if type(current) in classes(TorchCheckpointIO):
            replace_wrapped_checkpoint_io(wrapper, AtomicCheckpointIO())
