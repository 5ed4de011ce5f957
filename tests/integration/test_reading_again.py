"""What a fresh pair of eyes found of an epoch that is read again: where data may be others, and it was not said."""

import logging
import random
import warnings
from dataclasses import dataclass

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.trainer.states import TrainerStatus
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from layershed.integration.digest import digest
from layershed.integration.rng import of_every_rank, own_generators
from tests.integration.test_epoch_start import (  # noqa: F401  run is a fixture
    BEGINS_ANEW,
    BY_TURNS,
    EPOCH,
    LIGHTNINGS,
    READ_AGAIN,
    Killed,
    Private,
    Seen,
    Stream,
    cut,
    of_torch,
    plain,
    resumed,
    run,
)
from tests.support.runs import BATCH, same, sequences, state_of

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")

OTHERS = "may be others, too"
LOG = logging.getLogger("lightning.pytorch")


def columns(items):
    """A batch with tensors whose memory is not in one piece."""
    ids = torch.stack([item["input_ids"] for item in items])
    return {"input_ids": ids, "first": ids[:, 0], "weight": torch.tensor(0.5).expand(len(ids)), "every": ids[:, ::2]}


@pytest.mark.parametrize("loader", [DataLoader, StatefulDataLoader])
def test_no_batch_ends_a_run(make_trainer, loader):
    resumed(make_trainer, None, lambda: loader(sequences(BATCH * EPOCH), BATCH, collate_fn=columns), max_steps=4)


def test_a_digest_reads_what_is_not_in_one_piece_and_into_objects():
    @dataclass
    class Pair:
        left: object
        right: object

    ones, loop = torch.ones(4, 5), []
    loop.append(loop)
    parts = [ones[:, 0], ones[:1, 0], ones[0, :1].expand(6), ones[::2], ones.t()[:2], torch.ones(7, device="meta")]
    parts += [Pair(ones, 1), Pair(ones, 2), Pair(ones[1:], 1), loop, ones.to_sparse()]
    digests = [digest(part) for part in parts]
    assert len({*digests}) == len(digests)
    assert digest(ones[:, 0]) == digest(torch.ones(4)), "of equal values, however they stand in memory"


class Choosing(Sampler):
    """Without replacement, one at a time, by a generator that the model draws from, too."""

    def __init__(self, items, below=of_torch):
        self.items, self.below = items, below

    def __len__(self):
        return len(self.items)

    def __iter__(self):
        left = list(range(len(self.items)))
        while left:
            yield left.pop(self.below(len(left)))


class Own:
    """An iterable of somebody's own, with a length."""

    def __init__(self):
        self.items = sequences(BATCH * EPOCH)

    def __len__(self):
        return EPOCH

    def __iter__(self):
        chosen = iter(Choosing(self.items))
        for _ in range(EPOCH):
            yield {"input_ids": torch.stack([self.items[next(chosen)]["input_ids"] for _ in range(BATCH)])}


def by_batch_sampler():
    items = sequences(BATCH * EPOCH)
    return DataLoader(items, batch_sampler=BatchSampler(Choosing(items), BATCH, drop_last=False))


def by_sampler():
    items = sequences(BATCH * EPOCH)
    return plain(items, sampler=Choosing(items))


class Gambling(Seen):
    """Draws from every generator, as the streams do."""

    def training_step(self, batch, batch_idx):
        random.random()
        np.random.random()
        return super().training_step(batch, batch_idx)


def of_numpy(count):
    return int(np.random.randint(count))


AS_IT_GOES = {
    "a sampler": (by_sampler, Seen),
    "one within a batch sampler": (by_batch_sampler, Seen),
    "an iterable": (Own, Seen),
    "a stream by Python's": (lambda: plain(Stream(random.randrange)), Gambling),
    "a stream by NumPy's": (lambda: plain(Stream(of_numpy)), Gambling),
}


@pytest.mark.parametrize("case", AS_IT_GOES)
def test_who_chooses_by_turns_with_the_model_is_told_that_data_may_be_others(run, tmp_path, case):  # noqa: F811
    train, kind = AS_IT_GOES[case]
    np.random.seed(3)
    seen, _ = run(train, kind=kind)
    np.random.seed(3)
    run(train, 4, kind=kind)
    with pytest.warns(UserWarning, match=BY_TURNS):
        again, _ = run(train, None, tmp_path / "4.ckpt", kind=kind)
    assert again != seen[4:], "else there is nothing to tell"


class LongestFirst(Private):
    """Its first batch is always the same; the others are shuffled by a generator that nobody knows."""

    def __iter__(self):
        first = list(range(BATCH))
        return iter([*first, *self.random.sample(range(BATCH, len(self.data_source)), len(self.data_source) - BATCH)])


def longest_first():
    items = sequences(BATCH * EPOCH)
    return plain(items, sampler=LongestFirst(items))


def changed_later():
    return plain([*sequences(BATCH * EPOCH)[:BATCH], *sequences(BATCH * (EPOCH - 1), seed=1)])


@pytest.mark.parametrize(
    ("first", "second", "kill"), [(longest_first, longest_first, EPOCH + 4), (plain, changed_later, 4)]
)
def test_another_last_batch_is_found_out(make_trainer, tmp_path, first, second, kill):
    path = tmp_path / "cut.ckpt"
    cut(make_trainer, path, first, batch=kill)
    with pytest.warns(UserWarning, match=OTHERS):
        resumed(make_trainer, path, second)


@dataclass
class Row:
    input_ids: torch.Tensor

    def __getitem__(self, name):
        return getattr(self, name)

    def get(self, _name):
        return None


def by_objects():
    items = sequences(BATCH * EPOCH)
    return plain(
        items, sampler=Private(items), collate_fn=lambda rows: Row(torch.stack([r["input_ids"] for r in rows]))
    )


@pytest.mark.filterwarnings(LIGHTNINGS, "ignore:Trying to infer the `batch_size`")
def test_batches_of_objects_are_looked_into(make_trainer, tmp_path):
    path = tmp_path / "cut.ckpt"
    cut(make_trainer, path, by_objects, batch=EPOCH + 4)
    with pytest.warns(UserWarning, match=BEGINS_ANEW):
        resumed(make_trainer, path, by_objects)


class KillAtStart(pl.Callback):
    """Saves and dies before that batch is trained on, as ModelCheckpoint(save_on_exception=True) would."""

    def __init__(self, path, batch):
        self.path, self.batch = path, batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.batch:
            trainer.save_checkpoint(self.path)
            raise Killed


@pytest.mark.parametrize("batch", [1, 4, EPOCH + 1, EPOCH + 3])
def test_a_batch_that_was_under_way_is_the_same_again(make_trainer, tmp_path, batch):
    def train():
        return plain(shuffle=True)

    torch.manual_seed(7)
    whole, module = resumed(make_trainer, None, train, max_steps=2 * EPOCH)
    path = tmp_path / "cut.ckpt"
    torch.manual_seed(7)
    with pytest.raises(Killed):
        resumed(make_trainer, None, train, Seen, KillAtStart(path, batch), max_steps=2 * EPOCH)
    torch.manual_seed(8)
    trainer, again = resumed(make_trainer, path, train, max_steps=2 * EPOCH)
    assert [row for *_, row in again.seen] == [row for *_, row in module.seen[batch - 1 :]]
    assert same(state_of(trainer, again), state_of(whole, module))


def test_gradients_that_a_checkpoint_does_not_hold_are_told_of(make_trainer, tmp_path):
    path = tmp_path / "cut.ckpt"
    settings = {"accumulate_grad_batches": 2, "max_steps": EPOCH}
    for batch, told in ((3, True), (4, False)):
        with pytest.raises(Killed):
            resumed(make_trainer, None, plain, Seen, KillAtStart(path, batch + 1), **settings)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            resumed(make_trainer, path, plain, **settings)
        assert any("between two optimizer steps" in str(each.message) for each in caught) == told


def test_workers_that_are_new_are_told_of(make_trainer, tmp_path, caplog):
    def train():
        return plain(num_workers=1, persistent_workers=True)

    path = tmp_path / "cut.ckpt"
    LOG.addHandler(caplog.handler)
    for batch, told in ((4, False), (EPOCH + 4, True)):
        cut(make_trainer, path, train, batch=batch)
        caplog.clear()
        resumed(make_trainer, path, train)
        assert any(READ_AGAIN in each.getMessage() for each in caplog.records)
        assert any("worker processes are new" in each.getMessage() for each in caplog.records) == told
    LOG.removeHandler(caplog.handler)


def test_the_generator_of_a_sampler_that_lightning_wraps_is_found():
    items = sequences(4)
    generator = torch.Generator()
    wrapped = DistributedSamplerWrapper(RandomSampler(items, generator=generator), num_replicas=2, rank=0)
    assert own_generators(plain(items, sampler=wrapped)) == [generator]


def test_a_rank_that_has_raised_an_error_waits_for_nobody(make_trainer, monkeypatch):
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
