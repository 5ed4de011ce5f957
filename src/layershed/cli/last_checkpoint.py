"""Which checkpoint ``--ckpt_path last`` means: every run has a folder of its own, and the last run is not this one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from layershed.errors import CheckpointError
from layershed.files.checkpoint_file import UNREADABLE, damage_of


def resolve_last(command: str, trainer: Any) -> Path | None:
    """The newest intact checkpoint of the newest run that has one.

    Args:
        command: Subcommand of the command line.
        trainer: The config of its Trainer: default_root_dir, logger and callbacks.

    Returns:
        Its path; None for ``fit`` where there is no checkpoint yet, which is said in one printed line.

    Raises:
        CheckpointError: For the other commands if there is none, for all if every one of them is damaged, or may not be
            read.
    """
    root = Path(trainer.get("default_root_dir") or "runs")
    verdicts: dict[Path, str] = {}
    for path, barred in _candidates(root, trainer):
        damage = barred or _why_skipped(path)
        if damage is None:
            return path
        if path not in verdicts:
            unread = damage.startswith(UNREADABLE)
            verdicts[path] = "cannot be read" if unread else "is damaged"
            verdict = damage.removeprefix("it ") if unread else f"is damaged: {damage}"
            what = "folder" if barred else "checkpoint"
            _say(f"note: the {what} {str(path)!r} {verdict}; looking for the one before it")
    if verdicts:
        seen, states = len(verdicts), " or ".join(sorted(set(verdicts.values()), reverse=True))
        mend = "let this user read them, " if "cannot" in states else ""
        raise CheckpointError(
            f"ckpt_path='last': every checkpoint under {str(root)!r} {states} ({seen} of {seen}); {mend}train anew "
            "without it, or give the path of another."
        )
    if command != "fit":
        raise CheckpointError(
            f"ckpt_path='last': there is no checkpoint under {str(root)!r}; train first, or give the path of one."
        )
    _say(f"note: starting anew, as there is no checkpoint yet under {str(root)!r}")
    return None


def _candidates(root: Path, trainer: Any) -> Iterator[tuple[Path, str | None]]:
    """Every checkpoint that a run of this config may have left, in the order in which to take them.

    Where a folder may not be read, that folder, and why.
    """
    for folder in _own_folders(trainer):
        yield from _listed(Path(folder), _checkpoints)
    for place in [root, *_logged(trainer)]:
        for run, barred in _listed(place, _runs):
            if barred:
                yield run, barred
            else:
                yield from _listed(run / "checkpoints", _checkpoints)
        yield from _listed(place / "checkpoints", _checkpoints)


def _listed(folder: Path, inside: Callable[[Path], list[Path]]) -> Iterator[tuple[Path, str | None]]:
    try:
        os.listdir(folder)  # of one that may not be read, glob says that it is empty
        found = inside(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        yield folder, f"{UNREADABLE} ({error.strerror or error})"
        return
    yield from ((path, None) for path in found)


def _runs(place: Path) -> list[Path]:
    """The newest first."""
    found = [path for path in place.glob("version_*") if path.name[8:].isdigit()]
    return sorted(found, key=lambda run: int(run.name[8:]), reverse=True)


def _checkpoints(folder: Path) -> list[Path]:
    """The last one of a run comes first, then what else it kept; a link to a file that is gone is one of them, too."""
    ages: dict[Path, int] = {}
    for name in os.listdir(folder):
        path = folder / name
        if path.suffix == ".ckpt" and not os.path.isdir(path):
            with suppress(FileNotFoundError):  # it was there a moment ago
                ages[path] = os.lstat(path).st_mtime_ns  # raises where Path.is_file may say that there is none
    return sorted(ages, key=lambda path: (bool(re.match(r"last(-v\d+)?$", path.stem)), ages[path]), reverse=True)


def _why_skipped(path: Path) -> str | None:
    try:
        os.stat(path)
    except FileNotFoundError:
        return "it leads to a file that is gone"
    except OSError:  # of which damage_of says more
        pass
    return damage_of(path)


def _own_folders(trainer: Any) -> Iterator[str]:
    for callback in _entries(trainer.get("callbacks")):
        if str(callback.get("class_path")).rpartition(".")[2] == "ModelCheckpoint":
            folder = (callback.get("init_args") or {}).get("dirpath")
            if folder is not None:
                yield str(folder)


def _logged(trainer: Any) -> Iterator[Path]:
    """Where the first logger of the config's own keeps its versions."""
    for logger in _entries(trainer.get("logger")):
        settings = logger.get("init_args") or {}
        folder = settings.get("save_dir") or settings.get("root_dir")
        if folder is not None:
            yield Path(folder) / (settings.get("name") or "")
            return


def _entries(value: Any) -> list[Any]:
    """Classes of a config: one, several or none."""
    entries = value if isinstance(value, list) else [value]
    return [entry for entry in entries if hasattr(entry, "get") and entry.get("class_path")]


@rank_zero_only
def _say(line: str) -> None:
    print(line)
