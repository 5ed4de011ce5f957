"""Checkpoint files: written whole or not at all; a torn one is refused in one sentence."""

from __future__ import annotations

import errno
import os
import pickle
import zipfile
from collections.abc import Collection, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from layershed.errors import CheckpointError

UNREADABLE = "it cannot be read"


def write_atomically(target: Path, content: Any) -> None:
    """``torch.save``, whole or not at all: the file keeps its former content until the new content is on the disk."""
    # one fixed name: the next write overwrites the partial file of a killed one, and no search for *.ckpt finds it
    beside = target.with_name(f".{target.name}.partial")
    try:
        with beside.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(target.parent)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk, so that they survive a power cut."""
    with suppress(OSError):  # some network file systems, and Windows, cannot sync a folder
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def read_checkpoint(path: Path, **options: Any) -> Any:
    """``torch.load`` for a file that may be torn or untrusted.

    Args:
        path: A local file.
        options: As of ``torch.load``; ``weights_only`` is True unless given.

    Raises:
        CheckpointError: If the file is torn, or only ``weights_only=False`` would load it.
    """
    options = {"map_location": "cpu", "weights_only": True, **options}
    damage = _torn_file(path)
    if damage is None:
        whole = zipfile.is_zipfile(path)
        try:
            return torch.load(path, **options)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # torch and pickle raise errors of many kinds for damaged bytes
            if whole and (not options["weights_only"] or "allocate memory" in str(error)):
                raise  # the file is not at fault
            if "unsupported global" in str(error).lower() or (whole and isinstance(error, pickle.UnpicklingError)):
                raise CheckpointError(
                    f"The checkpoint {str(path)!r} holds more than tensors and plain values. Nothing of it was run. "
                    "Load it with weights_only=False only if you trust its writer."
                ) from error
            damage = "torch did not write it, or a part of it is missing"
    other = next(intact_beside(path), None)
    hint = (
        "and there is no intact one beside it; give another --ckpt_path, or train anew"
        if other is None
        else f"the newest intact one beside it is {str(other)!r}; resume with --ckpt_path {other}"
    )
    verdict = damage.removeprefix("it ") if damage.startswith(UNREADABLE) else f"is corrupt: {damage}"
    raise CheckpointError(f"The checkpoint {str(path)!r} {verdict}, {hint}.")


def check_checkpoint(path: Path, *, resumed: bool = False, **options: Any) -> None:
    """Refuse a checkpoint that cannot be resumed from or evaluated; call it before anything is built.

    Args:
        path: The checkpoint.
        resumed: Whether a run will resume from it, which takes more than weights.
        options: As of :func:`read_checkpoint`.

    Raises:
        CheckpointError: If the file is missing, torn, or not written by Lightning.
    """
    refuse_folder(path)
    if not path.is_file():
        raise CheckpointError(f"ckpt_path={str(path)!r}: there is no such file.")
    # the weights were read once for their checksums; mapping avoids a copy in memory
    content = read_checkpoint(path, mmap=zipfile.is_zipfile(path), **options)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(f"ckpt_path={str(path)!r}: it is not a checkpoint that Lightning wrote.")
    if not isinstance(content.get("hyper_parameters", {}), dict):
        raise CheckpointError(f"ckpt_path={str(path)!r}: its hyper_parameters are no mapping.")
    if resumed and "optimizer_states" not in content:
        raise CheckpointError(
            f"ckpt_path={str(path)!r}: it holds the weights alone (save_weights_only), so no run can resume from it. "
            "Give another one, or validate it."
        )


def read_options(path: Path, known: Collection[str]) -> dict[str, Any]:
    """The options of the model that a checkpoint records.

    Raises:
        CheckpointError: If one is unknown: it may name any class to import.
    """
    noted = read_checkpoint(path, mmap=zipfile.is_zipfile(path)).get("hyper_parameters", {})
    options = {name: value for name, value in noted.items() if name != "_instantiator"}
    if strangers := sorted(set(map(str, options)) - set(known)):
        raise CheckpointError(f"ckpt_path={str(path)!r}: its model has the unknown option {strangers[0]!r}.")
    return options


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it can be resumed from."""
    damage = _torn_file(path)
    if damage is not None:
        return damage
    try:
        check_checkpoint(path)
    except CheckpointError:
        return "it is not a whole checkpoint of Lightning's"
    return None


def intact_beside(path: Path) -> Iterator[Path]:
    """The other checkpoints in its folder that can be resumed from, the newest first."""
    others = (other for other in newest_first(path.parent) if not other.samefile(path))
    # damaged ones are skipped without an error, or each error would name the others in turn
    return (other for other in others if _torn_file(other) is None and zipfile.is_zipfile(other))


def newest_first(folder: Path) -> list[Path]:
    """The checkpoint files of a folder."""
    files = [path for path in folder.glob("*.ckpt") if path.is_file()]
    return sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def system_error(error: BaseException | None) -> OSError | None:
    """The operating system's error inside another: torch raises its own while it closes a file on a full disk."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def unwritten(path: Path, reason: OSError) -> CheckpointError:
    """The error of a checkpoint that cannot be written: no room, or no permission."""
    before = "the former one stays as it was" if path.exists() else "nothing is left of it"
    return CheckpointError(
        f"The checkpoint {str(path)!r} could not be written ({reason.strerror or reason}), and {before}; make room "
        "or give another folder, and resume."
    )


def local_path(path: str | Path) -> Path | None:
    """A path on this machine, also as a ``file://`` URL; None for anything else."""
    system, name = url_to_fs(str(path))
    return Path(name) if isinstance(system, LocalFileSystem) else None


def refuse_folder(path: Path) -> None:
    """Refuse a folder where a checkpoint file is needed.

    Raises:
        CheckpointError: If it is a folder.
    """
    if not path.is_dir():
        return
    advice = "Read a folder of shards under ModelParallelStrategy, or with layershed.load_checkpoint(module, path)."
    inside = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if there := sorted(inside.glob("*.ckpt"), key=lambda file: (file.stem == "last", file.name)):
        advice = f"Give one in it, such as {there[-1]}."
    elif (path / "config.json").is_file():
        advice = f"It holds a saved model: give --model.pretrained {path}."
    raise CheckpointError(f"ckpt_path={str(path)!r}: it is a folder, but a checkpoint file is needed. {advice}")


def _torn_file(path: Path) -> str | None:
    """What is wrong with the bytes of a file, without interpreting them; None if nothing is."""
    try:
        with path.open("rb") as file:  # opened every time: permissions can change while the file does not
            found = os.fstat(file.fileno())
        return _torn_bytes(path.absolute(), found.st_size, found.st_mtime_ns, found.st_ino)
    except OSError as error:
        return f"{UNREADABLE} ({error.strerror or error})"


@lru_cache(maxsize=256)
def _torn_bytes(path: Path, size: int, _mtime_ns: int, _inode: int) -> str | None:
    """Cached, because all bytes are read: once for each version of a file."""
    if size == 0:
        return "it is empty"
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            # the index of a zip file is at its end
            return "it ends in the middle" if file.read(4) == b"PK\x03\x04" else None
        try:
            with zipfile.ZipFile(file) as archive:
                torn = _torn_part(archive)
        except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # that is an offset without a meaning
                raise
            return f"its parts do not fit together ({error})"
    return None if torn is None else f"its part {torn!r} is not what was written"


def _torn_part(archive: zipfile.ZipFile) -> str | None:
    """The first part whose checksum is wrong; torch writes checksums and never reads them."""
    parts = archive.infolist()
    if any(part.CRC for part in parts):
        return archive.testzip()
    # written under torch.serialization.set_crc32_options(False): all checksums are zero
    for part in parts:
        archive.open(part).close()  # fails if the part is not where the index says
    return None
