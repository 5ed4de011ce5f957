"""Checkpoints on disk: whole or not at all; torn ones and strangers' pickles are refused."""

import errno
import os
import pickle
import resource
import zipfile
from pathlib import Path

import fsspec
import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from layershed.errors import CheckpointError
from layershed.files.checkpoint_file import check_checkpoint, damage_of, intact_beside
from layershed.integration import namespaces
from layershed.integration.checkpoint_io import AtomicCheckpointIO, keep_checkpoints_whole

CONTENT = {"state_dict": {"weight": torch.arange(5000.0)}, "callbacks": {"a": [1, None, "x"]}}


def write(path, content=CONTENT, age=0):
    torch.save(content, path)
    os.utime(path, (10_000 - age, 10_000 - age))
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_torch_reads_an_atomic_checkpoint_unchanged(tmp_path):
    path = tmp_path / "new" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    assert names(path.parent) == ["last.ckpt"]
    stock, own = torch.load(path, weights_only=True), AtomicCheckpointIO().load_checkpoint(f"file://{path}")
    for found in (stock, own):
        assert torch.equal(found["state_dict"]["weight"], CONTENT["state_dict"]["weight"])
        assert found["callbacks"] == CONTENT["callbacks"]
    before = os.umask(0o027)
    try:
        AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640  # as any file that is opened


def test_atomic_checkpoint_syncs_the_file_before_the_rename_and_then_the_folder(tmp_path, monkeypatch):
    path, calls = write(tmp_path / "last.ckpt", {"state_dict": {}}), []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor):
        what = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        # the whole of it: what Python or torch would still hold back is not on the disk
        calls.append(("fsync", what.name, torch.load(what)["callbacks"] if what.is_file() else None))
        fsync(descriptor)

    def noted_replace(source, target):
        calls.append(("replace", Path(source).name, Path(target).name))
        assert torch.load(target) == {"state_dict": {}}
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    AtomicCheckpointIO().save_checkpoint(CONTENT, path)
    assert calls == [
        ("fsync", ".last.ckpt.partial", CONTENT["callbacks"]),
        ("replace", ".last.ckpt.partial", "last.ckpt"),
        ("fsync", tmp_path.name, None),
    ]


def test_full_disk_keeps_the_former_checkpoint_and_raises(tmp_path):
    """The kernel refuses: no file of this process may be longer than 8 KiB."""
    path = write(tmp_path / "last.ckpt", {"state_dict": {"old": torch.ones(3)}})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"could not be written \(File too large\), and the former one"):
            AtomicCheckpointIO().save_checkpoint(CONTENT, path)
        with pytest.raises(CheckpointError, match=r"new.ckpt' could not be written .*nothing is left of it"):
            AtomicCheckpointIO().save_checkpoint(CONTENT, tmp_path / "new.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["last.ckpt"]
    assert torch.load(path)["state_dict"]["old"].sum() == 3


def test_unpicklable_checkpoint_raises_torchs_error_and_leaves_no_file(tmp_path):
    with pytest.raises(AttributeError, match="local object"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "hook": lambda: None}, tmp_path / "last.ckpt")
    assert names(tmp_path) == []


def test_next_write_replaces_the_partial_file_of_a_killed_one(tmp_path):
    (tmp_path / ".last.ckpt.partial").write_bytes(b"half of it")
    callback = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    assert callback._find_last_checkpoints(pl.Trainer(logger=False, callbacks=[callback])) == set()
    AtomicCheckpointIO().save_checkpoint(CONTENT, tmp_path / "last.ckpt")
    assert names(tmp_path) == ["last.ckpt"]


TORN = {
    "empty": (lambda data: b"", "it is empty"),
    "one byte": (lambda data: data[:1], "torch did not write it"),
    "cut in the middle": (lambda data: data[: len(data) // 2], "ends in the middle"),
    "cut before its last byte": (lambda data: data[:-1], "ends in the middle"),
    "zeros after": (lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2), "ends in"),
    "a hole in a tensor": (lambda data: data[:5000] + bytes(512) + data[5512:], "data/0' is not what was written"),
    "another text": (lambda data: b"not a checkpoint", "torch did not write it"),
}


@pytest.mark.parametrize("name", TORN)
def test_torn_checkpoint_is_refused_and_the_newest_intact_file_named(tmp_path, name):
    tear, why = TORN[name]
    path = write(tmp_path / "last.ckpt")
    path.write_bytes(tear(path.read_bytes()))
    for refuse in (AtomicCheckpointIO().load_checkpoint, check_checkpoint):
        with pytest.raises(CheckpointError, match=why) as caught:
            refuse(path)
        assert "there is no intact one beside it" in str(caught.value)
        assert str(caught.value).count(". ") == 0  # one sentence
    write(tmp_path / "step=1.ckpt", age=3)
    newest = write(tmp_path / "step=2.ckpt", age=2)
    (tmp_path / "step=3.ckpt").write_bytes(newest.read_bytes()[:-5])
    for refuse in (AtomicCheckpointIO().load_checkpoint, check_checkpoint):
        with pytest.raises(CheckpointError) as caught:
            refuse(path)
        assert f"the newest intact one beside it is {str(newest)!r}; resume with --ckpt_path {newest}" in str(
            caught.value
        )


def test_torch_itself_loads_a_file_with_a_hole(tmp_path):
    """Why the checksums are looked at."""
    path = write(tmp_path / "last.ckpt")
    path.write_bytes(TORN["a hole in a tensor"][0](path.read_bytes()))
    assert not torch.equal(torch.load(path)["state_dict"]["weight"], CONTENT["state_dict"]["weight"])


class Trap:
    """A pickle that leaves a trace when it is run."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_untrusted_pickle_is_not_run(tmp_path, zipped):
    path, trace = tmp_path / "last.ckpt", tmp_path / "trace"
    torch.save({**CONTENT, "trap": Trap(trace)}, path, _use_new_zipfile_serialization=zipped)
    for refuse in (AtomicCheckpointIO().load_checkpoint, check_checkpoint):
        with pytest.raises(CheckpointError, match=r"Nothing of it was run\. Load it with weights_only=False only if"):
            refuse(path)
    assert not trace.exists()
    AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert trace.exists()  # there was something to fear


def test_atomic_checkpoint_io_replaces_only_lightnings_own():
    class Own(TorchCheckpointIO):
        pass

    def kept(*plugins):
        strategy = pl.Trainer(accelerator="cpu", logger=False, plugins=list(plugins)).strategy
        keep_checkpoints_whole(strategy)
        return strategy.checkpoint_io

    assert type(kept()) is AtomicCheckpointIO
    own = Own()
    assert kept(own) is own
    for plugin, inner in [
        (AsyncCheckpointIO(), AtomicCheckpointIO),
        (AsyncCheckpointIO(TorchCheckpointIO()), AtomicCheckpointIO),
        (AsyncCheckpointIO(own), Own),
    ]:
        assert kept(plugin) is plugin
        assert type(plugin.checkpoint_io) is inner


@pytest.fixture
def checksums():
    """Switches them on and off for what this process writes."""
    yield torch.serialization.set_crc32_options
    torch.serialization.set_crc32_options(True)


@pytest.mark.parametrize("reader", [True, False])
def test_checksums_are_checked_by_the_file_not_by_the_readers_setting(tmp_path, checksums, reader):
    checksums(False)
    path = write(tmp_path / "without.ckpt")
    checksums(True)
    torn = write(tmp_path / "with.ckpt")
    torn.write_bytes(TORN["a hole in a tensor"][0](torn.read_bytes()))
    checksums(reader)
    check_checkpoint(path)
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert torch.equal(loaded["state_dict"]["weight"], CONTENT["state_dict"]["weight"])
    with pytest.raises(CheckpointError, match="data/0' is not what was written"):
        check_checkpoint(torn)
    data = path.read_bytes()
    for damaged in (data[:-1], data[: len(data) // 2], bytes(4) + data[4:]):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is corrupt"):
            check_checkpoint(path)


def test_checksums_are_checked_once_until_the_file_changes(tmp_path, monkeypatch):
    counted, testzip = [], zipfile.ZipFile.testzip
    monkeypatch.setattr(
        zipfile.ZipFile, "testzip", lambda archive: counted.append(archive.filename) or testzip(archive)
    )
    path = write(tmp_path / "last.ckpt")
    assert damage_of(path) is None
    check_checkpoint(path)
    AtomicCheckpointIO().load_checkpoint(path)
    assert counted == [str(path)]
    path.write_bytes(TORN["a hole in a tensor"][0](path.read_bytes()))  # of the same length
    for _ in range(2):
        assert "is not what was written" in damage_of(path)
    assert counted == [str(path)] * 2


def test_unreadable_checkpoint_is_refused_and_loads_once_permitted(tmp_path, monkeypatch):
    path, other = write(tmp_path / "last.ckpt"), write(tmp_path / "step=1.ckpt", age=3)
    check_checkpoint(path)  # what was found then does not speak for now
    really = Path.open

    def refused(self, *args, **kwargs):  # as for root every file may be read
        if self == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return really(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refused)
        assert damage_of(path) == "it cannot be read (Permission denied)"
        assert next(intact_beside(other), None) is None
        for refuse in (AtomicCheckpointIO().load_checkpoint, check_checkpoint):
            with pytest.raises(
                CheckpointError, match=r"last.ckpt' cannot be read \(Permission denied\).*step=1"
            ) as caught:
                refuse(path)
            assert str(caught.value).count(". ") == 0
    assert damage_of(path) is None


def test_url_checkpoint_is_read_by_lightning_without_running_its_pickle(monkeypatch):
    seen = []
    monkeypatch.setattr("layershed.integration.checkpoint_io._TAKES_WEIGHTS_ONLY", True)
    for each in namespaces.classes(namespaces.TorchCheckpointIO):
        monkeypatch.setattr(each, "load_checkpoint", lambda self, *words: seen.append(words))
    AtomicCheckpointIO().load_checkpoint("memory://somewhere/last.ckpt")
    assert [words[0] for words in seen] == ["memory://somewhere/last.ckpt"]
    assert seen[0][2] is True


def test_url_checkpoint_runs_no_pickle_with_a_lightning_that_always_would(monkeypatch, tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    monkeypatch.setattr("layershed.integration.checkpoint_io._TAKES_WEIGHTS_ONLY", False)
    for content in ({"step": 3}, {"evil": Evil()}):
        with fsspec.open("memory://somewhere/own.ckpt", "wb") as file:
            torch.save(content, file)
        if "step" in content:
            assert AtomicCheckpointIO().load_checkpoint("memory://somewhere/own.ckpt") == content
        else:
            with pytest.raises(pickle.UnpicklingError):
                AtomicCheckpointIO().load_checkpoint("memory://somewhere/own.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("refuse", [AtomicCheckpointIO().load_checkpoint, check_checkpoint])
def test_folder_of_shards_is_refused_as_a_checkpoint_file(refuse, tmp_path):
    with pytest.raises(CheckpointError, match=r"it is a folder.* layershed\.load_checkpoint\("):
        refuse(tmp_path)
