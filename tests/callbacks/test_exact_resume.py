"""ExactResume: a killed and resumed run equals the uninterrupted one; and the guarantees without ExactResume."""

import csv
import errno
import os
import random
import re
import shutil
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerStatus
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

import layershed as ls
from layershed.callbacks import ExactResume, LoRARecovery, RedundancyMonitor, Report, SpeedMonitor, SublayerDrop
from layershed.files.atomic import write_text
from layershed.integration.checkpoint_io import AtomicCheckpointIO
from layershed.integration.lightning_private import supports_exact_resume
from layershed.integration.metrics_csv import _keep, keep_rows
from layershed.integration.rng import of_every_rank, own_generators, random_states, set_random_states
from layershed.stand_ins.record import overridden
from tests.support.finetuned import Backbone
from tests.support.killed import EPOCH, Hooks, Kill, Killed, plain, rows_of, stateful
from tests.support.runs import (
    BATCH,
    Foreign,
    Lengthless,
    Manual,
    Save,
    Watch,
    fit_foreign,
    same,
    sequences,
    state_of,
    val_loader,
)
from tests.support.thinned import crossed, one_of
from tests.support.versions import EXACT_RESUME_REFUSES

pytestmark = [
    pytest.mark.skipif(not supports_exact_resume(), reason=EXACT_RESUME_REFUSES),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
    pytest.mark.usefixtures("unpainted"),
]


@pytest.fixture
def interrupted(make_trainer, tmp_path):
    """The results of three runs: uninterrupted, killed right after the checkpoint of a step, and resumed."""

    def go(step, dropout=0.0, steps=2 * EPOCH, **settings):
        def one(name, *extra, ckpt_path=None):
            hooks = Hooks()
            drop = SublayerDrop(4, count=2, calibration_batches=2, quality_batches=2)
            recovery = [LoRARecovery(rank=2, dropout=dropout)] if dropout else []
            own = [ExactResume(), RedundancyMonitor(2), drop, *recovery, hooks, *extra]
            trainer = make_trainer(*own, name=name, max_steps=steps, **settings)
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


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("step", [3, EPOCH, 2 * EPOCH], ids=lambda step: f"step {step}")
def test_row_validation_and_epoch_end_due_at_the_checkpoint_are_done_once(interrupted, step):
    """In mid-epoch, at the drop, before the validation at the end of an epoch, and after the last step."""
    whole, resumed, rows, again = interrupted(step)
    assert {(str(s), "train_loss") for s in range(2 * EPOCH)} <= rows.keys()
    assert {(str(s), "val_loss") for s in (EPOCH - 1, 2 * EPOCH - 1)} <= rows.keys()
    assert (str(2 * EPOCH), "drop/loss_end") in rows
    assert again == rows
    assert resumed["quality"] == whole["quality"]
    assert all(torch.equal(weight, whole["weights"][name]) for name, weight in resumed["weights"].items())
    # what had been done before the kill is not done again, and the rest is
    assert resumed["hooks"] == [seen for seen in whole["hooks"] if seen[1] >= step]


@pytest.mark.slow
def test_run_that_ends_within_an_epoch_ends_the_epoch_when_resumed(interrupted):
    whole, resumed, rows, again = interrupted(EPOCH + 2, steps=EPOCH + 2)
    assert again == rows
    assert resumed["hooks"] == [seen for seen in whole["hooks"] if seen[1] >= EPOCH + 2]
    assert [hook for hook, *_ in resumed["hooks"]] == ["epoch", "train"]


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("step", [2, 6])
def test_validation_due_within_an_epoch_is_done_when_resumed(interrupted, step):
    whole, resumed, rows, again = interrupted(step, val_check_interval=2)
    assert (str(step - 1), "val_loss") in rows
    assert again == rows
    assert resumed["hooks"] == [seen for seen in whole["hooks"] if seen[1] >= step]


def test_dropout_draws_on_from_the_checkpoint(interrupted):
    whole, resumed, rows, again = interrupted(7, dropout=0.2)
    assert again == rows
    assert all(torch.equal(weight, whole["weights"][name]) for name, weight in resumed["weights"].items())


def test_random_states_saved_to_a_file_draw_the_same_numbers(tmp_path):
    torch.save(random_states(), tmp_path / "states.pt")
    drawn = [(random.random(), np.random.rand(), torch.rand(()).item(), random.gauss(), np.random.randn())]
    set_random_states(torch.load(tmp_path / "states.pt", weights_only=True))
    assert drawn == [(random.random(), np.random.rand(), torch.rand(()).item(), random.gauss(), np.random.randn())]


def test_new_column_never_empties_metrics_csv(tmp_path, monkeypatch):
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


# ---- train loaders ----


def resumed_at(make_trainer, tmp_path, step, train, module=Foreign, **settings):
    """A run that is cut at a step and resumed, each time with a loader of that kind; the batches of both."""
    path, seen = tmp_path / "cut.ckpt", []

    def fit(*extra, ckpt_path=None):
        watch = Watch(lambda *_: None)
        drop = SublayerDrop(9, count=1, quality_batches=0)
        trainer = make_trainer(ExactResume(), drop, watch, *extra, **settings)
        seen.append(watch.seen)
        trainer.fit(module(), train(), val_loader(), ckpt_path=ckpt_path)

    with pytest.raises(Killed):
        fit(Kill(path, step))
    fit(ckpt_path=path)
    return seen


def lengthless():
    return DataLoader(Lengthless(), batch_size=2)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    ("step", "train"),
    [
        pytest.param(4, stateful, id="stateful within an epoch"),
        pytest.param(EPOCH, plain, id="plain after an epoch"),
        pytest.param(2 * EPOCH, plain, id="plain after two epochs"),
    ],
)
def test_loader_with_a_state_or_at_an_epoch_end_resumes_without_warning(make_trainer, tmp_path, step, train):
    resumed_at(make_trainer, tmp_path, step, train, max_steps=3 * EPOCH)  # every warning is an error here


class FirstOfTwo(Foreign):
    """Trains on the first of several loaders."""

    def loss(self, batch):
        return super().loss(batch[0] if isinstance(batch, list) else batch)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    ("step", "train"),
    [
        pytest.param(4, plain, id="plain"),
        pytest.param(EPOCH + 2, lambda: plain(shuffle=True), id="shuffled, second epoch", marks=pytest.mark.slow),
        pytest.param(2, lengthless, id="without a length", marks=pytest.mark.slow),
        pytest.param(4, lambda: [plain(), stateful()], id="one of two"),
    ],
)
def test_plain_loader_resumed_within_an_epoch_gives_one_warning_that_names_the_stateful_one(
    make_trainer, tmp_path, step, train
):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed_at(make_trainer, tmp_path, step, train, module=FirstOfTwo, max_steps=2 * EPOCH)
    told = [str(each.message) for each in caught if re.search("first batch|not resumable", str(each.message))]
    assert len(told) == 1, told
    assert "it starts from its first batch again" in told[0]
    assert "torchdata.stateful_dataloader.StatefulDataLoader" in told[0]


class Batches(Foreign):
    """Notes its training batches."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["input_ids"].tolist())
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", [plain, stateful])
def test_only_a_loader_with_a_state_continues_at_its_position(make_trainer, tmp_path, kind):
    def fit(*extra, ckpt_path=None):
        module = Batches()
        make_trainer(ExactResume(), *extra, max_steps=EPOCH).fit(module, kind(), val_loader(), ckpt_path=ckpt_path)
        return module.seen

    path = tmp_path / "cut.ckpt"
    whole = fit()
    with pytest.raises(Killed):
        fit(Kill(path, 4))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The run is resumed after 4 batches")
        assert fit(ckpt_path=path) == (whole[4:] if kind is stateful else whole[:2])


def test_generator_of_a_plain_loader_orders_the_next_epochs_as_uninterrupted(make_trainer, tmp_path):
    """The loader's own generator, which no seed of the process sets."""

    def fit(*extra, ckpt_path=None):
        module = Batches()
        train = plain(shuffle=True, generator=torch.Generator().manual_seed(3))
        make_trainer(ExactResume(), *extra, max_steps=3 * EPOCH).fit(module, train, val_loader(), ckpt_path=ckpt_path)
        return module.seen

    path = tmp_path / "cut.ckpt"
    whole = fit()
    with pytest.raises(Killed):
        fit(Kill(path, EPOCH))
    assert fit(ckpt_path=path) == whole[EPOCH:]


def test_generator_inside_a_sampler_that_lightning_wraps_is_found():
    generator = torch.Generator()
    wrapped = DistributedSamplerWrapper(RandomSampler(sequences(4), generator=generator), num_replicas=2, rank=0)
    assert own_generators(DataLoader(sequences(4), sampler=wrapped)) == [generator]


class SaveBatch(pl.Callback):
    """Writes a checkpoint at the end of that batch, from 1, whether an optimizer stepped or not."""

    def __init__(self, path, batch):
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx + 1 == self.batch and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(("batch", "told"), [(3, True), (4, False)])
def test_checkpoint_between_two_steps_warns_of_lost_gradients(make_trainer, tmp_path, batch, told):
    path, settings = tmp_path / "cut.ckpt", {"accumulate_grad_batches": 2, "max_steps": EPOCH // 2}
    make_trainer(ExactResume(), SaveBatch(path, batch), **settings).fit(Foreign(), stateful(), val_loader())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(ExactResume(), **settings).fit(Foreign(), stateful(), val_loader(), ckpt_path=path)
    assert any("between two optimizer steps" in str(each.message) for each in caught) == told


# ---- between two epochs ----


class Seen(Foreign):
    """Notes its training batches, and draws a number at the beginning of an epoch."""

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
WRITTEN = {  # by ModelCheckpoint, and which hooks of that step are after it
    "end of the epoch": ({}, ("validation", "epoch")),
    "end of validation": ({"save_on_train_epoch_end": False}, ("validation",)),
    "last batch": ({"every_n_train_steps": EPOCH}, ()),
}


@pytest.mark.default_cases(1)
@pytest.mark.filterwarnings(NO_VALIDATION, "ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(
    ("written", "val", "kind", "limit"),
    [  # every place of writing with every loader, every limit with every place
        ("end of the epoch", True, DataLoader, "epochs"),
        ("end of the epoch", True, StatefulDataLoader, "steps"),
        ("end of validation", True, DataLoader, "steps"),
        pytest.param("end of validation", True, StatefulDataLoader, "epochs", marks=pytest.mark.slow),
        pytest.param("last batch", True, DataLoader, "epochs", marks=pytest.mark.slow),
        ("last batch", True, StatefulDataLoader, "steps"),
        pytest.param("end of the epoch", False, DataLoader, "steps", marks=pytest.mark.slow),
        ("last batch", False, StatefulDataLoader, "epochs"),
    ],
)
def test_epochs_after_a_resume_at_an_epoch_end_are_those_of_the_uninterrupted_run(
    make_trainer, tmp_path, written, val, kind, limit
):
    """Shuffled, all of them, and in another process than the one that wrote the checkpoint."""
    saving, after = WRITTEN[written]
    limits = {"max_steps": 3 * EPOCH} if limit == "steps" else {"max_steps": -1, "max_epochs": 3}

    def fit(seed, ckpt_path=None):
        torch.manual_seed(seed)
        drop, hooks = SublayerDrop(EPOCH + 2, count=1, calibration_batches=1, quality_batches=0), Hooks()
        keep = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, **saving)
        trainer = make_trainer(
            ExactResume(), drop, hooks, keep, enable_checkpointing=True, csv=True, name=f"of-{seed}", **limits
        )
        train = kind(sequences(BATCH * EPOCH), batch_size=BATCH, shuffle=True)
        module = Seen()
        trainer.fit(module, train, val_loader() if val else None, ckpt_path=ckpt_path)
        return module, hooks.seen, rows_of(tmp_path / f"of-{seed}")

    whole, hooks, rows = fit(7)
    resumed, hooks_again, rows_again = fit(8, tmp_path / "kept" / f"epoch=0-step={EPOCH}.ckpt")
    assert len({str([seen[2] for seen in whole.seen][start : start + EPOCH]) for start in (1, 8, 15)}) == 3  # orders
    assert resumed.seen == [seen for seen in whole.seen if seen[0] >= EPOCH]
    assert same(resumed.state_dict(), whole.state_dict())
    assert hooks_again == [seen for seen in hooks if seen[1] > EPOCH or (seen[1] == EPOCH and seen[0] not in after)]
    assert rows_again.items() <= rows.items()
    assert {int(step) for step, name in rows_again if name == "train_loss"} >= set(range(EPOCH, 3 * EPOCH))


@pytest.mark.default_cases(1)
@pytest.mark.filterwarnings(NO_VALIDATION)
@pytest.mark.parametrize(
    "limit", [{"max_steps": -1, "max_epochs": 2}, {"max_steps": 2 * EPOCH}], ids=["epochs", "steps"]
)
def test_end_of_the_last_epoch_is_done_when_resumed(make_trainer, tmp_path, limit):
    def fit(*extra, ckpt_path=None):
        hooks = Hooks()
        make_trainer(ExactResume(), early_drop(), hooks, *extra, **limit).fit(
            Foreign(), stateful(), ckpt_path=ckpt_path
        )
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


def test_loader_set_up_to_count_the_steps_continues_at_its_position(make_trainer, tmp_path):
    def fit(*extra, ckpt_path=None):
        module = Counting()
        trainer = make_trainer(ExactResume(), early_drop(), *extra, max_steps=-1, max_epochs=2)
        trainer.fit(module, stateful(), val_loader(), ckpt_path=ckpt_path)
        return module.state_dict()

    path = tmp_path / "cut.ckpt"
    with pytest.raises(Killed):
        fit(Kill(path, 4))
    assert same(fit(ckpt_path=path), fit())


# ---- a fit that fails, and others that share the process ----


class Fails(pl.Callback):
    """Raises an error in the given hook, if there is one."""

    def __init__(self, hook):
        self.armed = True
        setattr(self, hook, self.fail)

    def fail(self, *_):
        if self.armed:
            raise Killed


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_sanity_check_start"])
def test_failed_resume_leaves_no_method_replaced_and_can_be_tried_again(make_trainer, tmp_path, hook):
    path, fails = tmp_path / "cut.ckpt", Fails(hook)
    first = make_trainer(ExactResume(), early_drop(), max_steps=-1, max_epochs=1)
    first.fit(Foreign(), stateful(), val_loader())
    first.save_checkpoint(path)
    trainer = make_trainer(ExactResume(), early_drop(), fails, max_steps=-1, max_epochs=3, num_sanity_val_steps=1)
    with pytest.raises(Killed):
        trainer.fit(Foreign(), stateful(), val_loader(), ckpt_path=path)
    for each in (trainer, trainer.fit_loop, trainer.fit_loop.epoch_loop):
        assert not [name for name in vars(each) if callable(getattr(type(each), name, None))]
    fails.armed = False
    trainer.fit(Foreign(), stateful(), val_loader(), ckpt_path=path)
    assert trainer.global_step == 3 * EPOCH


def test_trainer_of_one_process_gathers_no_random_states_in_a_foreign_process_group(
    make_trainer, tmp_path, monkeypatch
):
    def gather(*_):
        raise AssertionError("the others do not come")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    trainer = make_trainer(max_steps=1)
    assert len(of_every_rank(random_states(), trainer)) == 1


def test_trainer_of_one_process_gathers_no_running_sums_in_a_foreign_process_group(make_trainer, monkeypatch):
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


def test_rank_that_has_raised_an_error_waits_for_no_other(make_trainer, monkeypatch):
    """The others do not answer: they wait for it elsewhere."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    asked = []
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda every, own: asked.append(own))
    trainer = make_trainer()
    monkeypatch.setattr(type(trainer), "world_size", 2)
    of_every_rank("mine", trainer)
    assert asked == ["mine"]
    trainer.state.status = TrainerStatus.INTERRUPTED
    assert of_every_rank("mine", trainer) == ["mine"]
    assert len(asked) == 1


# ---- who writes checkpoints ----


class Own(TorchCheckpointIO):
    """Somebody's own way to write checkpoints."""


@pytest.mark.parametrize(
    ("plugin", "kept"),
    [
        pytest.param(None, AtomicCheckpointIO, id="Lightning's"),
        pytest.param(Own, Own, id="the user's own"),
        pytest.param(AsyncCheckpointIO, AsyncCheckpointIO, id="a wrapper"),
    ],
)
def test_checkpoints_are_written_whole_unless_the_user_has_a_checkpoint_io(make_trainer, plugin, kept):
    trainer = make_trainer(ExactResume(), plugins=[] if plugin is None else [plugin()], max_steps=1)
    fit_foreign(trainer)
    writer = trainer.strategy.checkpoint_io
    assert type(writer) is kept
    if plugin is AsyncCheckpointIO:
        assert type(writer.checkpoint_io) is AtomicCheckpointIO


def test_run_with_several_optimizers_is_resumed(make_trainer, tmp_path):
    resumed_at(make_trainer, tmp_path, 4, stateful, module=Manual, max_steps=24)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_torn_last_checkpoint_of_model_checkpoint_is_passed_over(make_trainer, tmp_path):
    """Torn while it was written: Lightning's own search for the last one does not see it."""

    def fit(steps, ckpt_path=None):
        saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=2, save_last=True)
        drop = SublayerDrop(3, count=1, calibration_batches=1, quality_batches=0)
        steps_seen = Watch(lambda *_: None)
        trainer = make_trainer(ExactResume(), drop, saving, steps_seen, enable_checkpointing=True, max_steps=steps)
        trainer.fit(Foreign(), stateful(), val_loader(), ckpt_path=ckpt_path)
        return [step for step, _ in steps_seen.seen]

    assert fit(4) == [1, 2, 3, 4]
    (tmp_path / "kept" / ".last.ckpt.partial").write_bytes(b"half of it")
    assert fit(6, "last") == [5, 6]
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["epoch=0-step=6.ckpt", "last.ckpt"]


# ---- metrics.csv ----


@pytest.fixture
def fit(make_trainer, tmp_path):
    """Trains in a run directory, also in one that is there already, and gives its metrics.csv."""

    def fit(*others, name="run", steps=12, lr=1e-2, ckpt_path=None):
        own = SublayerDrop(5, count=1, calibration_batches=1, quality_batches=1)
        trainer = make_trainer(ExactResume(), RedundancyMonitor(2), own, *others, name=name, csv=True, max_steps=steps)
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
@pytest.mark.parametrize(("at", "link"), one_of([(8, no_link), (3, os.link), (8, twice)]))
def test_run_resumed_in_its_own_directory_keeps_its_rows(fit, tmp_path, monkeypatch, at, link):
    """Before and after the drop with its columns; Lightning deletes the file, which held later rows, too."""
    monkeypatch.setattr(os, "link", link)
    path = tmp_path / "at.ckpt"
    whole = fit(name="whole")
    assert train_steps(whole) == set(range(12))
    assert train_steps(fit(Save(path, at), Save(tmp_path / "later.ckpt", 9), steps=10)) == set(range(10))
    for _ in range(2):  # from the same checkpoint once more
        assert fit(ckpt_path=path) == whole
    assert sorted(file.name for file in (tmp_path / "run").glob(".*")) == [".metrics.csv.kept"]


@pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:'set_vital' is deprecated")
def test_run_resumed_in_a_new_directory_has_the_rows_of_before(fit, tmp_path):
    whole = fit(name="whole")
    path = tmp_path / "run" / "checkpoints" / "at.ckpt"
    fit(Save(path, 6), steps=8)
    assert fit(name="other", ckpt_path=path) == whole
    (tmp_path / "run").rename(tmp_path / "moved")
    assert fit(name="again", ckpt_path=tmp_path / "moved" / "checkpoints" / "at.ckpt") == whole


@pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:'set_vital' is deprecated")
@pytest.mark.filterwarnings("ignore:RedundancyMonitor. neither .* holds what was measured before")
def test_lost_rows_and_rows_of_another_run_are_warned_of(fit, tmp_path):
    path = tmp_path / "at.ckpt"
    fit(Save(path, 6), steps=8)
    lost = r"CSVLogger deleted '.*metrics.csv' .* the rows before step 6\. To keep them, resume with"
    (tmp_path / "run" / ".metrics.csv.kept").unlink()
    with pytest.warns(UserWarning, match=lost):
        assert train_steps(fit(ckpt_path=path)) == set(range(5, 12))
    fit(Save(tmp_path / "later.ckpt", 9), lr=1e-3)
    with pytest.warns(UserWarning, match=lost):
        assert train_steps(fit(ckpt_path=path)) == set(range(5, 12))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_trainer_that_goes_back_to_a_checkpoint_has_no_row_twice(make_trainer, tmp_path, fit):
    whole, path = fit(name="whole"), tmp_path / "at.ckpt"
    own = SublayerDrop(5, count=1, calibration_batches=1, quality_batches=1)
    trainer = make_trainer(ExactResume(), RedundancyMonitor(2), own, Save(path, 6), name="run", csv=True, max_steps=12)
    for ckpt_path in (None, path):
        trainer.fit(Foreign(), stateful(), val_loader(), ckpt_path=ckpt_path)
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == whole


class LogsEarly(Foreign):
    """Its logger has written a row before anybody is asked for the rows of before."""

    def setup(self, stage):
        self.logger.log_metrics({"early": 1.0}, step=0)
        self.logger.save()


@pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:'set_vital' is deprecated")
def test_row_logged_before_the_resume_stays_after_the_earlier_rows(make_trainer, tmp_path):
    path = tmp_path / "at.ckpt"
    for more, ckpt_path in (([Save(path, 6)], None), ([], path)):
        trainer = make_trainer(ExactResume(), *more, name="run", csv=True, max_steps=8 if more else 12)
        trainer.fit(LogsEarly(), stateful(), val_loader(), ckpt_path=ckpt_path)
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows if row["train_loss"]] == list(range(12))
    assert len([row for row in rows if row["early"]]) == 2


MOVES = {
    "copied": lambda old, new: shutil.copytree(old, new),
    "moved": lambda old, new: old.rename(new),
    "linked": lambda old, new: new.symlink_to(old),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:'set_vital' is deprecated")
@pytest.mark.filterwarnings("ignore:RedundancyMonitor. neither .* holds what was measured before")
@pytest.mark.parametrize("move", one_of(MOVES))
def test_run_resumed_in_a_copied_moved_or_linked_directory_keeps_its_rows(fit, tmp_path, move):
    path = tmp_path / "at.ckpt"
    whole = fit(name="whole")
    fit(Save(path, 6), steps=10)
    MOVES[move](tmp_path / "run", tmp_path / "elsewhere")
    assert fit(name="elsewhere", ckpt_path=path) == whole


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Experiment logs directory", "ignore:'set_vital' is deprecated")
@pytest.mark.filterwarnings("ignore:RedundancyMonitor. neither .* holds what was measured before")
def test_rows_of_another_run_in_a_copied_directory_are_warned_of(fit, tmp_path):
    path = tmp_path / "at.ckpt"
    fit(Save(path, 6), steps=8)
    fit(Save(tmp_path / "later.ckpt", 9), name="other", lr=1e-3)
    shutil.copytree(tmp_path / "other", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "run")
    with pytest.warns(UserWarning, match=r"again/metrics.csv' begins at step 6: .* nor in '.*run/metrics.csv'"):
        assert train_steps(fit(name="again", ckpt_path=path)) == set(range(5, 12))
    with pytest.warns(
        UserWarning, match=r"CSVLogger deleted '.*elsewhere/metrics.csv' .* before step 6\. To keep them, resume with"
    ):
        assert train_steps(fit(name="elsewhere", ckpt_path=path)) == set(range(5, 12))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_metrics_file_deleted_by_another_run_ends_no_training(fit, tmp_path, monkeypatch):
    def deleted(source, _target):
        Path(source).unlink()
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", source)

    monkeypatch.setattr(os, "link", deleted)
    path = tmp_path / "at.ckpt"
    with pytest.warns(UserWarning, match=r"rows of '.*metrics.csv' could not be kept .*\(No such file or directory\)"):
        fit(Save(path, 6), steps=8)
    assert torch.load(path)["global_step"] == 6


def test_link_left_by_a_killed_run_does_not_empty_the_kept_rows(tmp_path, monkeypatch):
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


# ---- beside the other callbacks ----

WATCHERS = {
    "RedundancyMonitor": lambda: RedundancyMonitor(2),
    "Report": lambda: Report(every_n_steps=1),
    "SpeedMonitor": lambda: SpeedMonitor(6, 2, runs=1, quality=None),
}


@pytest.fixture
def twice_run(make_trainer, tmp_path):
    """A run left alone, and one that is killed right after the checkpoint of a step and resumed with another seed."""

    def go(own, module, step, again=None, exact=True):
        def one(name, seed, *extra, built=module, ckpt_path=None):
            trainer = make_trainer(own(), *([ExactResume()] if exact else []), *extra, name=name, max_steps=2 * EPOCH)
            trainer.loggers = [CSVLogger(tmp_path / "logs" / name, name="", version=None)]
            built = built()
            torch.manual_seed(seed)
            trainer.fit(built, stateful(), val_loader(), ckpt_path=ckpt_path)
            return trainer, built

        def left(name, trainer, built):
            history = sorted((tmp_path / "logs" / name).rglob("importance.csv"))
            own = trainer.callbacks[0].state_dict()
            own.pop("history", None)
            return {
                **state_of(trainer, built),
                "own": own,
                "importance": history[-1].read_text() if history else None,
                "rows": rows_of(tmp_path / "logs" / name),
                "dropped": ls.bypassed_sublayers(built),
            }

        path = tmp_path / "cut.ckpt"
        whole = left("whole", *one("whole", 7))
        with pytest.raises(Killed):
            one("cut", 7, Kill(path, step))
        return whole, left("cut", *one("cut", 8, built=again or module, ckpt_path=path))

    return go


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(("watcher", "step"), [("RedundancyMonitor", 4), ("Report", 2 * EPOCH), ("SpeedMonitor", 4)])
def test_watching_callback_with_exact_resume_ends_as_uninterrupted(twice_run, watcher, step):
    whole, again = twice_run(WATCHERS[watcher], lambda: Foreign(attention_dropout=0.2), step)
    assert (whole["importance"] is not None) == (watcher == "RedundancyMonitor")
    for part in whole:
        assert same(again[part], whole[part]), part


def two_step_drop():
    return SublayerDrop(8, count=2, calibration_batches=1, quality_batches=1)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("own", [lambda: RedundancyMonitor(2), two_step_drop], ids=["monitor", "drop"])
def test_batch_of_two_steps_is_measured_the_same_after_a_resume(twice_run, own):
    """The first batch of the resumed run, too: the one that is measured, or scored."""
    whole, again = twice_run(own, lambda: Manual(attention_dropout=0.2), 6)
    assert whole["importance"] is None or "\n8,0,attention,cosine," in whole["importance"]
    for part in whole:
        assert same(again[part], whole[part]), part


class FirstOnly(Manual):
    """Of its two optimizers only the first ever steps."""

    def training_step(self, batch, batch_idx):
        first, _ = self.optimizers()
        first.zero_grad()
        self.manual_backward(self.loss(batch) * self.scale)
        first.step()


@pytest.mark.slow
def test_batch_of_fewer_steps_than_optimizers_is_scored_the_same_after_a_resume(twice_run):
    """The first batch of the resumed run, which at two steps a batch would be scored, and is not."""

    def own():
        return SublayerDrop(6, count=2, calibration_batches=1, quality_batches=1)

    whole, again = twice_run(own, lambda: FirstOnly(attention_dropout=0.2), 4)
    assert len(whole["dropped"]) == 2
    for part in whole:
        assert same(again[part], whole[part]), part


def bypassed():
    module = Foreign()
    ls.bypass(module, ls.find_sublayers(module)[:2])
    return module


def late_drop():
    return SublayerDrop(3, count=1, calibration_batches=2, quality_batches=0)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("again", [bypassed, Foreign], ids=["bypassed again", "dense"])
def test_model_bypassed_by_hand_ends_as_uninterrupted_also_from_a_dense_one(twice_run, again):
    whole, cut = twice_run(WATCHERS["RedundancyMonitor"], bypassed, 4, again)
    assert len(whole["dropped"]) == 2
    for part in whole:
        assert same(cut[part], whole[part]), part


def by_hand(bypasses, adapts, filters):
    """Builds a module that is changed before the fit; its optimizer takes all parameters, or those that train."""

    class Changed(Foreign):
        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad or not filters], lr=1e-2)

    def make():
        module = Changed()
        if bypasses:
            ls.bypass(module.net, [s for s in ls.find_sublayers(module.net) if s.name in ("mlp.1", "attention.2")])
        if adapts:
            ls.inject_lora(module.net, rank=2)
        return module

    return make


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    ("changed", "filters", "own"),
    crossed(((True, True), (False, True), (True, False)), (True, False), (WATCHERS["RedundancyMonitor"], late_drop)),
)
def test_model_changed_by_hand_before_the_fit_resumes_exactly(twice_run, changed, filters, own):
    make = by_hand(*changed, filters)
    whole, cut = twice_run(own, make, 4, make)
    for part in ("weights", "optimizer", "step", "dropped"):
        assert same(cut[part], whole[part]), part


@pytest.mark.filterwarnings("ignore:.*already exist within another group:UserWarning")
def test_bypass_by_hand_stays_frozen_when_a_callback_unfreezes_and_after_a_resume(make_trainer, tmp_path):
    def fit(module, name, *more, ckpt_path=None):
        finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-3)
        trainer = make_trainer(ExactResume(), finetuning, *more, name=name, max_steps=3 * EPOCH)
        trainer.fit(module, stateful(), ckpt_path=ckpt_path)
        return state_of(trainer, module), {name for name, p in module.named_parameters() if p.requires_grad}

    path, bypassed = tmp_path / "cut.ckpt", Backbone()
    ls.bypass(bypassed, ls.find_sublayers(bypassed)[:2])
    whole, trainable = fit(bypassed, "whole", Save(path, EPOCH + 1))
    dropped = [p for module, _ in overridden(bypassed) for p in module.parameters()]
    assert not any(p.requires_grad for p in dropped)
    assert len(trainable) > 2
    resumed, again = fit(Backbone(), "resumed", ckpt_path=path)
    assert again == trainable
    assert same(resumed, whole)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("own", [WATCHERS["RedundancyMonitor"], two_step_drop], ids=["monitor", "drop"])
def test_without_exact_resume_weights_importances_and_drop_are_those_of_the_uninterrupted_run(twice_run, own):
    """On a module that draws no random numbers; the due row and validation are Lightning's to lose."""
    whole, again = twice_run(own, Foreign, 4, exact=False)
    for part in ("weights", "optimizer", "schedule", "step", "importance", "dropped"):
        assert same(again[part], whole[part]), part


def test_second_exact_resume_changes_nothing(make_trainer, tmp_path):
    def fit(count, name, *extra, ckpt_path=None):
        trainer = make_trainer(*(ExactResume() for _ in range(count)), *extra, name=name, csv=True, max_steps=2 * EPOCH)
        torch.manual_seed(7 if ckpt_path is None else 8)
        module = Foreign(attention_dropout=0.2)
        trainer.fit(module, stateful(), val_loader(), ckpt_path=ckpt_path)
        return state_of(trainer, module), rows_of(tmp_path / name)

    whole, rows = fit(1, "whole")
    with pytest.raises(Killed):
        fit(2, "cut", Kill(tmp_path / "cut.ckpt", EPOCH))
    again, more = fit(2, "again", ckpt_path=tmp_path / "cut.ckpt")
    assert same(again, whole)
    assert more.items() <= rows.items()


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_epoch_of_a_distributed_sampler_is_resumed_in_its_own_order(make_trainer, tmp_path):
    """The second epoch of four batches, after its second one: another order than that of the first epoch."""
    items, path = sequences(4 * BATCH), tmp_path / "6.ckpt"

    class Noting(Foreign):
        def training_step(self, batch, batch_idx):
            seen.append(batch["input_ids"].tolist())
            return super().training_step(batch, batch_idx)

    found = {}
    for name, more, ckpt_path in (("whole", [Save(path, 6)], None), ("resumed", [], path)):
        seen = found[name] = []
        sampler = DistributedSampler(items, num_replicas=1, rank=0, seed=5)
        trainer = make_trainer(ExactResume(), *more, name=name, max_steps=8)
        trainer.fit(Noting(), StatefulDataLoader(items, BATCH, sampler=sampler), val_loader(), ckpt_path=ckpt_path)
    assert found["resumed"] == found["whole"][6:]
    assert sorted(map(str, found["whole"][4:])) != sorted(map(str, found["whole"][:4])), "else the epoch has no part"
