"""Folders of shards: whole or not at all, refused when torn, and nothing in them runs."""

import errno
import io
import os
import pickle
import shutil
from functools import partial
from pathlib import Path, PosixPath

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.serialization import _get_layout

from layershed.errors import CheckpointError
from layershed.files import checkpoint_shards as shards
from layershed.files.checkpoint_shards import mend, read_notes, read_shards, replacing_shards
from layershed.files.shard_index import read_index

pytestmark = [
    # torch speaks of what it assumes without a process group
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]


class Evil:
    """Touches a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("marker"),)


class Killed(BaseException):
    """In place of SIGKILL: nothing that comes after it is done."""


def weights(value):
    return {"weight": torch.full((3, 5), float(value)), "rates": [value, 0.5]}


def fill(folder, value):
    """As Lightning does it."""
    folder.mkdir(parents=True, exist_ok=True)
    dcp.save({"state_dict": weights(value)}, checkpoint_id=folder)
    torch.save({"global_step": value}, folder / "meta.pt")


def write(path, value):
    with replacing_shards(path, leads=True, wait=lambda: None) as beside:
        fill(beside, value)


def holds(path):
    """The step that is noted, if everything else agrees with it."""
    step = read_notes(path)["global_step"]
    found = {"state_dict": {"weight": torch.zeros(3, 5), "rates": [0, 0.0]}}
    read_shards(path, found)
    assert torch.equal(found["state_dict"]["weight"], weights(step)["weight"])
    assert found["state_dict"]["rates"] == weights(step)["rates"]
    return step


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "runs" / "last.ckpt"
    assert not list(tmp_path.rglob("marker")), "something was run"


def test_shards_written_are_read_back_and_leave_no_other_file(path):
    write(path, 1)
    assert holds(path) == 1
    write(path, 2)
    assert holds(path) == 2
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_shard_folder_replaces_a_checkpoint_file(path):
    path.parent.mkdir()
    path.write_text("a checkpoint of one file")
    write(path, 1)
    assert holds(path) == 1


def test_ranks_that_do_not_lead_fill_shards_and_never_rename(path):
    said = []
    with replacing_shards(path, leads=False, wait=lambda: said.append("waits")) as beside:
        assert said == ["waits"], "the folder of a former try is away by then"
        fill(beside, 1)
    assert len(said) == 3
    assert not path.exists()


@pytest.mark.parametrize("place", ["in a shard", "before meta.pt"])
def test_shards_killed_while_written_leave_the_former_checkpoint(path, place):
    write(path, 1)
    beside = path.with_name(".last.ckpt.partial")
    if place == "in a shard":
        beside.mkdir()
        (beside / "__0_0.distcp").write_bytes(b"half")
    else:
        fill(beside, 2)
        (beside / "meta.pt").unlink()
    mend(path)
    assert holds(path) == 1
    write(path, 3)
    assert holds(path) == 3
    assert os.listdir(path.parent) == ["last.ckpt"]


@pytest.mark.parametrize(("done", "left"), [(0, 1), (1, 2), (2, 2)])
def test_shards_killed_at_a_rename_leave_a_whole_checkpoint(path, done, left, monkeypatch):
    """Those that are done of: the former one aside, the new one in its place, the former one deleted."""
    write(path, 1)
    steps = iter([True] * done)

    def killed(do, found, *args):
        if not next(steps, False):
            raise Killed
        return do(found, *args)

    def replaced():
        with replacing_shards(path, leads=True, wait=lambda: None) as beside:
            fill(beside, 2)
            monkeypatch.setattr(Path, "rename", lambda *paths: killed(os.rename, *paths))
            monkeypatch.setattr(shards, "_delete", partial(killed, shards._delete))

    with pytest.raises(Killed):
        replaced()
    monkeypatch.undo()
    monkeypatch.chdir(path.parent)
    mend(path)
    assert holds(path) == left
    write(path, 3)
    assert holds(path) == 3
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_failed_shard_writing_leaves_only_the_former_checkpoint(path):
    write(path, 1)

    def fail():
        with replacing_shards(path, leads=True, wait=lambda: None) as beside:
            fill(beside, 2)
            raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="defect"):
        fail()
    assert holds(path) == 1
    assert os.listdir(path.parent) == ["last.ckpt"]


@pytest.mark.parametrize("place", [FileSystemWriter, FileSystem])
def test_full_disk_while_writing_shards_is_one_sentence(path, place, monkeypatch):
    """While the shards are written, or their index."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(place, "write_data" if place is FileSystemWriter else "rename", full)
    with pytest.raises(CheckpointError, match=r"\(No space left on device\), and nothing is left of it; make room"):
        write(path, 1)
    monkeypatch.undo()
    write(path, 1)
    monkeypatch.setattr(place, "write_data" if place is FileSystemWriter else "rename", full)
    with pytest.raises(CheckpointError, match=r"\(No space left on device\), and the former one stays as it was"):
        write(path, 2)
    monkeypatch.undo()
    assert holds(path) == 1
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_shard_folder_replaces_a_link_and_not_its_target(path):
    """As ModelCheckpoint(save_last="link") makes it."""
    write(path.with_name("1.ckpt"), 1)
    path.symlink_to("1.ckpt")
    assert holds(path) == 1
    write(path, 2)
    assert (holds(path), holds(path.with_name("1.ckpt"))) == (2, 1)
    assert not path.is_symlink()


TEARS = {
    "has no meta.pt": lambda folder: (folder / "meta.pt").unlink(),
    "has no .metadata": lambda folder: (folder / ".metadata").unlink(),
    r"__0_0\.distcp has 100 of \d+ bytes": lambda folder: os.truncate(folder / "__0_0.distcp", 100),
    r"__0_0\.distcp has 0 of \d+ bytes": lambda folder: (folder / "__0_0.distcp").unlink(),
    r"\.metadata cannot be read": lambda folder: os.truncate(folder / ".metadata", 50),
}


@pytest.mark.parametrize("said", TEARS)
def test_torn_shard_folder_is_refused_naming_the_newest_intact_one(path, said):
    write(path, 3)
    for step in (1, 2):
        write(path.with_name(f"{step}.ckpt"), step)
        os.utime(path.with_name(f"{step}.ckpt"), (step, step))
    TEARS[said](path)
    with pytest.raises(CheckpointError, match=rf"corrupt: .*{said}.*newest intact one beside it is '.*/2\.ckpt'"):
        read_notes(path)
    shutil.rmtree(path.with_name("1.ckpt"))
    TEARS[said](path.with_name("2.ckpt"))
    with pytest.raises(CheckpointError, match="there is no intact one beside it"):
        read_notes(path)


def test_hostile_shard_index_runs_nothing(path):
    write(path, 1)
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"asks for pathlib.*touch.*nothing of it was run"):
        read_notes(path)
    with pytest.raises(CheckpointError, match="nothing of it was run"):
        read_shards(path, {"state_dict": {"weight": torch.zeros(3, 5)}})


def test_hostile_meta_pt_runs_only_with_weights_only_false(path):
    write(path, 1)
    torch.save({"state": Evil()}, path / "meta.pt")
    for asked in (None, True):
        with pytest.raises(CheckpointError, match="Nothing of it was run"):
            read_notes(path, weights_only=asked)
    assert not Path("marker").exists()
    read_notes(path, weights_only=False)
    Path("marker").unlink()


def test_meta_pt_that_holds_no_mapping_is_refused(path):
    write(path, 1)
    torch.save([1], path / "meta.pt")
    with pytest.raises(CheckpointError, match=r"meta\.pt that Lightning did not write"):
        read_notes(path)


@pytest.mark.parametrize("kind", [PosixPath, Metadata, TensorProperties, _MEM_FORMAT_ENCODING, _get_layout])
def test_hostile_shard_index_changes_no_class(path, kind):
    write(path, 1)
    named = pickle.dumps(kind, protocol=0).split(b"p0")[0]
    state = (
        b"(N(Vname\nV../secret.distcp\ndt"  # (None, {"name": "../secret.distcp"}): of the class, not of its __dict__
    )
    (path / ".metadata").write_bytes(named + state + b"b.")
    before = vars(kind).get("name")
    with pytest.raises(CheckpointError, match=r"it would change .*nothing of it was run"):
        read_notes(path)
    assert vars(kind).get("name") is before


def test_hostile_shard_index_changes_no_enum_member(path):
    """Made by a call, so that the pickle could hold the one member that all of torch uses."""
    write(path, 1)
    member = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    named = pickle.dumps(_MEM_FORMAT_ENCODING, protocol=0).split(b"p0")[0]
    (path / ".metadata").write_bytes(named + b"(I0\ntR(dV_value_\nI1\nsb.")
    before = dict(vars(member))
    with pytest.raises(CheckpointError, match=r"it would change .*nothing of it was run"):
        read_notes(path)
    assert vars(member) == before


def test_shard_index_equals_what_torch_reads(path):
    write(path, 1)
    index = pickle.loads((path / ".metadata").read_bytes())
    found = read_index(path)
    # torch's reader keeps the path as a path of this system
    assert (found.state_dict_metadata, found.storage_data) == (index.state_dict_metadata, index.storage_data)
    assert (found.planner_data, found.version) == (index.planner_data, index.version)
    assert {type(key) for key in found.storage_data} == {MetadataIndex}
    assert str(found.storage_meta.checkpoint_id) == str(index.storage_meta.checkpoint_id)


def test_hostile_shard_runs_nothing(path):
    """A shard stores other values than tensors as pickles, which torch would run."""
    path.mkdir(parents=True)
    evil = io.BytesIO()
    torch.save(Evil(), evil)
    (path / "__0_0.distcp").write_bytes(evil.getvalue())
    place = _StorageInfo("__0_0.distcp", 0, len(evil.getvalue()))
    index = Metadata({"rates": BytesStorageMetadata()}, {"rates": ("rates",)}, {MetadataIndex("rates"): place})
    (path / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match=r"rates holds more than tensors and plain values\. Nothing of it was"):
        read_shards(path, {"rates": 1.0})
    dcp.load({"rates": 1.0}, checkpoint_id=path)  # torch by itself does run it
    Path("marker").unlink()


def test_shard_index_that_names_a_file_outside_is_refused(path):
    write(path, 1)
    index = pickle.loads((path / ".metadata").read_bytes())
    for place in index.storage_data.values():
        place.relative_path = "../secret.distcp"
    shutil.copy(path / "__0_0.distcp", path.with_name("secret.distcp"))
    (path / ".metadata").write_bytes(pickle.dumps(index))
    for read in (read_notes, lambda folder: read_shards(folder, {"state_dict": {"weight": torch.zeros(3, 5)}})):
        with pytest.raises(CheckpointError, match=r"names '\.\./secret\.distcp', which is outside the folder"):
            read(path)


@pytest.mark.parametrize("name", [7, "", ".."])
def test_shard_index_with_a_name_of_no_file_is_refused(path, name):
    write(path, 1)
    index = pickle.loads((path / ".metadata").read_bytes())
    next(iter(index.storage_data.values())).relative_path = name
    (path / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="corrupt"):
        read_notes(path)


@pytest.mark.parametrize(
    ("asked", "said"), [({"head": torch.zeros(2)}, "head"), ({"weight": torch.zeros(2, 5)}, "do not fit")]
)
def test_weights_missing_from_shards_are_refused(path, asked, said):
    write(path, 1)
    with pytest.raises(CheckpointError, match=f"do not fit.*{said}|{said}.*"):
        read_shards(path, {"state_dict": asked})
