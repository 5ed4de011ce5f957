"""How often the host waits for the device: a watched step no more often than an unwatched one, a quality pass once."""

import warnings
from collections import Counter

import lightning.pytorch as pl
import pytest
import torch
from torchmetrics import MeanMetric

import layershed as ls
from layershed.callbacks import ExactResume, RedundancyMonitor, Report, SpeedMonitor, SublayerDrop
from layershed.integration.own_validation import own_quality
from tests.support.models import build_model, some
from tests.support.runs import Foreign, loader
from tests.support.simulated.lightning import make_trainer
from tests.support.simulated.tensors import PLACES, SIM, WAITS, waits
from tests.support.thinned import one_of

IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))


def batches(count=3, place=SIM):
    mask = torch.ones_like(IDS).index_fill(1, torch.tensor([11]), 0)
    return [{"input_ids": IDS.roll(i, 1).to(place), "attention_mask": mask.to(place)} for i in range(count)]


def waits_of_passes(model, given):
    """What transformers itself waits for in a forward pass of every batch."""
    with waits() as noted, torch.no_grad():
        for batch in given:
            model(**batch, use_cache=False)
    return noted


def test_quality_pass_waits_once():
    model, given = build_model().to(SIM), batches()
    expected = waits_of_passes(model, given)
    with waits() as noted:
        ls.evaluate_quality(model, given)
    assert noted - expected == {"read": 1}, PLACES
    assert not expected - noted


def test_quality_pass_over_batches_of_the_cpu_waits_for_their_transfers_and_once_more():
    model, given = build_model().to(SIM), batches(place="cpu")
    expected = waits_of_passes(model, batches())
    with waits() as noted:
        ls.evaluate_quality(model, given)
    assert noted - expected == {"read": 1, "sent": 2 * len(given)}, PLACES


def test_importance_pass_waits_no_more_often_for_more_batches():
    model, more = build_model().to(SIM), []
    for count in (1, 4):
        given = batches(count)
        expected = waits_of_passes(model, given)
        with waits() as noted:
            ls.estimate_importance(model, given)
        more.append(noted - expected)
    assert more[0] == more[1], PLACES


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("kind", ["kl", "both"])
def test_distillation_waits_only_where_its_two_passes_do(kind):
    model, [batch] = build_model().to(SIM), batches(1)
    ls.bypass(model, some(model))
    with waits() as passes:
        for _ in range(2):
            model(**batch, labels=batch["input_ids"], use_cache=False)
    with waits() as noted:
        ls.self_distillation_loss(model, batch, kind=kind).backward()
    assert not noted - passes, PLACES


OUT_OF_RANGE = {
    "ids": ({"input_ids": IDS + 90}, "has 97 embeddings"),
    "negative ids": ({"input_ids": IDS - 90}, "input_ids of a batch hold -"),
    "labels": ({"input_ids": IDS, "labels": IDS + 90}, r"labels of a batch must be -100 or in \[0, 97\)"),
}


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_numbers_out_of_range_are_refused_and_never_reach_the_device(name):
    """A GPU's process does not survive an index that is out of range; here the CPU's kernel would raise IndexError."""
    batch, message = OUT_OF_RANGE[name]
    batch = {key: value.to(SIM) for key, value in batch.items()}
    model = build_model().to(SIM)
    readers = [ls.evaluate_quality] if name == "labels" else [ls.evaluate_quality, ls.estimate_importance]
    for read in readers:
        with pytest.raises(ls.errors.BatchError, match=message):
            read(model, [*batches(1), batch, *batches(1)])


class Graded(Foreign):
    """Logs numbers of every kind in validation, and keeps state."""

    def __init__(self):
        super().__init__(num_hidden_layers=2)
        self.val_mean, self.history = MeanMetric(nan_strategy="disable"), {"losses": []}
        self.register_buffer("seen", torch.zeros(()))

    def validation_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.val_mean.update(loss)
        self.seen += 1
        self.history["losses"].append(loss)
        self.log_dict({"val_loss": loss, "val_mean": self.val_mean, "val_number": 1.0})  # the host knows that number
        self.log("val_max", loss, reduce_fx="max")
        return loss

    def on_validation_epoch_end(self):
        self.log("val_shown", self.trainer.callback_metrics["val_loss"])


class Pass(pl.Callback):
    """Notes the waits of passes of the module's own validation, and of its forward passes alone."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        given = [{"input_ids": IDS.roll(i, 1).to(SIM)} for i in range(3)]
        pl_module.eval()
        with torch.no_grad(), waits() as self.steps:
            for each in given:
                pl_module.loss(each)
        pl_module.train()
        own_quality(trainer, pl_module, given, 3, "val_mean")
        with waits() as self.noted:
            self.quality = own_quality(trainer, pl_module, given, 3, "val_mean")


def test_pass_of_the_own_validation_waits_once(tmp_path):
    """However much it logs, and whatever state must be kept."""
    found = Pass()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(tmp_path, found, max_steps=1, limit_val_batches=1, val_check_interval=1)
        trainer.fit(Graded(), loader(2), loader(2))
    assert found.quality.values["val_mean"] == pytest.approx(found.quality.values["loss"], rel=1e-5)
    assert found.noted - found.steps == {"read": 1}, PLACES


class Steps(pl.Callback):
    """Notes the waits of every batch, from its start to the start of the next one."""

    def __init__(self):
        self.steps, self.before = [], None

    def on_train_batch_start(self, *_):
        self._note()
        self.before = Counter(WAITS)

    def on_train_end(self, *_):
        self._note()

    def _note(self):
        if self.before is not None:
            self.steps.append(Counter(WAITS) - self.before)


class Unlogged(Foreign):
    """As Foreign, but it writes nothing to a logger, which would wait."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch)


def steps_of(folder, *callbacks):
    """Waits of each of eight optimizer steps."""
    steps = Steps()
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(folder, steps, *callbacks, limit_val_batches=0)
        trainer.fit(Unlogged(num_hidden_layers=2), loader(8))
    return steps.steps


WATCHERS = {
    "RedundancyMonitor": (lambda: [RedundancyMonitor(every_n_steps=3)], {3: 1, 6: 1}),
    "every metric": (
        lambda: [RedundancyMonitor(every_n_steps=4, metric=name) for name in sorted(ls.METRICS)],
        {4: 3, 8: 3},
    ),
    "all": (
        lambda: [
            RedundancyMonitor(every_n_steps=5),
            Report(every_n_steps=1),
            SpeedMonitor(prompt_tokens=8, new_tokens=2),
            ExactResume(),
        ],
        {5: 1},
    ),
}


@pytest.mark.parametrize("name", one_of(WATCHERS))
def test_watched_step_waits_only_at_its_measured_end(name, tmp_path):
    make, expected = WATCHERS[name]
    plain = steps_of(tmp_path / "plain")
    watched = steps_of(tmp_path / "watched", *make())
    assert len(plain) == len(watched) == 8
    more = {step: own - other for step, (own, other) in enumerate(zip(watched, plain, strict=True), 1) if own != other}
    assert more == {step: Counter(read=number) for step, number in expected.items()}, PLACES


@pytest.mark.slow
def test_steps_before_and_after_a_drop_wait_no_more_often(tmp_path):
    plain = steps_of(tmp_path / "plain")
    dropped = steps_of(tmp_path / "dropped", SublayerDrop(start=4, count=2, quality_batches=0))
    quiet = [step for step in range(8) if step != 3]
    assert dropped[3] != plain[3]
    assert [dropped[step] for step in quiet] == [plain[step] for step in quiet], PLACES


CAUSAL = torch.ones(12, 12, dtype=torch.bool).tril().expand(2, 1, 12, 12)
LOWEST = torch.finfo(torch.float32).min


def pass_with(mask):
    """A watched pass with a mask of pairs; returns its tracker, and the waits beyond those of an unwatched pass."""
    model, [batch] = build_model(attn_implementation="eager", num_hidden_layers=3).to(SIM), batches(1)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": mask.to(SIM)}
    tracker = ls.ImportanceTracker(model)
    with torch.no_grad(), tracker:
        with waits() as plain:
            model(**inputs, use_cache=False)
        with tracker.measuring(), waits() as watched:
            model(**inputs, use_cache=False)
    return tracker, watched - plain


def test_watched_pass_with_a_mask_of_pairs_does_not_wait():
    padded = CAUSAL.clone()
    padded[1, ..., 10:] = False
    tracker, more = pass_with(torch.zeros(padded.shape).masked_fill(~padded, LOWEST))
    assert not more, PLACES
    assert tracker.compute().tokens == 22


def test_unreadable_mask_on_the_device_is_refused_when_the_importances_are_read():
    tracker, more = pass_with(CAUSAL.float())
    assert not more, PLACES
    with pytest.raises(ls.errors.CalibrationError, match="floats of 0 and 1"):
        tracker.compute()
    tracker.reset()
    with pytest.raises(ls.errors.CalibrationError, match="No token was seen"):
        tracker.compute()
