"""A plain loader that is read again: the epoch that was interrupted is the one that goes on."""

import logging
import random

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from layershed.callbacks import SublayerDrop
from layershed.errors import CheckpointError
from layershed.integration.digest import digest
from layershed.integration.pending_work import prepare_resumption
from tests.support.runs import BATCH, Foreign, same, sequences, state_of, val_loader

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")

EPOCH = 6  # batches
READ_AGAIN = "they were read again, and are not trained on"


class Killed(Exception):
    """Stands for SIGKILL: nothing that comes later in the run happens."""


class Kill(pl.Callback):
    """Writes a checkpoint at the end of that batch, counted over the whole run from 1, and dies right behind it."""

    def __init__(self, path, batch):
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.batch:
            trainer.save_checkpoint(self.path)
            raise Killed


class Seen(Foreign):
    """Notes what it is trained on, and draws numbers of its own where an epoch begins."""

    def __init__(self, **overrides):
        super().__init__(**{"attention_dropout": 0.2, **overrides})
        self.seen = []

    def on_train_epoch_start(self):
        torch.rand(3)

    def training_step(self, batch, batch_idx):
        number = self.trainer.fit_loop.epoch_loop.total_batch_idx
        self.seen.append((number, batch_idx, batch["input_ids"].tolist()))
        return super().training_step(batch, batch_idx)


class Augmented(Dataset):
    """Every item with a token that is drawn from the global generator as it is read."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        row = self.items[index]["input_ids"].clone()
        row[0] = torch.randint(3, 93, ())
        return {"input_ids": row, "labels": row}


class Stream(IterableDataset):
    """The same without a length, and shuffled in a buffer by a generator of that kind."""

    def __init__(self, below=None, augments=False):
        self.below, self.augments = below, augments

    def __iter__(self):
        items = sequences(BATCH * EPOCH, seed=5)
        buffer = Augmented(items) if self.augments else items
        left = list(range(len(items)))
        while left:
            yield buffer[left.pop(0 if self.below is None else self.below(len(left)))]


def of_torch(count):
    return int(torch.randint(count, ()))


def plain(items=None, **kwargs):
    return DataLoader(sequences(BATCH * EPOCH) if items is None else items, batch_size=BATCH, **kwargs)


def with_generator(**kwargs):
    return plain(shuffle=True, generator=torch.Generator().manual_seed(3), **kwargs)


def weighted():
    return plain(sampler=WeightedRandomSampler([1.0, 3.0] * EPOCH, BATCH * EPOCH))


def own_sampler():
    items = sequences(BATCH * EPOCH)
    generator = torch.Generator().manual_seed(3)
    return plain(items, sampler=RandomSampler(items, replacement=True, generator=generator))


def by_epoch():
    items = sequences(BATCH * EPOCH)
    return plain(items, sampler=DistributedSampler(items, num_replicas=1, rank=0))


@pytest.fixture
def run(make_trainer, tmp_path):
    """One process of a run: until it is killed behind a batch, or to its end; what it saw and left."""

    def go(train, kill=None, ckpt_path=None, overrides=None, kind=Seen, **settings):
        settings = {"max_steps": 2 * EPOCH, **settings}
        extra = [] if kill is None else [Kill(tmp_path / f"{kill}.ckpt", kill)]
        drop = SublayerDrop(2, count=1, calibration_batches=1, quality_batches=0)
        trainer = make_trainer(drop, *extra, **settings)
        module = kind(**(overrides or {}))
        torch.manual_seed(7 if ckpt_path is None else 8)  # another process draws other numbers
        random.seed(7 if ckpt_path is None else 8)
        try:
            trainer.fit(module, train(), val_loader(), ckpt_path=ckpt_path)
            assert kill is None
        except Killed:
            pass
        return module.seen, state_of(trainer, module)

    return go


def check(run, tmp_path, train, *kills, **settings):
    """Killed behind these batches and resumed each time, it sees what the uninterrupted run sees, and ends as it."""
    seen, state = run(train, **settings)
    assert len({str(batch) for _, _, batch in seen}) > 2
    path = None
    for kill in (*kills, None):
        again, end = run(train, kill, path, **settings)
        begin = 0 if path is None else int(path.stem)
        assert again == seen[begin:kill]
        path = tmp_path / f"{kill}.ckpt"
    assert same(end, state)


LOADERS = {
    "shuffled": lambda: plain(shuffle=True),
    "in order": plain,
    "by a generator of its own": with_generator,
    "by a sampler's own generator, with replacement": own_sampler,
    "by weights": weighted,
    "by the number of the epoch": by_epoch,
    "with random items": lambda: plain(Augmented(sequences(BATCH * EPOCH)), shuffle=True),
    "without a length": lambda: plain(Stream()),
    "shuffled by Python, without a length": lambda: plain(Stream(random.randrange)),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_the_epoch_goes_on_where_it_stood(run, tmp_path, kind):
    """In the first epoch and in the second."""
    check(run, tmp_path, LOADERS[kind], 4, EPOCH + 3)


@pytest.mark.parametrize("kind", ["shuffled", "by a generator of its own", "without a length"])
def test_so_it_does_the_second_time_in_the_same_epoch(run, tmp_path, kind):
    check(run, tmp_path, LOADERS[kind], 1, 2, EPOCH + 1, EPOCH + 3)


def test_a_generator_of_its_own_is_where_it_was_at_the_next_epoch_too(run, tmp_path):
    check(run, tmp_path, with_generator, EPOCH)


def test_gradients_are_accumulated_over_the_same_batches(run, tmp_path):
    check(run, tmp_path, LOADERS["shuffled"], 4, EPOCH + 2, accumulate_grad_batches=2, max_steps=EPOCH)


@pytest.mark.parametrize(("kind", "kill"), [("shuffled", 3), ("shuffled", 4), ("without a length", EPOCH + 2)])
def test_validation_within_the_epoch_is_where_it_was(run, tmp_path, kind, kill):
    """Before the validation that is due there, and between two."""
    check(run, tmp_path, LOADERS[kind], kill, val_check_interval=2)


def test_loaders_that_are_made_anew_every_epoch(run, tmp_path):
    check(run, tmp_path, LOADERS["shuffled"], 4, EPOCH + 3, reload_dataloaders_every_n_epochs=1)


class Early(Seen):
    """Sets the train loader up before the checkpoint is read, and draws numbers behind that."""

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches == 2 * EPOCH
        torch.rand(3)
        return super().configure_optimizers()


@pytest.mark.parametrize("kill", [4, EPOCH + 3])
def test_a_loader_that_is_set_up_early(run, tmp_path, kill):
    check(run, tmp_path, lambda: plain(shuffle=True, num_workers=1), kill, kind=Early)


@pytest.mark.parametrize(("persistent", "kill"), [(False, 3), (True, 3), (False, EPOCH + 3)])
def test_a_process_that_reads_ahead_draws_the_same(run, tmp_path, persistent, kill):
    def train():
        items = Augmented(sequences(BATCH * EPOCH))
        return plain(items, shuffle=True, num_workers=1, persistent_workers=persistent)

    check(run, tmp_path, train, kill)


# ---- what is said ----


@pytest.fixture
def said(caplog):
    """What Lightning's rank_zero_info was given."""
    logger = logging.getLogger("lightning.pytorch")  # its records reach the root or not, as whoever ran before left it
    logger.addHandler(caplog.handler)
    yield lambda: [own.getMessage() for own in dict.fromkeys(caplog.records) if READ_AGAIN in own.getMessage()]
    logger.removeHandler(caplog.handler)


def test_it_is_said_once(run, tmp_path, said):
    run(LOADERS["shuffled"], 4)
    assert said() == []
    run(LOADERS["shuffled"], None, tmp_path / "4.ckpt")
    assert len(said()) == 1
    assert said()[0].startswith("The run is resumed after 4 batches of an epoch")
    assert "StatefulDataLoader" in said()[0]


def test_workers_that_were_kept_over_epochs_read_the_same(run, tmp_path):
    check(run, tmp_path, lambda: plain(shuffle=True, num_workers=1, persistent_workers=True), EPOCH + 2)


BY_TURNS = "by turns with the model"


def test_a_stream_that_shuffles_by_the_numbers_that_dropout_draws_too_is_told_of(run, tmp_path):
    def train():
        return plain(Stream(of_torch))

    seen, _ = run(train)
    run(train, 4)
    with pytest.warns(UserWarning, match=BY_TURNS):
        again, _ = run(train, None, tmp_path / "4.ckpt")
    assert again != seen[4:], "else there is nothing to tell"


def test_without_dropout_it_draws_the_same(run, tmp_path):
    check(run, tmp_path, lambda: plain(Stream(of_torch)), 4, EPOCH + 3, overrides={"attention_dropout": 0.0})


@pytest.mark.filterwarnings(f"ignore:.*{BY_TURNS}")
@pytest.mark.parametrize("kill", [1, EPOCH + 2])
def test_the_batch_that_is_read_ahead_has_the_same_random_items(run, tmp_path, kill):
    check(run, tmp_path, lambda: plain(Stream(augments=True)), kill, kill + 1)


class Again(RandomSampler):
    """Somebody else's sampler, which chooses as it goes."""

    def __iter__(self):
        return (of_torch(len(self.data_source)) for _ in range(len(self)))


def test_a_sampler_that_chooses_as_it_goes_is_told_of(run, tmp_path):
    def train():
        items = sequences(BATCH * EPOCH)
        return plain(items, sampler=Again(items))

    run(train, 4)
    with pytest.warns(UserWarning, match=BY_TURNS):
        run(train, None, tmp_path / "4.ckpt")


class Pair(Seen):
    """Trained on the first of two loaders."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch[0], batch_idx)


def test_so_is_a_shorter_one_of_two_loaders_that_began_again(run, tmp_path):
    def train():
        return [plain(shuffle=True), plain(sequences(2 * BATCH), shuffle=True)]

    check(run, tmp_path, train, 2, kind=Pair)
    run(train, 4, kind=Pair)
    with pytest.warns(UserWarning, match=BY_TURNS):
        run(train, None, tmp_path / "4.ckpt", kind=Pair)


# ---- where it cannot be done ----


class Fetches(Seen):
    """Takes the batches itself."""

    def training_step(self, dataloader_iter):
        batch, *_ = next(dataloader_iter)
        return self.loss(batch)


def cut(make_trainer, path, train, module=Seen, batch=4):
    with pytest.raises(Killed):
        resumed(make_trainer, None, train, module, Kill(path, batch))


def resumed(make_trainer, path, train, module=Seen, *callbacks, **settings):
    drop = SublayerDrop(2, count=1, calibration_batches=1, quality_batches=0)
    trainer = make_trainer(drop, *callbacks, **settings)
    own = module()
    trainer.fit(own, train(), val_loader(), ckpt_path=path)
    return trainer, own


BEGINS_ANEW = "resumed after 4 batches of an epoch.* starts from its first batch again"
LIGHTNINGS = "ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning"
CANNOT = {
    "one of two loaders": (lambda: [plain(), StatefulDataLoader(sequences(BATCH * EPOCH), batch_size=BATCH)], Pair),
    "a step that fetches": (plain, Fetches),
    "a list of batches, passed by": (lambda: iter(list(plain()) * 3), Seen),
    "a stream, passed by": (lambda: DataLoader(Passed(), batch_size=None), Seen),
}


class Passed(IterableDataset):
    """Goes on where it stood however often it is iterated."""

    def __init__(self):
        self.batches = iter(list(plain()) * 3)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.batches)


@pytest.mark.filterwarnings(LIGHTNINGS, "ignore:Found `dataloader_iter` argument", "ignore:You are using the")
@pytest.mark.parametrize("case", CANNOT)
def test_a_loader_that_cannot_be_read_again_is_told_of(make_trainer, tmp_path, case, said):
    path, (train, module) = tmp_path / "cut.ckpt", CANNOT[case]
    cut(make_trainer, path, train, module)
    with pytest.warns(UserWarning, match=BEGINS_ANEW) as warned:
        resumed(make_trainer, path, train, module)
    assert sum("torchdata.stateful_dataloader.StatefulDataLoader" in str(each.message) for each in warned) == 1
    assert not said()


def without_note(checkpoint):
    del checkpoint["layershed_epoch_start"]


def of_two_ranks(checkpoint):
    checkpoint["layershed_epoch_start"] *= 2


@pytest.mark.filterwarnings(LIGHTNINGS)
@pytest.mark.parametrize(
    ("change", "train"), [(without_note, plain), (of_two_ranks, plain), (lambda _: None, with_generator)]
)
def test_so_is_one_of_another_run(make_trainer, tmp_path, change, train):
    path = tmp_path / "cut.ckpt"
    cut(make_trainer, path, lambda: plain(shuffle=True))
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match=BEGINS_ANEW):
        resumed(make_trainer, path, train)


class Private(RandomSampler):
    """Shuffles by a generator that nobody knows."""

    def __init__(self, items):
        super().__init__(items)
        self.random = random.Random(5)

    def __iter__(self):
        return iter(self.random.sample(range(len(self.data_source)), len(self.data_source)))


def by_private():
    items = sequences(BATCH * EPOCH)
    return plain(items, sampler=Private(items))


def kept_workers():
    items = Augmented(sequences(BATCH * EPOCH))
    return plain(items, num_workers=1, persistent_workers=True)


OTHER_BATCHES = {  # at first, and of the resumed run
    "other data": (plain, lambda: plain(sequences(BATCH * EPOCH, seed=1)), 4),
    "another order": (plain, lambda: plain(shuffle=True), 4),
    "a generator that is not known": (by_private, by_private, EPOCH + 4),
    "that of workers that are no more": (kept_workers, kept_workers, EPOCH + 4),
}


@pytest.mark.filterwarnings(LIGHTNINGS)
@pytest.mark.parametrize("case", OTHER_BATCHES)
def test_another_first_batch_is_found_out(make_trainer, tmp_path, case, said):
    path, (first, second, batch) = tmp_path / "cut.ckpt", OTHER_BATCHES[case]
    cut(make_trainer, path, first, batch=batch)
    with pytest.warns(UserWarning, match=BEGINS_ANEW):
        _, module = resumed(make_trainer, path, second)
    assert not said()
    if case == "other data":
        assert module.seen[0][2] == next(iter(second()))["input_ids"].tolist()


def test_a_generator_that_is_not_known_does_in_the_first_epoch(run, tmp_path):
    check(run, tmp_path, by_private, 4)


def test_a_digest_tells_batches_apart():
    """And is that of an equal one, made anew."""

    def made():
        ones, array = torch.ones(2, 3), np.arange(3)
        rows = [ones, ones.half(), ones.bool(), ones.reshape(3, 2), ones.to(torch.complex64), ones.cumsum(1)]
        rows += [ones.cumsum(1).t(), ones.to_sparse(), torch.tensor(1), torch.ones(0), array, array[::2], array[1]]
        return [*rows, *({"a": row} for row in rows), ["a", None, 1, b"a"], ["a", None, 1.0, b"a"], object()]

    digests = [digest(each) for each in made()]
    assert digests == [digest(each) for each in made()]
    assert len({*digests}) == len(digests)
    assert digest(np.array([object()])) == digest(np.array([object()]))


@pytest.mark.filterwarnings(LIGHTNINGS)
def test_an_epoch_that_was_begun_anew_cannot_be_read_again_either(make_trainer, tmp_path):
    path, second = tmp_path / "cut.ckpt", tmp_path / "second.ckpt"
    cut(make_trainer, path, plain, batch=3)
    checkpoint = torch.load(path, weights_only=True)
    without_note(checkpoint)
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match="after 3 batches .* starts from its first batch"), pytest.raises(Killed):
        resumed(make_trainer, path, plain, Seen, Kill(second, 4))
    with pytest.warns(UserWarning, match=BEGINS_ANEW):
        resumed(make_trainer, second, plain)


def test_an_epoch_that_was_ended_early_is_not_read_again(make_trainer, tmp_path, said):
    """Lightning begins the next one."""
    path = tmp_path / "cut.ckpt"
    trainer, _ = resumed(make_trainer, None, plain, max_steps=4)
    trainer.save_checkpoint(path)
    with pytest.warns(UserWarning, match=BEGINS_ANEW):
        resumed(make_trainer, path, plain)
    assert not said()


def test_data_that_are_fewer_than_were_read_are_refused(make_trainer, tmp_path):
    path = tmp_path / "cut.ckpt"
    cut(make_trainer, path, plain)
    with pytest.raises(CheckpointError, match="after 4 batches of an epoch, and the train loader now has fewer"):
        resumed(make_trainer, path, lambda: plain(sequences(BATCH * EPOCH)[: 2 * BATCH]))


# ---- what is left behind ----


def test_a_loader_with_a_state_needs_no_note(make_trainer, tmp_path):
    path = tmp_path / "cut.ckpt"
    cut(make_trainer, path, lambda: StatefulDataLoader(sequences(BATCH * EPOCH), batch_size=BATCH))
    assert "layershed_epoch_start" not in torch.load(path, weights_only=True)


def test_a_trainer_is_as_good_as_new(make_trainer, tmp_path):
    """After a fit with several callbacks that each ask, one that was resumed, and one that failed."""

    def clean(trainer):
        for each in (trainer, trainer.fit_loop, trainer.fit_loop.epoch_loop):
            assert not [name for name in vars(each) if callable(getattr(type(each), name, None))]

    class Wrapped(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            before = dict(vars(trainer.fit_loop.epoch_loop))
            prepare_resumption(trainer)
            assert vars(trainer.fit_loop.epoch_loop) == before
            assert "on_run_start" in before

    path = tmp_path / "cut.ckpt"
    trainer, _ = resumed(make_trainer, None, plain, Seen, Wrapped())
    clean(trainer)
    cut(make_trainer, path, lambda: plain(shuffle=True))
    trainer, _ = resumed(make_trainer, path, lambda: plain(shuffle=True), max_steps=8)
    clean(trainer)
    trainer.fit_loop.epoch_loop.max_steps = 2 * EPOCH
    again, _ = resumed(make_trainer, path, lambda: plain(shuffle=True))
    trainer.fit(Seen(), plain(shuffle=True), val_loader(), ckpt_path=path)
    clean(trainer)
    clean(again)
    assert trainer.global_step == again.global_step == 2 * EPOCH
