"""``--ckpt_path last``: every run has a folder of its own, and still the last one is found."""

import errno
import os
from pathlib import Path

import pytest
import torch
import yaml

from layershed.callbacks import ExactResume
from layershed.cli.last_checkpoint import resolve_last
from layershed.cli.lightning_cli import LayershedCLI
from layershed.cli.trainer import Trainer
from layershed.errors import CheckpointError
from tests.support.command_line import DATA, DROPPING, FIT, KEEP, TRAINER, callbacks, run

pytestmark = pytest.mark.usefixtures("own_world", "one_parser")


def checkpoint(path, age, whole=True):
    """Write a checkpoint with an age in minutes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {"weight": torch.arange(100.0)}}, path)
    if not whole:
        path.write_bytes(path.read_bytes()[:-100])
    os.utime(path, (1e6 - 60 * age, 1e6 - 60 * age))
    return path


def keeping(folder):
    return {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": str(folder)}}


def logging_to(folder, **settings):
    return {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": folder, **settings}}


def test_last_means_the_last_checkpoint_of_the_newest_run_with_one():
    checkpoint("runs/version_2/checkpoints/last.ckpt", age=1)
    checkpoint("runs/version_10/checkpoints/last.ckpt", age=7)
    wanted = checkpoint("runs/version_10/checkpoints/last-v1.ckpt", age=6)
    checkpoint("runs/version_10/checkpoints/epoch=9.ckpt", age=5)
    checkpoint("runs/version_10/checkpoints/.last.ckpt.partial", age=0)
    Path("runs/version_11").mkdir()
    Path("runs/version_12/checkpoints").mkdir(parents=True)
    checkpoint("runs/version_new/checkpoints/last.ckpt", age=0)
    assert resolve_last("fit", {}) == wanted


def test_newest_checkpoint_is_taken_if_none_is_called_last():
    checkpoint("there/version_0/checkpoints/epoch=1.ckpt", age=3)
    wanted = checkpoint("there/version_0/checkpoints/epoch=2.ckpt", age=2)
    assert resolve_last("fit", {"default_root_dir": "there"}) == wanted


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"callbacks": [keeping("kept")]}, "kept"),
        ({"callbacks": keeping("kept")}, "kept"),
        ({"logger": logging_to("logs", name="mine")}, "logs/mine/version_3/checkpoints"),
        ({"logger": [logging_to("logs", name="")]}, "logs/version_3/checkpoints"),
        ({"logger": False}, "runs/checkpoints"),
    ],
    ids=["listed callback", "single callback", "named logger", "unnamed logger", "no logger"],
)
def test_last_checkpoint_is_found_where_the_config_keeps_it(config, place):
    wanted = checkpoint(f"{place}/last.ckpt", age=1)
    assert resolve_last("fit", config) == wanted


def test_damaged_checkpoint_is_named_and_an_older_one_taken(capsys):
    before = checkpoint("runs/version_0/checkpoints/last.ckpt", age=9)
    assert resolve_last("fit", {}) == before
    assert capsys.readouterr().out == ""
    checkpoint("runs/version_1/checkpoints/last.ckpt", age=1, whole=False)
    wanted = checkpoint("runs/version_1/checkpoints/epoch=2.ckpt", age=2)
    assert resolve_last("test", {}) == wanted
    assert capsys.readouterr().out == (
        "note: the checkpoint 'runs/version_1/checkpoints/last.ckpt' is corrupt: it ends in the middle; "
        "looking for the one before it\n"
    )
    wanted.write_bytes(b"")
    assert resolve_last("fit", {}) == before
    before.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"every checkpoint under 'runs' is corrupt \(3 of 3\)"):
        resolve_last("fit", {})


def test_broken_checkpoint_link_is_named_and_an_older_checkpoint_taken(capsys):
    """``save_last="link"`` writes such links. Otherwise the run would start from the beginning without a word."""
    last = Path("runs/version_0/checkpoints/last.ckpt")
    wanted = checkpoint(last.with_name("epoch=2.ckpt"), age=2)
    last.symlink_to("epoch=3.ckpt")
    assert resolve_last("fit", {}) == wanted
    assert capsys.readouterr().out == (
        f"note: the checkpoint {str(last)!r} is corrupt: its target no longer exists; looking for the one before it\n"
    )
    wanted.unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint under 'runs' is corrupt \(1 of 1\)"):
        resolve_last("fit", {})
    checkpoint(last.with_name("epoch=3.ckpt"), age=1)
    assert resolve_last("fit", {}) == last


@pytest.fixture
def forbidden(monkeypatch):
    """Paths that cannot be read or entered. A fixture, because root can read everything."""
    paths, really = set(), {name: getattr(os, name) for name in ("stat", "listdir", "scandir")}

    def guarded(name):
        def ask(path=".", *args, **kwargs):
            inside = Path(path).parents if name == "stat" else [Path(path), *Path(path).parents]
            if paths & set(inside):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return really[name](path, *args, **kwargs)

        return ask

    def opened(self, *args, **kwargs):
        if self in paths:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return open(self, *args, **kwargs)

    for name in really:
        monkeypatch.setattr(os, name, guarded(name))
    monkeypatch.setattr(Path, "open", opened)
    return paths


@pytest.mark.parametrize("place", ["runs/version_1", "runs/version_1/checkpoints", "kept"])
def test_unreadable_folder_is_named_and_an_older_checkpoint_taken(capsys, forbidden, place):
    wanted = checkpoint("runs/version_0/checkpoints/last.ckpt", age=9)
    checkpoint(f"{place}/checkpoints/last.ckpt" if place[-1] == "1" else f"{place}/last.ckpt", age=1)
    folder = Path(place, "checkpoints") if place[-1] == "1" else Path(place)
    forbidden.add(Path(place))
    config = {"callbacks": keeping("kept")}
    assert resolve_last("fit", config) == wanted
    assert capsys.readouterr().out == (
        f"note: the folder {str(folder)!r} cannot be read (Permission denied); looking for the one before it\n"
    )


def test_listable_folder_with_unreadable_files_is_named_and_skipped(capsys, monkeypatch):
    """From Python 3.14 on, Path.is_file returns False for its files."""
    checkpoint("runs/version_1/checkpoints/last.ckpt", age=1)
    wanted = checkpoint("runs/version_0/checkpoints/last.ckpt", age=9)

    def asked(really):
        def ask(path, *args, **kwargs):
            if "version_1/checkpoints/" in str(path):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return really(path, *args, **kwargs)

        return ask

    for name in ("stat", "lstat"):
        monkeypatch.setattr(os, name, asked(getattr(os, name)))
    monkeypatch.setattr(Path, "is_file", os.path.isfile)
    assert resolve_last("fit", {}) == wanted
    assert capsys.readouterr().out == (
        "note: the folder 'runs/version_1/checkpoints' cannot be read (Permission denied); looking for the one before "
        "it\n"
    )


def test_unreadable_checkpoint_is_not_reported_as_damaged(capsys, forbidden):
    path = checkpoint("runs/version_0/checkpoints/last.ckpt", age=9)
    forbidden.add(path)
    with pytest.raises(CheckpointError) as caught:
        resolve_last("fit", {})
    assert str(caught.value) == (
        "ckpt_path='last': every checkpoint under 'runs' cannot be read (1 of 1); let this user read them, train "
        "without --ckpt_path, or give the path of another."
    )
    assert capsys.readouterr().out == (
        f"note: the checkpoint {str(path)!r} cannot be read (Permission denied); looking for the one before it\n"
    )
    checkpoint("runs/version_0/checkpoints/other.ckpt", age=10, whole=False)
    with pytest.raises(CheckpointError, match=r"under 'runs' is corrupt or cannot be read \(2 of 2\); let this user"):
        resolve_last("fit", {})


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_unreadable_runs_folder_does_not_start_a_new_run(command, capsys, forbidden):
    checkpoint("runs/version_0/checkpoints/last.ckpt", age=9)
    forbidden.add(Path("runs"))
    with pytest.raises(CheckpointError, match="every checkpoint under 'runs' cannot be read"):
        resolve_last(command, {})
    assert "note: the folder 'runs' cannot be read (Permission denied)" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_ckpt_path_inside_an_unreadable_folder_is_an_error(command, capsys, forbidden):
    path = checkpoint("kept/last.ckpt", age=9)
    forbidden.add(Path("kept"))
    assert run([command, *FIT[1:], f"--ckpt_path={path}"]) == 1
    told = capsys.readouterr().err.strip()
    assert told == "error: ckpt_path='kept/last.ckpt' cannot be read (Permission denied); let this user read it."


@pytest.mark.parametrize("command", ["validate", "test", "predict", "benchmark"])
def test_command_other_than_fit_fails_without_a_last_checkpoint(command, capsys):
    assert run([command, *FIT[1:], "--ckpt_path=last"]) == 1
    told = capsys.readouterr().err.strip()
    assert told == "error: ckpt_path='last': there is no checkpoint under 'runs'; train first, or give the path of one."


@pytest.mark.parametrize("command", ["fit", "validate", "benchmark"])
@pytest.mark.parametrize("asked", [["--ckpt_path=last"], ["--ckpt_path", "some.ckpt"]], ids=["last", "path"])
def test_later_config_that_resets_ckpt_path_is_an_error(command, asked, capsys):
    """Such as the config that a run saves. Otherwise the run would start from the beginning."""
    Path("left.yaml").write_text("ckpt_path: null\n")
    assert run([command, *FIT[1:], *asked, "--config=left.yaml"]) == 1
    told = capsys.readouterr().err.strip()
    assert told.endswith("a later --config resets ckpt_path to null. Put --config before --ckpt_path.")
    assert "\n" not in told


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # it has: each run has a directory of its own
def test_requeued_job_resumes_to_the_uninterrupted_weights(capsys):
    """Each start uses the same words, as a cluster script does. The reference is not interrupted."""
    words = [*FIT, "--config=run.yaml", "--ckpt_path=last"]
    # a cosine would be one over four steps and one over six
    config = {"model": {"schedule": "constant"}, **yaml.safe_load(callbacks(DROPPING, KEEP))}
    Path("run.yaml").write_text(yaml.safe_dump(config))
    Path("callbacks.yaml").write_text(callbacks(DROPPING, KEEP))
    assert run([*FIT, "--config=run.yaml", "--trainer.max_steps=6", "--trainer.default_root_dir=whole"]) == 0

    capsys.readouterr()
    assert run([*words, "--trainer.max_steps=4"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert "note: there is no checkpoint under 'runs' yet; training starts from the beginning" in told
    # the folder of a run that was killed before its first checkpoint
    Path("runs/version_1").mkdir()
    assert run([*words, "--trainer.max_steps=6"]) == 0
    assert "starts from the beginning" not in capsys.readouterr().out
    resumed = yaml.safe_load(Path("runs/version_2/config.yaml").read_text())
    assert resumed["ckpt_path"] == "runs/version_0/checkpoints/last.ckpt"
    folders = ("whole/version_0", "runs/version_2")
    ends, resumed = (torch.load(f"{folder}/checkpoints/last.ckpt", weights_only=True) for folder in folders)
    assert resumed["global_step"] == ends["global_step"] == 6
    assert all(torch.equal(weight, resumed["state_dict"][name]) for name, weight in ends["state_dict"].items())
    # the model comes from the checkpoint
    assert run(["validate", *DATA, *TRAINER, "--config=callbacks.yaml", "--ckpt_path=last"]) == 0
    assert "val_loss" in capsys.readouterr().out


LISTED = {"class_path": "layershed.callbacks.ExactResume"}


@pytest.mark.parametrize("entries", [[], [LISTED], [DROPPING]], ids=["no callbacks", "listed", "not listed"])
def test_fit_always_has_exactly_one_exact_resume_callback(entries, monkeypatch):
    seen = []
    monkeypatch.setattr(LayershedCLI, "fit", lambda self, **_: seen.append(self.trainer), False)
    Path("own.yaml").write_text(callbacks(*entries) if entries else "{}")
    assert run([*FIT, "--config=own.yaml", "--trainer.max_steps=4"]) == 0
    assert [type(callback) for callback in seen[0].callbacks].count(ExactResume) == 1


def test_trainer_writes_checkpoints_atomically():
    assert type(Trainer(accelerator="cpu", logger=False).strategy.checkpoint_io).__name__ == "AtomicCheckpointIO"


def test_damaged_checkpoint_error_names_the_intact_checkpoint(capsys):
    torn = checkpoint("kept/last.ckpt", age=1, whole=False)
    checkpoint("kept/step=2.ckpt", age=2)
    assert run([*FIT, f"--ckpt_path={torn}"]) == 1
    told = capsys.readouterr().err.strip()
    assert "'kept/last.ckpt' is corrupt: it ends in the middle" in told
    assert told.endswith("resume with --ckpt_path kept/step=2.ckpt.")
