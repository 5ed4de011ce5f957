"""Batches for calibration and quality: the right ones, and training does not notice that they are read."""

import itertools
from contextlib import nullcontext

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from layershed.callbacks import SublayerDrop
from layershed.errors import CalibrationError
from layershed.integration.loaders import calibration_batches, validation_batches
from tests.support.runs import (
    Foreign,
    HandRun,
    Lengthless,
    causal_lm,
    fit_foreign,
    loader,
    same,
    sequences,
    state_of,
    val_loader,
)
from tests.support.thinned import crossed


class Noisy(Dataset):
    """Draws from the global random state for every item, as an augmentation does."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        torch.rand(3)
        return self.items[index]


def shuffled(batches=6, seed=0, **kwargs):
    return DataLoader(Noisy(sequences(2 * batches, seed)), batch_size=2, shuffle=True, **kwargs)


@pytest.mark.default_cases(1)
@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled:UserWarning")
@pytest.mark.parametrize(("calibrate_on", "own_generator"), crossed(("train", "running", "val"), (False, True)))
def test_calibration_moves_neither_loaders_nor_random_state(make_trainer, calibrate_on, own_generator):
    """A run that measures much and one that measures little train alike, with dropout and shuffling."""

    class DropThese(SublayerDrop):
        """Ignores the scores, so that both runs drop the same."""

        def _scores(self, trainer, pl_module):
            scores = super()._scores(trainer, pl_module)
            for sublayer in scores:
                scores[sublayer] = float(sublayer.block)
            return scores

    class Losses(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_validation_end(self, trainer, pl_module):
            self.seen.append(trainer.callback_metrics["val_loss"].item())

    states = []
    for name, how, batches in (("little", "running", 0), ("much", calibrate_on, 4)):
        drop = DropThese(4, count=2, calibrate_on=how, calibration_batches=3, quality_batches=batches)
        losses = Losses()
        trainer = make_trainer(drop, losses, max_steps=12, name=name, limit_val_batches=2)
        own = [torch.Generator().manual_seed(i) if own_generator else None for i in (1, 2)]
        module = Foreign(attention_dropout=0.2)
        torch.manual_seed(7)
        trainer.fit(module, shuffled(generator=own[0]), shuffled(seed=9, generator=own[1]))
        states.append((state_of(trainer, module), torch.get_rng_state(), losses.seen))
        assert len(losses.seen) == 2
    assert same(states[0], states[1])


def test_stateful_loader_keeps_its_position_in_calibration(make_trainer, text_data):
    """Our own data: calibrating on the training split in mid-epoch reads the data beside the loader."""
    states = []
    for name, how, batches in (("little", "running", 0), ("much", "train", 4)):
        drop = SublayerDrop(3, scope="mlp", count=4, calibrate_on=how, calibration_batches=8, quality_batches=batches)
        trainer = make_trainer(drop, max_steps=12, name=name)
        module = causal_lm(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        trainer.fit(module, datamodule=text_data())
        states.append(state_of(trainer, module))
    assert same(states[0], states[1])


@pytest.mark.default_cases(3)
@pytest.mark.parametrize("kind", ["iterable", "list", "dict", "none", "no limit"])
def test_validation_batches_take_any_shape_of_loaders(make_trainer, kind):
    """Quality is measured on the first loader, and left out where there is none."""
    loaders = {
        "iterable": DataLoader(Lengthless(), batch_size=2),
        "list": [val_loader(), loader(2, seed=5)],
        "dict": {"a": val_loader(), "b": loader(2, seed=5)},
        "none": None,
        "no limit": val_loader(),
    }

    class Any(Foreign):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            pass

    class Never(Foreign):
        validation_step = pl.LightningModule.validation_step

    module = (Never if kind == "none" else Any)()
    drop = SublayerDrop(2, count=2, quality_batches=2)
    limits = {"limit_val_batches": 0} if kind == "no limit" else {}
    without = kind in ("none", "no limit")
    with pytest.warns(UserWarning, match="The run has no validation") if without else nullcontext():
        make_trainer(drop, max_steps=4, **limits).fit(module, loader(), loaders[kind])
    if without:
        assert drop.quality == {}
        return
    hand = HandRun()
    for step in hand.train(itertools.islice(loader(), 2)):
        if step == 2:
            loss, accuracy = hand.quality(itertools.islice(val_loader(), 2))
    assert drop.quality["before"].loss == pytest.approx(loss, rel=1e-5)
    assert drop.quality["before"].accuracy == pytest.approx(accuracy, abs=1e-6)
    assert set(drop.quality) == {"before", "after", "end"}


class Take(pl.Callback):
    """Reads batches in the middle of an epoch."""

    def __init__(self, read):
        self.read, self.taken = read, None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            self.taken = list(self.read(trainer))


def tokens(batches):
    return torch.cat([batch["input_ids"] for batch in batches])


@pytest.mark.parametrize("drop_last", [False, True])
def test_train_batches_come_in_order_despite_shuffling(make_trainer, drop_last):
    items = sequences(7)
    take = Take(lambda trainer: calibration_batches(trainer, "train"))
    train = DataLoader(items, batch_size=2, shuffle=True, drop_last=drop_last)
    fit_foreign(make_trainer(take, max_steps=3), train=train)
    assert [len(batch["input_ids"]) for batch in take.taken] == ([2, 2, 2] if drop_last else [2, 2, 2, 1])
    wanted = torch.stack([item["input_ids"] for item in items])
    assert torch.equal(tokens(take.taken), wanted[:6] if drop_last else wanted)


def test_train_batches_keep_the_size_of_a_batch_sampler(make_trainer):
    """Such as Lightning makes of torchdata's loader on several ranks."""

    class Batches(BatchSampler):
        pass

    items = sequences(5)
    take = Take(lambda trainer: calibration_batches(trainer, "train"))
    train = DataLoader(items, batch_sampler=Batches(RandomSampler(items), batch_size=2, drop_last=True))
    fit_foreign(make_trainer(take, max_steps=3), train=train)
    assert torch.equal(tokens(take.taken), torch.stack([item["input_ids"] for item in items[:4]]))


def test_train_batches_smaller_than_the_batch_size_are_scored(make_trainer):
    """Three sequences and a batch size of four: the run trains on them, and so they are scored."""
    drop = SublayerDrop(2, count=1, calibrate_on="train", quality_batches=0)
    fit_foreign(make_trainer(drop, max_steps=4), train=DataLoader(sequences(3), batch_size=4))
    assert len(drop.plan) == 1


def test_validation_batches_begin_anew_every_time(make_trainer):
    take = Take(lambda trainer: [*validation_batches(trainer), *validation_batches(trainer)])
    fit_foreign(make_trainer(take, max_steps=3))
    wanted = tokens(val_loader())
    assert torch.equal(tokens(take.taken), torch.cat([wanted, wanted]))


@pytest.mark.parametrize(
    "train",
    [
        DataLoader(Lengthless(), batch_size=2),
        DataLoader(sequences(6), batch_sampler=[[0, 1], [2, 3], [4, 5]]),
        [sequences(2)[0]["input_ids"][None]],
    ],
    ids=["iterable", "batch sampler", "list"],
)
def test_train_data_that_cannot_be_read_twice_is_refused_for_calibration(make_trainer, train):
    with pytest.raises(CalibrationError, match="map-style"):
        fit_foreign(make_trainer(SublayerDrop(2, count=1, calibrate_on="train"), max_steps=4), train=train)
