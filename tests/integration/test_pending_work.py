"""What Lightning leaves out when it resumes: rows, validation, the end of a run, random states; and repeated data."""

import csv
import os
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from layershed.callbacks import LoRARecovery, RedundancyMonitor, SublayerDrop
from layershed.integration.checkpoint_io import AtomicCheckpointIO
from layershed.integration.metrics_csv import keep_rows
from layershed.integration.rng import of_every_rank, random_states, set_random_states
from tests.support.runs import (
    BATCH,
    Foreign,
    Lengthless,
    Manual,
    Watch,
    fit_foreign,
    loader,
    same,
    sequences,
    val_loader,
)

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")

EPOCH = 6  # batches


class Killed(Exception):
    """Stands for SIGKILL: nothing that comes later in the run happens."""


class Kill(pl.Callback):
    """Writes a checkpoint at the end of that step, flushes nothing, and dies right behind it."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            for logger in trainer.loggers:
                logger.finalize = lambda status: None
            raise Killed


class Hooks(pl.Callback):
    """Notes which of the hooks at the ends of things were called, at which step and in which epoch."""

    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        self.seen.append(("validation", trainer.global_step, trainer.current_epoch))

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append(("epoch", trainer.global_step, trainer.current_epoch))

    def on_train_end(self, trainer, pl_module):
        self.seen.append(("train", trainer.global_step, trainer.current_epoch))


def stateful(batches=EPOCH):
    return StatefulDataLoader(sequences(BATCH * batches), batch_size=BATCH)


def rows_of(folder):
    found = {}
    for path in folder.rglob("metrics.csv"):
        for row in csv.DictReader(path.read_text().splitlines()):
            for name, value in row.items():
                if value and name != "step":
                    found.setdefault((row["step"], name), set()).add(value)
    return found


@pytest.fixture
def interrupted(make_trainer, tmp_path):
    """Runs through, is killed right behind the checkpoint of a step, and is resumed; what all three left."""

    def go(step, dropout=0.0, steps=2 * EPOCH, **settings):
        def one(name, *extra, ckpt_path=None):
            hooks = Hooks()
            drop = SublayerDrop(4, count=2, calibration_batches=2, quality_batches=2)
            recovery = [LoRARecovery(rank=2, dropout=dropout)] if dropout else []
            trainer = make_trainer(
                RedundancyMonitor(2), drop, *recovery, hooks, *extra, name=name, max_steps=steps, **settings
            )
            trainer.loggers = [CSVLogger(tmp_path / "logs" / name.split("-")[0], name="")]
            module = Foreign(attention_dropout=dropout)
            torch.manual_seed(7 if ckpt_path is None else 8)  # another process draws other numbers
            try:
                trainer.fit(module, stateful(), val_loader(), ckpt_path=ckpt_path)
            except Killed:
                return None
            return {
                "hooks": hooks.seen,
                "weights": module.state_dict(),
                "quality": drop.state_dict()["quality"],
                "importance": (tmp_path / "logs" / name.split("-")[0]).rglob("importance.csv"),
            }

        path = tmp_path / "cut.ckpt"
        whole = one("whole")
        assert one("cut-1", Kill(path, step)) is None
        resumed = one("cut-2", ckpt_path=path)
        texts = [max(each.pop("importance")).read_text() for each in (whole, resumed)]
        assert texts[0] == texts[1]
        return whole, resumed, rows_of(tmp_path / "logs" / "whole"), rows_of(tmp_path / "logs" / "cut")

    return go


@pytest.mark.parametrize("step", [3, 5, EPOCH, EPOCH + 2, 2 * EPOCH], ids=lambda step: f"step {step}")
def test_nothing_is_lost_behind_a_checkpoint(interrupted, step):
    """In mid-epoch, at the drop, before the validation at the end of an epoch, and behind the last step."""
    whole, resumed, rows, again = interrupted(step)
    assert {(str(s), "train_loss") for s in range(2 * EPOCH)} <= rows.keys()
    assert {(str(s), "val_loss") for s in (EPOCH - 1, 2 * EPOCH - 1)} <= rows.keys()
    assert (str(2 * EPOCH), "drop/loss_end") in rows
    assert again == rows
    assert resumed["quality"] == whole["quality"]
    assert all(torch.equal(weight, whole["weights"][name]) for name, weight in resumed["weights"].items())
    # what had been done before the kill is not done again, and the rest is
    assert resumed["hooks"] == [seen for seen in whole["hooks"] if seen[1] >= step]


def test_a_run_that_ends_within_an_epoch_ends_it_again(interrupted):
    whole, resumed, rows, again = interrupted(EPOCH + 2, steps=EPOCH + 2)
    assert again == rows
    assert resumed["hooks"] == [seen for seen in whole["hooks"] if seen[1] >= EPOCH + 2]
    assert [hook for hook, *_ in resumed["hooks"]] == ["epoch", "train"]


@pytest.mark.parametrize("step", [2, 6])
def test_validation_within_an_epoch_is_made_up_for(interrupted, step):
    whole, resumed, rows, again = interrupted(step, val_check_interval=2)
    assert (str(step - 1), "val_loss") in rows
    assert again == rows
    assert resumed["hooks"] == [seen for seen in whole["hooks"] if seen[1] >= step]


def test_dropout_goes_on_where_it_was(interrupted):
    whole, resumed, rows, again = interrupted(7, dropout=0.2)
    assert again == rows
    assert all(torch.equal(weight, whole["weights"][name]) for name, weight in resumed["weights"].items())


def test_random_states_come_back_from_a_file(tmp_path):
    torch.save(random_states(), tmp_path / "states.pt")
    drawn = [(random.random(), np.random.rand(), torch.rand(()).item(), random.gauss(), np.random.randn())]
    set_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert drawn == [(random.random(), np.random.rand(), torch.rand(()).item(), random.gauss(), np.random.randn())]


def test_a_new_column_never_empties_metrics_csv(tmp_path, monkeypatch):
    """Killed at any write in between, by an error here, the rows are there."""
    logger = CSVLogger(tmp_path, name="", version=0)
    keep_rows(logger)
    logger.log_metrics({"a": 1.5}, step=0)
    logger.save()
    logger.log_metrics({"a": 2.5, "b": 3.5}, step=1)
    path = tmp_path / "version_0" / "metrics.csv"
    before = path.read_text()

    def die(self, *args, **kwargs):
        assert path.read_text() == before
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(Killed):
            logger.save()
    assert path.read_text() == before
    logger.experiment.metrics_keys = ["a", "step"]
    logger.save()
    assert list(csv.DictReader(path.read_text().splitlines())) == [
        {"a": "1.5", "b": "", "step": "0"},
        {"a": "2.5", "b": "3.5", "step": "1"},
    ]


# ---- repeated data ----


def resumed_at(make_trainer, tmp_path, step, train, module=Foreign, **settings):
    """A run that is cut at a step and resumed, each time with a loader of that kind."""
    path, callbacks = tmp_path / "cut.ckpt", lambda: [RedundancyMonitor(2), SublayerDrop(9, count=1, quality_batches=0)]
    with pytest.raises(Killed):
        make_trainer(*callbacks(), Kill(path, step), name="cut", **settings).fit(module(), train(), val_loader())
    make_trainer(*callbacks(), LoRARecovery(), name="again", **settings).fit(
        module(), train(), val_loader(), ckpt_path=path
    )


def lengthless():
    return DataLoader(Lengthless(), batch_size=2)


@pytest.mark.parametrize(
    ("step", "train"), [(4, stateful), (4, loader), (2, lengthless), (EPOCH, loader), (2 * EPOCH, loader)]
)
def test_of_one_that_goes_on_or_of_a_whole_epoch_nothing_is_said(make_trainer, tmp_path, step, train):
    resumed_at(make_trainer, tmp_path, step, train, max_steps=3 * EPOCH)  # every warning is an error here


# ---- between two epochs ----


class Seen(Foreign):
    """Notes what it is trained on, and draws a number where an epoch begins."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_epoch_start(self):
        self.seen.append((self.trainer.global_step, self.trainer.current_epoch, torch.rand(()).item()))

    def training_step(self, batch, batch_idx):
        self.seen.append((self.trainer.global_step, batch_idx, batch["input_ids"].tolist()))
        return super().training_step(batch, batch_idx)


def early_drop():
    return SublayerDrop(2, count=1, calibration_batches=1, quality_batches=0)


NO_VALIDATION = "ignore:You defined a `validation_step` but have no `val_dataloader`"
WRITTEN = {  # by ModelCheckpoint, and which hooks of that step are behind it
    "end of the epoch": ({}, ("validation", "epoch")),
    "end of validation": ({"save_on_train_epoch_end": False}, ("validation",)),
    "last batch": ({"every_n_train_steps": EPOCH}, ()),
}


@pytest.mark.filterwarnings(NO_VALIDATION, "ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("limit", [{"max_steps": -1, "max_epochs": 3}, {"max_steps": 3 * EPOCH}], ids=list)
@pytest.mark.parametrize("kind", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize(
    ("written", "val"),
    [*((where, True) for where in WRITTEN), ("end of the epoch", False), ("last batch", False)],
)
def test_the_epochs_to_come_are_those_that_would_have_come(make_trainer, tmp_path, written, val, kind, limit):
    """Shuffled, all of them, and in another process than the one that wrote the checkpoint."""
    saving, behind = WRITTEN[written]

    def fit(seed, ckpt_path=None):
        torch.manual_seed(seed)
        drop, hooks = SublayerDrop(EPOCH + 2, count=1, calibration_batches=1, quality_batches=0), Hooks()
        keep = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, **saving)
        trainer = make_trainer(drop, hooks, keep, enable_checkpointing=True, csv=True, name=f"of-{seed}", **limit)
        train = kind(sequences(BATCH * EPOCH), batch_size=BATCH, shuffle=True)
        module = Seen()
        trainer.fit(module, train, val_loader() if val else None, ckpt_path=ckpt_path)
        return module, hooks.seen, rows_of(tmp_path / f"of-{seed}")

    whole, hooks, rows = fit(7)
    resumed, hooks_again, rows_again = fit(8, tmp_path / "kept" / f"epoch=0-step={EPOCH}.ckpt")
    assert len({str([seen[2] for seen in whole.seen][start : start + EPOCH]) for start in (1, 8, 15)}) == 3  # orders
    assert resumed.seen == [seen for seen in whole.seen if seen[0] >= EPOCH]
    assert same(resumed.state_dict(), whole.state_dict())
    assert hooks_again == [seen for seen in hooks if seen[1] > EPOCH or (seen[1] == EPOCH and seen[0] not in behind)]
    assert rows_again.items() <= rows.items()
    assert {int(step) for step, name in rows_again if name == "train_loss"} >= set(range(EPOCH, 3 * EPOCH))


@pytest.mark.filterwarnings(NO_VALIDATION)
@pytest.mark.parametrize("limit", [{"max_steps": -1, "max_epochs": 2}, {"max_steps": 2 * EPOCH}], ids=list)
def test_so_is_the_end_of_the_last_epoch(make_trainer, tmp_path, limit):
    def fit(*extra, ckpt_path=None):
        hooks = Hooks()
        make_trainer(early_drop(), hooks, *extra, **limit).fit(Foreign(), stateful(), ckpt_path=ckpt_path)
        return hooks.seen

    path = tmp_path / "cut.ckpt"
    whole = fit()
    with pytest.raises(Killed):
        fit(Kill(path, 2 * EPOCH))
    assert fit(ckpt_path=path) == [seen for seen in whole if seen[1] == 2 * EPOCH]
    assert whole[-2:] == [("epoch", 2 * EPOCH, 1), ("train", 2 * EPOCH, 2)]


class Counting(Foreign):
    """Asks how many steps there will be, which sets the train loader up before the checkpoint is read."""

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches == 2 * EPOCH
        return super().configure_optimizers()


def test_a_loader_that_was_set_up_early_goes_on_where_it_stood(make_trainer, tmp_path):
    def fit(*extra, ckpt_path=None):
        module = Counting()
        trainer = make_trainer(early_drop(), *extra, max_steps=-1, max_epochs=2)
        trainer.fit(module, stateful(), val_loader(), ckpt_path=ckpt_path)
        return module.state_dict()

    path = tmp_path / "cut.ckpt"
    with pytest.raises(Killed):
        fit(Kill(path, 4))
    assert same(fit(ckpt_path=path), fit())


# ---- a fit that fails, and others that share the process ----


class Fails(pl.Callback):
    """Raises in that hook, if told to."""

    def __init__(self, hook):
        self.armed = True
        setattr(self, hook, self.fail)

    def fail(self, *_):
        if self.armed:
            raise Killed


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_sanity_check_start"])
def test_a_trainer_is_as_good_as_new_after_a_resumption_that_failed(make_trainer, tmp_path, hook):
    path, fails = tmp_path / "cut.ckpt", Fails(hook)
    first = make_trainer(early_drop(), max_steps=-1, max_epochs=1)
    first.fit(Foreign(), stateful(), val_loader())
    first.save_checkpoint(path)
    trainer = make_trainer(early_drop(), fails, max_steps=-1, max_epochs=3, num_sanity_val_steps=1)
    with pytest.raises(Killed):
        trainer.fit(Foreign(), stateful(), val_loader(), ckpt_path=path)
    for each in (trainer, trainer.fit_loop):  # no method has anything in its place
        assert not [name for name in vars(each) if callable(getattr(type(each), name, None))]
    fails.armed = False
    trainer.fit(Foreign(), stateful(), val_loader(), ckpt_path=path)
    assert trainer.global_step == 3 * EPOCH


def test_a_trainer_of_one_process_gathers_nothing_in_the_process_group_of_another(make_trainer, tmp_path, monkeypatch):
    def gather(*_):
        raise AssertionError("the others do not come")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    trainer = make_trainer(max_steps=1)
    assert len(of_every_rank(random_states(), trainer)) == 1


def test_neither_do_the_running_sums_of_callbacks(make_trainer, monkeypatch):
    def gather(*_):
        raise AssertionError("the others do not come")

    watch, drop = RedundancyMonitor(2), SublayerDrop(5, count=1, quality_batches=0)
    trainer = make_trainer(watch, drop, Watch(lambda *_: (watch.state_dict()["sums"], drop.state_dict()["sums"])))
    fit_foreign(trainer)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    sums = [callback.state_dict()["sums"] for callback in (watch, drop)]
    assert same(sums, list(trainer.callbacks[2].seen[-1][1]))
    assert [len(each) for each in sums] == [1, 1]


# ---- who writes checkpoints ----


class Own(TorchCheckpointIO):
    """Somebody's own way to write checkpoints."""


@pytest.mark.parametrize(("plugin", "kept"), [(None, AtomicCheckpointIO), (Own, Own), (AsyncCheckpointIO,) * 2])
def test_callbacks_have_checkpoints_written_whole_unless_somebody_else_is_in_charge(make_trainer, plugin, kept):
    trainer = make_trainer(
        SublayerDrop(2, count=1, calibration_batches=1, quality_batches=0),
        plugins=[] if plugin is None else [plugin()],
        max_steps=3,
    )
    fit_foreign(trainer)
    assert type(trainer.strategy.checkpoint_io) is kept


def test_several_optimizers_are_resumed_too(make_trainer, tmp_path):
    resumed_at(make_trainer, tmp_path, 4, stateful, module=Manual, max_steps=24)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_what_model_checkpoint_writes_is_found_again(make_trainer, tmp_path):
    """Torn while it was written: Lightning's own search for the last one does not see it."""

    def fit(steps, ckpt_path=None):
        saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=2, save_last=True)
        drop = SublayerDrop(3, count=1, calibration_batches=1, quality_batches=0)
        steps_seen = Watch(lambda *_: None)
        trainer = make_trainer(drop, saving, steps_seen, enable_checkpointing=True, max_steps=steps)
        trainer.fit(Foreign(), stateful(), val_loader(), ckpt_path=ckpt_path)
        return [step for step, _ in steps_seen.seen]

    assert fit(4) == [1, 2, 3, 4]
    (tmp_path / "kept" / ".last.ckpt.partial").write_bytes(b"half of it")
    assert fit(6, "last") == [5, 6]
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["epoch=0-step=6.ckpt", "last.ckpt"]
