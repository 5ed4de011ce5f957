"""The same callbacks in one run after the other: each run is what it would be by itself."""

import csv
import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from layershed.callbacks import RedundancyMonitor, Report, SpeedMonitor, SublayerDrop
from layershed.files.atomic import write_text
from layershed.integration.checkpoint_io import AtomicCheckpointIO
from layershed.integration.metrics_csv import _keep
from layershed.surgery import bypassed_sublayers
from tests.integration.test_pending_work import stateful
from tests.support.runs import Foreign, Interrupt, Interrupted, Save, fit_foreign, loader, same, val_loader

AT = 4


def callbacks(calibrate_on="running", quality="val_loss", **kwargs):
    settings = {"calibration_batches": 2, "quality_batches": 2, "protect": [-1], "calibrate_on": calibrate_on}
    return [
        RedundancyMonitor(2),
        SublayerDrop(AT, count=3, **{**settings, **kwargs}),
        SpeedMonitor(6, 2, runs=1, quality=quality, quality_mode="min" if quality else None),
        Report(every_n_steps=1),
    ]


def run(make_trainer, own, name, **settings):
    """One of a sweep; everything that its callbacks hold in the end, apart from measured times."""
    module = Foreign(**settings)
    fit_foreign(make_trainer(*own, name=name, max_steps=7, val_check_interval=3), module)
    monitor, drop, speed, report = own
    path = make_trainer(name=name).default_root_dir
    with open(f"{path}/importance.csv", newline="") as file:
        rows = list(csv.reader(file))
    return {
        "weights": dict(module.state_dict()),
        "bypassed": [sublayer.name for sublayer in bypassed_sublayers(module)],
        "drop": {key: value for key, value in drop.state_dict().items() if key != "sums"},
        "latest": monitor._latest,
        "rows": rows,
        "dense": speed._dense_quality,
        "measured": [sublayer.name for sublayer in speed._measured],
        "report": report.state_dict(),
    }


MODELS = [{}, {"num_hidden_layers": 6}, {"num_hidden_layers": 3}]


@pytest.mark.parametrize("calibrate_on", ["running", "val"])
def test_a_sweep_gives_for_every_model_what_it_gives_alone(make_trainer, tmp_path, calibrate_on):
    own = callbacks(calibrate_on)
    for number, model in enumerate(MODELS):
        alone = run(make_trainer, callbacks(calibrate_on), f"alone{number}", **model)
        shared = run(make_trainer, own, f"shared{number}", **model)
        for part in alone:
            assert same(shared[part], alone[part]), part
        last = model.get("num_hidden_layers", 4) - 1
        assert len(shared["bypassed"]) == 3
        assert not {f"attention.{last}", f"mlp.{last}"} & set(shared["bypassed"])


@pytest.mark.parametrize("cut", [2, 5], ids=["before the drop", "behind it"])
def test_a_run_that_broke_off_leaves_nothing_to_the_next(make_trainer, cut):
    own = callbacks(quality=None)
    with pytest.raises(Interrupted):
        fit_foreign(make_trainer(*own, Interrupt(cut), name="cut", max_steps=7, val_check_interval=3))
    alone, shared = (
        run(make_trainer, own, name) for own, name in [(callbacks(quality=None), "alone"), (own, "shared")]
    )
    assert all(same(shared[part], alone[part]) for part in alone)


def test_callbacks_used_before_take_up_a_checkpoint_as_new_ones_do(make_trainer, tmp_path):
    path, used = tmp_path / "at.ckpt", callbacks(quality=None)
    fit_foreign(make_trainer(*used, Save(path, AT + 2), name="first", max_steps=7))
    found = []
    for own, name in [(callbacks(quality=None), "new"), (used, "used")]:
        module = Foreign()
        trainer = make_trainer(*own, name=name, max_steps=8)
        torch.manual_seed(7)
        trainer.fit(module, loader(), val_loader(), ckpt_path=path)
        found.append((dict(module.state_dict()), own[1].plan.to_dict(), own[1].state_dict()["quality"]))
    assert same(*found)


class Stop(Callback):
    """Has the run end early, once."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step == self.step


def test_a_second_fit_of_the_dropped_module_goes_on_with_its_plan(make_trainer):
    """Rounds at 3, 6 and 9, of which the first run makes two: by the same Trainer and by another one."""
    module, stop = Foreign(), Stop(7)
    drop = SublayerDrop(3, count=1, every_n_steps=3, rounds=3, calibration_batches=2, quality_batches=2)
    trainer = make_trainer(drop, stop, max_steps=11)
    with pytest.warns(UserWarning, match="the drop at step 9 never happened"):
        fit_foreign(trainer, module)
    plan, before = drop.plan, drop.quality["before"]
    assert len(plan) == 2
    fit_foreign(trainer, module)
    assert list(drop.plan)[:2] == list(plan)
    assert len(drop.plan) == len(set(drop.plan)) == 3
    assert set(drop.plan) == set(bypassed_sublayers(module))
    assert drop.quality["before"] == before
    fit_foreign(make_trainer(drop, max_steps=10), module)
    assert len(drop.plan) == len(set(drop.plan)) == 6
    assert set(drop.plan) == set(bypassed_sublayers(module))
    assert drop.quality["before"] == before


@pytest.mark.parametrize("own", [RedundancyMonitor, Report, lambda: SpeedMonitor(6, 2, quality=None)])
def test_each_alone_has_checkpoints_written_whole_also_in_another_thread(make_trainer, own):
    for plugins, outer in ([], AtomicCheckpointIO), ([AsyncCheckpointIO()], AsyncCheckpointIO):
        trainer = make_trainer(own(), plugins=plugins, max_steps=1, limit_val_batches=0)
        fit_foreign(trainer)
        writer = trainer.strategy.checkpoint_io
        assert type(writer) is outer
        assert type(getattr(writer, "checkpoint_io", writer)) is AtomicCheckpointIO


# ---- metrics.csv ----


@pytest.fixture
def fit(make_trainer, tmp_path):
    """Trains in a run directory, also in one that is there already, and gives its metrics.csv."""

    def fit(*others, name="run", steps=12, lr=1e-2, ckpt_path=None):
        own = SublayerDrop(5, count=1, calibration_batches=1, quality_batches=1)
        trainer = make_trainer(RedundancyMonitor(2), own, *others, name=name, csv=True, max_steps=steps)
        trainer.fit(Foreign(lr=lr), stateful(), val_loader(), ckpt_path=ckpt_path)
        return (tmp_path / name / "metrics.csv").read_bytes()

    return fit


def train_steps(rows):
    return {int(row["step"]) for row in csv.DictReader(rows.decode().splitlines()) if row["train_loss"]}


def no_link(*_):
    raise OSError("no links here")


def twice(source, target, really=os.link):
    """As NFS does where the first answer was lost: the link is there, and it says that it was there already."""
    really(source, target)
    raise FileExistsError(errno.EEXIST, "File exists", str(target))


@pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:'set_vital' is deprecated")
@pytest.mark.parametrize(("at", "link"), [(3, os.link), (6, os.link), (8, no_link), (8, twice)])
def test_a_run_resumed_in_its_own_directory_keeps_its_rows(fit, tmp_path, monkeypatch, at, link):
    """Before and behind the drop with its columns; Lightning deletes the file, which held later rows, too."""
    monkeypatch.setattr(os, "link", link)
    path = tmp_path / "at.ckpt"
    whole = fit(name="whole")
    assert train_steps(whole) == set(range(12))
    assert train_steps(fit(Save(path, at), Save(tmp_path / "later.ckpt", 9), steps=10)) == set(range(10))
    for _ in range(2):  # from the same checkpoint once more
        assert fit(ckpt_path=path) == whole
    assert sorted(file.name for file in (tmp_path / "run").glob(".*")) == [".metrics.csv.kept"]


@pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:'set_vital' is deprecated")
@pytest.mark.filterwarnings("ignore:RedundancyMonitor. neither .* holds what was measured before")
def test_rows_that_are_lost_or_of_another_run_are_told_of(fit, tmp_path):
    path = tmp_path / "at.ckpt"
    fit(Save(path, 6), steps=8)
    assert train_steps(fit(name="other", ckpt_path=path)) == set(range(5, 12))  # every warning is an error here
    lost = r"CSVLogger deleted '.*metrics.csv' .* the rows before step 6; resume with"
    (tmp_path / "run" / ".metrics.csv.kept").unlink()
    with pytest.warns(UserWarning, match=lost):
        assert train_steps(fit(ckpt_path=path)) == set(range(5, 12))
    fit(Save(tmp_path / "later.ckpt", 9), lr=1e-3)
    with pytest.warns(UserWarning, match=lost):
        assert train_steps(fit(ckpt_path=path)) == set(range(5, 12))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_trainer_that_goes_back_to_a_checkpoint_has_no_row_twice(make_trainer, tmp_path, fit):
    whole, path = fit(name="whole"), tmp_path / "at.ckpt"
    own = SublayerDrop(5, count=1, calibration_batches=1, quality_batches=1)
    trainer = make_trainer(RedundancyMonitor(2), own, Save(path, 6), name="run", csv=True, max_steps=12)
    for ckpt_path in (None, path):
        trainer.fit(Foreign(), stateful(), val_loader(), ckpt_path=ckpt_path)
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == whole


class LogsEarly(Foreign):
    """Its logger has written a row before anybody is asked for the rows of before."""

    def setup(self, stage):
        self.logger.log_metrics({"early": 1.0}, step=0)
        self.logger.save()


@pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:'set_vital' is deprecated")
def test_a_row_that_is_there_already_stays_behind_those_of_before(make_trainer, tmp_path):
    path = tmp_path / "at.ckpt"
    for more, ckpt_path in (([Save(path, 6)], None), ([], path)):
        watch = RedundancyMonitor(2)
        trainer = make_trainer(watch, *more, name="run", csv=True, max_steps=8 if more else 12)
        trainer.fit(LogsEarly(), stateful(), val_loader(), ckpt_path=ckpt_path)
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows if row["train_loss"]] == list(range(12))
    assert len([row for row in rows if row["early"]]) == 2


MOVES = {
    "copied": lambda old, new: shutil.copytree(old, new),
    "moved": lambda old, new: old.rename(new),
    "linked": lambda old, new: new.symlink_to(old),
}


@pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:'set_vital' is deprecated")
@pytest.mark.filterwarnings("ignore:RedundancyMonitor. neither .* holds what was measured before")
@pytest.mark.parametrize("move", MOVES)
def test_so_it_does_in_a_directory_that_was_copied_moved_or_linked(fit, tmp_path, move):
    path = tmp_path / "at.ckpt"
    whole = fit(name="whole")
    fit(Save(path, 6), steps=10)
    MOVES[move](tmp_path / "run", tmp_path / "elsewhere")
    assert fit(name="elsewhere", ckpt_path=path) == whole


@pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:'set_vital' is deprecated")
@pytest.mark.filterwarnings("ignore:RedundancyMonitor. neither .* holds what was measured before")
def test_rows_of_another_run_in_a_copied_directory_are_told_of(fit, tmp_path):
    path = tmp_path / "at.ckpt"
    fit(Save(path, 6), steps=8)
    fit(Save(tmp_path / "later.ckpt", 9), name="other", lr=1e-3)
    shutil.copytree(tmp_path / "other", tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match=r"CSVLogger deleted '.*elsewhere/metrics.csv' .* before step 6; resume with"):
        assert train_steps(fit(name="elsewhere", ckpt_path=path)) == set(range(5, 12))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_file_that_another_run_deletes_meanwhile_ends_no_training(fit, tmp_path, monkeypatch):
    def deleted(source, _target):
        Path(source).unlink()
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", source)

    monkeypatch.setattr(os, "link", deleted)
    path = tmp_path / "at.ckpt"
    with pytest.warns(UserWarning, match=r"rows of '.*metrics.csv' could not be kept .*\(No such file or directory\)"):
        fit(Save(path, 6), steps=8)
    assert torch.load(path)["global_step"] == 6


def test_a_link_that_a_killed_run_left_does_not_empty_what_is_kept(tmp_path, monkeypatch):
    """As it would through a link of the name that the next writer of metrics.csv opens first."""

    def killed(*_, **__):
        raise KeyboardInterrupt

    file, kept = tmp_path / "metrics.csv", tmp_path / ".metrics.csv.kept"
    file.write_text("a,step\n1.5,0\n")
    _keep(file)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: killed() if path.exists() else None)
        with pytest.raises(KeyboardInterrupt):
            _keep(file)
    assert len(list(tmp_path.iterdir())) == 3
    write_text(file, "a,step\n")
    assert (file.read_text(), kept.read_text()) == ("a,step\n", "a,step\n1.5,0\n")
