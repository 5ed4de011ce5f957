"""The numbered folder of a run. Two runs that start together get two folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only


def claim_version(root: Path) -> int:
    """Create the next ``version_N`` in a folder and return N.

    The creation is the claim: it fails if another run was faster, and then the number after it is tried.
    """
    root.mkdir(parents=True, exist_ok=True)
    number = next_version(root)
    while True:
        try:
            (root / f"version_{number}").mkdir()
        except FileExistsError:
            number += 1
        else:
            return number


def next_version(root: Path) -> int:
    """The number after the highest in a folder. Another run may claim it at any time."""
    taken = [int(path.name.removeprefix("version_")) for path in root.glob("version_*") if path.name[8:].isdigit()]
    return max(taken, default=-1) + 1


class ClaimedFolder:
    """The ``version_N`` of one run, claimed when N is first read: a run that is refused before leaves no folder.

    Only rank 0 claims. ``Trainer.log_dir`` broadcasts rank 0's folder to the other ranks.

    Args:
        root: Folder of all runs.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._number: int | None = None

    @property
    def number(self) -> int:
        """N, always the same on rank 0."""
        if self._number is None:
            if getattr(rank_zero_only, "rank", 0):
                return next_version(self.root)
            self._number = claim_version(self.root)
        return self._number

    def __getstate__(self) -> dict[str, Any]:
        """Claim before a copy is made, so that a spawned process writes to the same folder."""
        return {"root": self.root, "_number": self.number}


class _InClaimedFolder:
    """Of a logger, the version that the run has claimed."""

    def __init__(self, folder: ClaimedFolder) -> None:
        super().__init__(folder.root, name="")  # type: ignore[call-arg]
        self._folder = folder

    @property
    def version(self) -> int:
        """Number of the run."""
        return self._folder.number


class RunCSVLogger(_InClaimedFolder, CSVLogger):
    """A CSVLogger that writes to the claimed folder of a run."""


class RunTensorBoardLogger(_InClaimedFolder, TensorBoardLogger):
    """A TensorBoardLogger that writes to the claimed folder of a run."""
