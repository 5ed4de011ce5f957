"""Finds the checkpoint that ``--ckpt_path last`` or ``best`` means.

Every run has its own folder, so it looks in former runs.
"""

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
from layershed.files.run_config import named_entries


def resolve_last(command: str, trainer: Any, word: str = "last", *, below: bool = False) -> Path | None:
    """Find the newest intact checkpoint of the newest run that has one.

    Args:
        command: Name of the command.
        trainer: Config of its Trainer: default_root_dir, logger and callbacks.
        word: ``"last"`` takes any checkpoint; ``"best"`` takes only ``best.ckpt``, which BestCheckpoint writes.
        below: Whether to look in the folders of default_root_dir, too, as a command line without a config does: the
            configs keep their runs there.

    Returns:
        Path of the checkpoint. None for ``fit`` if there is no checkpoint yet; a printed line says so.

    Raises:
        CheckpointError: If every checkpoint is corrupt or unreadable. For commands other than ``fit``, also if there is
            no checkpoint.
    """
    root = Path(trainer.get("default_root_dir") or "runs")
    verdicts: dict[Path, str] = {}
    for path, barred in _candidates(root, trainer, _places_below(root) if below else []):
        if word == "best" and not barred and path.stem != "best":
            continue
        damage = barred or _why_skipped(path)
        if damage is None:
            return path
        if path not in verdicts:
            unread = damage.startswith(UNREADABLE)
            verdicts[path] = "cannot be read" if unread else "is corrupt"
            verdict = damage.removeprefix("it ") if unread else f"is corrupt: {damage}"
            what = "folder" if barred else "checkpoint"
            _say(f"note: the {what} {str(path)!r} {verdict}; looking for the one before it")
    if verdicts:
        seen, states = len(verdicts), " or ".join(sorted(set(verdicts.values()), reverse=True))
        mend = "let this user read them, " if "cannot" in states else ""
        raise CheckpointError(
            f"ckpt_path={word!r}: every checkpoint under {str(root)!r} {states} ({seen} of {seen}); {mend}train "
            "without --ckpt_path, or give the path of another."
        )
    if word == "best":
        raise CheckpointError(
            f"ckpt_path='best': no run under {str(root)!r} holds a best.ckpt; list BestCheckpoint among the "
            "callbacks and train, or give last or the path of a checkpoint."
        )
    if command != "fit":
        raise CheckpointError(
            f"ckpt_path='last': there is no checkpoint under {str(root)!r}; train first, or give the path of one."
        )
    _say(f"note: there is no checkpoint under {str(root)!r} yet; training starts from the beginning")
    return None


def _candidates(root: Path, trainer: Any, below: list[Path]) -> Iterator[tuple[Path, str | None]]:
    """Every checkpoint that a run of this config may have written, in the order to try them.

    An unreadable folder is yielded with the reason.
    """
    for folder in _own_folders(trainer):
        yield from _listed(Path(folder), _checkpoints)
    places = [root, *_logged(trainer)]
    for place in sorted([*places, *below], key=_newest, reverse=True) if below else places:
        for run, barred in _listed(place, _runs):
            if barred:
                yield run, barred
            else:
                yield from _listed(run / "checkpoints", _checkpoints)
        yield from _listed(place / "checkpoints", _checkpoints)


def _listed(folder: Path, inside: Callable[[Path], list[Path]]) -> Iterator[tuple[Path, str | None]]:
    try:
        os.listdir(folder)  # glob reports an unreadable folder as empty
        found = inside(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        yield folder, f"{UNREADABLE} ({error.strerror or error})"
        return
    yield from ((path, None) for path in found)


def _places_below(root: Path) -> list[Path]:
    """The folders in a folder that hold runs."""
    return sorted({run.parent for run in root.glob("*/version_*") if run.is_dir()})


def _newest(place: Path) -> int:
    """When the newest checkpoint of a place was written."""
    found = [*place.glob("version_*/checkpoints/*.ckpt"), *place.glob("checkpoints/*.ckpt")]
    return max((os.lstat(path).st_mtime_ns for path in found), default=0)


def _runs(place: Path) -> list[Path]:
    """Folders of runs, the newest first."""
    found = [path for path in place.glob("version_*") if path.name[8:].isdigit()]
    return sorted(found, key=lambda run: int(run.name[8:]), reverse=True)


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run: ``last`` first, then the newest. Includes links to files that are gone."""
    ages: dict[Path, int] = {}
    for name in os.listdir(folder):
        path = folder / name
        if path.suffix == ".ckpt" and not os.path.isdir(path):
            with suppress(FileNotFoundError):  # deleted since it was listed
                ages[path] = os.lstat(path).st_mtime_ns  # raises where Path.is_file may return False
    return sorted(ages, key=lambda path: (bool(re.match(r"last(-v\d+)?$", path.stem)), ages[path]), reverse=True)


def _why_skipped(path: Path) -> str | None:
    try:
        os.stat(path)
    except FileNotFoundError:
        return "its target no longer exists"
    except OSError:  # damage_of reports it
        pass
    return damage_of(path)


def _own_folders(trainer: Any) -> Iterator[str]:
    for callback in _entries(trainer.get("callbacks")):
        if str(callback.get("class_path")).rpartition(".")[2] == "ModelCheckpoint":
            folder = (callback.get("init_args") or {}).get("dirpath")
            if folder is not None:
                yield str(folder)


def _logged(trainer: Any) -> Iterator[Path]:
    """Folder in which the first configured logger keeps its versions."""
    for logger in _entries(trainer.get("logger")):
        settings = logger.get("init_args") or {}
        folder = settings.get("save_dir") or settings.get("root_dir")
        if folder is not None:
            yield Path(folder) / (settings.get("name") or "")
            return


def _entries(value: Any) -> list[Any]:
    """The classes in a config value: by name, one, several or none."""
    return [entry for _, entry in named_entries(value) if hasattr(entry, "get") and entry.get("class_path")]


@rank_zero_only
def _say(line: str) -> None:
    print(line)
