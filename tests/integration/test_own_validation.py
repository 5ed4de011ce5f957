"""Quality by the module's own validation, against plain means; a pass leaves no trace in the run."""

import csv
import warnings

import lightning.pytorch as pl
import pytest
import torch

from layershed.callbacks import SublayerDrop
from layershed.progress import listening
from layershed.quality import OwnQuality
from layershed.surgery import bypassed_sublayers
from tests.support.classifier import Ask, Classifier, by_hand, fit, sentences
from tests.support.runs import Foreign, loader, same, state_of, val_loader


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("batches", [2, 4])
def test_own_quality_is_the_mean_over_rows_and_equal_in_every_pass(make_trainer, batches):
    ask = Ask("val_acc", batches=batches)
    fit(make_trainer, ask)
    loss, accuracy = ask.expected
    assert ask.found[0].values.keys() == {"loss", "val_acc"}
    assert ask.found[0].values["loss"] == pytest.approx(loss, rel=1e-5)
    assert ask.found[0].values["val_acc"] == pytest.approx(accuracy, abs=1e-6)
    assert ask.found[0] == ask.found[1]


def test_own_quality_tells_how_far_it_is(make_trainer):
    told = []
    with listening(lambda *report: told.append(report)):
        fit(make_trainer, Ask("val_acc", batches=2))
    one_pass = [("Measuring quality", 0, 2), ("Measuring quality", 1, 2), ("Measuring quality", 2, 2)]
    assert [report for report in told if report[0] == "Measuring quality"] == [
        *one_pass,
        ("Measuring quality", None, 2),
    ] * 2


def test_random_numbers_of_a_validation_are_the_same_in_every_pass(make_trainer):
    ask = Ask("val_noise")
    fit(make_trainer, ask)
    assert ask.found[0] == ask.found[1]


class Count(pl.Callback):
    """The hooks of validation that callbacks see."""

    def __init__(self):
        self.seen = []

    def on_validation_batch_end(self, *_):
        self.seen.append("batch")

    def on_validation_end(self, trainer, pl_module):
        self.seen.append("end")


def test_own_quality_leaves_no_trace_in_the_run(make_trainer, tmp_path):
    """Metrics in the middle of an epoch, gathered outputs, random states, logged rows, and what callbacks see."""
    runs = {}
    for name in ("without", "with"):
        count, ask = Count(), Ask("val_acc")
        callbacks = [count, *([ask] if name == "with" else [])]
        module, trainer = fit(make_trainer, *callbacks, name=name, csv=True)
        with open(tmp_path / name / "metrics.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        state = state_of(trainer, module)
        own = [module.train_acc.compute().item(), module.val_acc._update_count, module.best, module.validated]
        runs[name] = state, rows, count.seen, own, module.training, torch.get_rng_state(), trainer.state.stage
    assert len(ask.found) == 2
    for alone, beside in zip(runs["without"][1:5], runs["with"][1:5], strict=True):
        assert alone == beside
    assert same(runs["without"][0], runs["with"][0])
    assert same(runs["without"][5], runs["with"][5])


def test_own_quality_gives_the_loggers_back(make_trainer):
    class Look(Classifier):
        def validation_step(self, batch, batch_idx):
            self.logger.log_metrics({"by_hand": 1.0})
            self.logger.experiment.add_scalar("by_hand", 1.0) if self.trainer.validating and self.asked else None
            return super().validation_step(batch, batch_idx)

    Look.asked = False

    class AskQuietly(Ask):
        def on_train_batch_end(self, trainer, pl_module, *args):
            before, Look.asked = trainer.loggers, True
            super().on_train_batch_end(trainer, pl_module, *args)
            Look.asked = False
            assert trainer.loggers == before
            assert "log" not in vars(pl_module)

    ask = AskQuietly(None)
    fit(make_trainer, ask, module=Look(), csv=True, val_check_interval=4)
    assert len(ask.found) == 2


REDUCED = {"sum": 10.0, "min": 1.0, "max": 4.0, "mean": 2.5}


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("how", REDUCED)
def test_logged_numbers_are_reduced_as_the_module_asks(make_trainer, how):
    class Numbered(Classifier):
        def validation_step(self, batch, batch_idx):
            number = float(batch_idx + 1)
            value = torch.tensor(number) if batch_idx % 2 else number
            self.log("number", value, reduce_fx=getattr(torch, how) if batch_idx % 2 else how, batch_size=1)

        def on_validation_epoch_end(self):
            pass

    ask = Ask("number", batches=4)
    fit(make_trainer, ask, module=Numbered())
    assert ask.found[0].values == {"number": REDUCED[how]}


FORMS = {
    "returned": lambda self, loss: loss,
    "in a dict": lambda self, loss: {"loss": loss, "preds": torch.zeros(2)},
    "val_loss in a dict": lambda self, loss: {"val_loss": loss},
    "logged": lambda self, loss: self.log("val_loss", loss),
    "logged under another name": lambda self, loss: self.log("valid/mse_loss", loss, on_epoch=True, batch_size=1),
    "logged as a mapping": lambda self, loss: self.log_dict({"a_loss": loss, "val/loss": loss}),
}


@pytest.mark.default_cases(3)
@pytest.mark.parametrize("form", FORMS)
def test_loss_is_found_where_modules_return_or_log_it(make_trainer, form):
    class Formed(Classifier):
        def validation_step(self, batch, batch_idx):
            return FORMS[form](self, self.net(**batch).loss)

        def on_validation_epoch_end(self):
            pass

    ask = Ask(None, batches=2)
    fit(make_trainer, ask, module=Formed())
    assert ask.found[0] == OwnQuality({"loss": pytest.approx(ask.expected[0], rel=1e-5)})


def test_step_without_a_number_and_with_a_loader_number_is_called_as_lightning_calls_it(make_trainer):
    class Bare(Classifier):
        def validation_step(self, batch):
            return self.net(**batch).loss

        def on_validation_epoch_end(self):
            pass

    class Several(Bare):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            assert dataloader_idx in (0, 1)
            return self.net(**batch).loss

    for module, val in ((Bare(), sentences(6, 1)), (Several(), [sentences(6, 1), sentences(6, 2)])):
        drop = SublayerDrop(2, count=1, quality_batches=2)
        make_trainer(drop, max_steps=3).fit(module, sentences(18, 0), val)
        assert drop.quality.keys() == {"before", "after", "end"}


def test_sublayer_drop_logs_the_own_quality_around_the_drop(make_trainer):
    module, trainer = fit(make_trainer, SublayerDrop(3, count=2, quality="val_acc", quality_batches=4))
    assert len(bypassed_sublayers(module)) == 2
    loss, accuracy = by_hand(module.net, list(sentences(10, 1)), 4)
    assert trainer.callback_metrics["drop/loss_end"].item() == pytest.approx(loss, rel=1e-5)
    assert trainer.callback_metrics["drop/val_acc_end"].item() == pytest.approx(accuracy, abs=1e-6)
    names = {name for name in trainer.callback_metrics if name.startswith("drop/")} - {"drop/attention", "drop/mlp"}
    assert names == {f"drop/{what}_{when}" for what in ("loss", "val_acc") for when in ("before", "after", "end")}


def test_named_quality_of_a_causal_model_is_the_modules_own(make_trainer):
    drop = SublayerDrop(2, count=2, quality="val_loss")
    make_trainer(drop, max_steps=3).fit(Foreign(), loader(), val_loader())
    assert drop.quality["before"].values.keys() == {"loss", "val_loss"}
    assert drop.quality["before"].values["loss"] == drop.quality["before"].values["val_loss"]


def warned(make_trainer, module, drop, match, val=True, steps=3):
    trainer = make_trainer(drop, max_steps=steps)
    with pytest.warns(UserWarning, match=match) as caught:
        trainer.fit(module, sentences(18, 0), sentences(6, 1) if val else None)
    assert len([each for each in caught if "quality" in str(each.message)]) == 1
    assert (trainer.global_step, drop.quality) == (steps, {})
    assert len(bypassed_sublayers(module)) == 1


def test_default_quality_without_any_validation_gives_one_warning_and_no_quality(make_trainer):
    class Never(Classifier):
        validation_step = pl.LightningModule.validation_step
        on_validation_epoch_end = pl.LightningModule.on_validation_epoch_end

    warned(
        make_trainer, Never(), SublayerDrop(2, count=1), "SublayerDrop: .*quality.*The run has no validation", val=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*LeafSpec.*|.*many workers.*|.*set_vital.*")
        make_trainer(SublayerDrop(2, count=1, quality_batches=0), max_steps=3).fit(Never(), sentences(18, 0))


def test_unlogged_quality_gives_one_warning_with_the_nearest_name(make_trainer):
    warned(make_trainer, Classifier(), SublayerDrop(2, count=1, quality="val_ac"), "'val_ac'. Did you mean 'val_acc'")


def test_failing_validation_step_gives_one_warning_and_the_run_goes_on(make_trainer):
    class Failing(Classifier):
        def validation_step(self, batch, batch_idx):
            if self.trainer.global_step:
                raise KeyError("labels")

        def on_validation_epoch_end(self):
            pass

    trainer = make_trainer(SublayerDrop(2, count=1), max_steps=3, limit_val_batches=2, check_val_every_n_epoch=9)
    with pytest.warns(UserWarning, match="quality around the drop is left out. KeyError: 'labels'"):
        trainer.fit(Failing(), sentences(18, 0), sentences(6, 1))
    assert trainer.global_step == 3
    assert not trainer.lightning_module or "log" not in vars(trainer.lightning_module)


def test_own_quality_of_an_interrupted_run_is_kept_in_its_checkpoint(make_trainer):
    drop = SublayerDrop(2, count=1, quality="val_acc", quality_batches=2)
    fit(make_trainer, drop)
    other = SublayerDrop(2, count=1, quality="val_acc")
    other.load_state_dict(drop.state_dict())
    assert other.quality == drop.quality
    assert isinstance(other.quality["after"], OwnQuality)
