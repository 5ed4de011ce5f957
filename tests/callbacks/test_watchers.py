"""A watching callback never ends a run: what it cannot measure, write or read is left out with one warning."""

import csv
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader

from layershed.callbacks import RedundancyMonitor, Report, SublayerDrop
from layershed.discovery.find import find_sublayers
from layershed.spellings import recompute_activations
from layershed.surgery import bypass
from tests.support.runs import Foreign, Save, fit_foreign
from tests.support.seq2seq import batch, by_hand, seq2seq


class Seq2Seq(pl.LightningModule):
    """Somebody's module with a head of its own; ``run`` takes the transformer and a batch."""

    def __init__(self, run, **overrides):
        super().__init__()
        self.net, self.run = seq2seq(**overrides).train(), run
        self.head = torch.nn.Linear(32, 1)

    def training_step(self, inputs, batch_idx):
        return self.head(self.run(self.net, inputs)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def whole(model, inputs):
    return model.model(**inputs)[0]


def fit(trainer, module, count=6):
    """Train on that many batches; the texts of the warnings of the callbacks."""
    torch.manual_seed(0)
    batches = DataLoader([batch(seed) for seed in range(count)], batch_size=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, batches)
    return [str(w.message) for w in caught if str(w.message).startswith(("RedundancyMonitor", "Report"))]


def rows(folder):
    with open(folder / "importance.csv", encoding="utf-8", newline="") as file:
        return {(int(row["step"]), int(row["block"]), row["kind"]): float(row["value"]) for row in csv.DictReader(file)}


def test_run_under_layerdrop_ends_with_rows_for_the_blocks_that_ran(make_trainer, tmp_path):
    module, ran = Seq2Seq(whole, encoder_layerdrop=0.5, decoder_layerdrop=0.5), set()
    trainer = make_trainer(RedundancyMonitor(1), max_steps=12)
    for place, block in enumerate([*module.net.model.encoder.layers, *module.net.model.decoder.layers]):
        block.register_forward_hook(
            lambda block, *_, place=place: ran.add((trainer.global_step + 1, place)) if block.training else None
        )
    said = fit(trainer, module, count=12)
    assert trainer.global_step == 12
    assert {(step, block) for step, block, _ in rows(tmp_path / "run")} == ran
    assert 0 < len(ran) < 72
    assert len([text for text in said if "did not run" in text]) == 1
    assert len(said) <= 2, said  # a step in which no block ran has its own


def test_encoder_and_decoder_called_by_hand_have_the_rows_of_the_model(make_trainer, tmp_path):
    for name, run in (("whole", whole), ("by_hand", by_hand)):
        assert fit(make_trainer(RedundancyMonitor(1), name=name, max_steps=3), Seq2Seq(run)) == []
    expected, found = rows(tmp_path / "whole"), rows(tmp_path / "by_hand")
    assert len(expected) == 3 * 21
    assert found == pytest.approx(expected, rel=1e-4)


def test_gradient_checkpointing_by_hand_counts_each_block_once(make_trainer, tmp_path):
    for name in ("plain", "checkpointed"):
        module = Seq2Seq(by_hand)
        module.automatic_optimization = False

        def step(inputs, batch_idx, module=module):
            module.manual_backward(module.head(by_hand(module.net, inputs)).square().mean())
            module.optimizers().step()
            module.optimizers().zero_grad()

        module.training_step = step
        if name == "checkpointed":
            recompute_activations(module.net, {"use_reentrant": False})
        assert fit(make_trainer(RedundancyMonitor(1), name=name, max_steps=3), module) == []
    assert rows(tmp_path / "checkpointed") == pytest.approx(rows(tmp_path / "plain"), rel=1e-5)


def test_mask_that_cannot_be_read_is_warned_of_once_and_left_out(make_trainer, tmp_path):
    def run(model, inputs):
        mask = torch.ones(2, 1, 9, 9).tril()  # floats of 0 and 1, which transformers adds
        states = model.model.encoder(input_ids=inputs["input_ids"], attention_mask=mask)[0]
        return model.model.decoder(input_ids=inputs["decoder_input_ids"], encoder_hidden_states=states)[0]

    trainer = make_trainer(RedundancyMonitor(1), max_steps=4)
    said = fit(trainer, Seq2Seq(run))
    assert trainer.global_step == 4
    assert len(said) == 1
    assert "floats of 0 and 1" in said[0]
    assert {(step, block) for step, block, _ in rows(tmp_path / "run")} == {
        (s, b) for s in range(1, 5) for b in (3, 4, 5)
    }


def test_mask_of_another_length_is_warned_of_once_and_left_out(make_trainer):
    def odd(model, inputs):
        return model.model.encoder(input_ids=inputs["input_ids"], attention_mask=torch.ones(2, 5))[0]

    module = Seq2Seq(odd)
    plain = module.net.model.encoder.forward
    module.net.model.encoder.forward = lambda input_ids=None, attention_mask=None, **more: plain(input_ids, **more)
    trainer = make_trainer(RedundancyMonitor(1), max_steps=3)
    said = fit(trainer, module)
    assert trainer.global_step == 3
    assert len(said) == 1
    assert "it has the shape (2, 5)" in said[0]


def test_step_without_the_model_is_warned_of_once(make_trainer, tmp_path):
    trainer = make_trainer(RedundancyMonitor(1), max_steps=4)
    said = fit(trainer, Seq2Seq(lambda model, inputs: torch.ones(1, 32)))
    assert trainer.global_step == 4
    assert len(said) == 1
    assert "step 1: No token was seen" in said[0]
    assert rows(tmp_path / "run") == {}


def test_monitor_of_a_model_whose_sublayers_are_all_dropped_ends_no_run(make_trainer, tmp_path):
    module = Foreign()
    trainer = make_trainer(RedundancyMonitor(1), DropAll(2), max_steps=4)
    with pytest.warns(UserWarning, match="step 3: Nothing is left to measure: every sublayer is dropped"):
        fit_foreign(trainer, module)
    assert {step for step, *_ in rows(tmp_path / "run")} == {1, 2}


class At(pl.Callback):
    """Does something at the end of the step with this number."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            self.act(trainer, pl_module)


class DropAll(At):
    """Drops everything."""

    def act(self, trainer, pl_module):
        bypass(pl_module, find_sublayers(pl_module))


class Ruin(At):
    """Puts a folder in the place of importance.csv."""

    def act(self, trainer, pl_module):
        file = Path(trainer.default_root_dir) / "importance.csv"
        file.unlink()
        file.mkdir()


class AddMonitor(At):
    """Adds a monitor during training."""

    def act(self, trainer, pl_module):
        trainer.callbacks.append(RedundancyMonitor(1))


def test_file_that_cannot_be_written_ends_no_run_and_no_checkpoint(make_trainer, tmp_path):
    saves = [Save(tmp_path / f"{step}.ckpt", step) for step in (3, 5)]
    trainer = make_trainer(RedundancyMonitor(1), Ruin(2), *saves, max_steps=6)
    with pytest.warns(UserWarning, match="RedundancyMonitor: .* left out") as caught:
        fit_foreign(trainer)
    said = [str(w.message) for w in caught if str(w.message).startswith("RedundancyMonitor")]
    assert trainer.global_step == 6
    assert len([text for text in said if "rows of importance.csv left out" in text]) == 1
    assert len([text for text in said if "in a checkpoint left out" in text]) == 1
    assert len(said) == 2
    assert (tmp_path / "5.ckpt").exists()


def test_monitor_that_is_added_during_training_is_warned_of_once(make_trainer):
    trainer = make_trainer(AddMonitor(1), max_steps=4)
    with pytest.warns(UserWarning, match="added after training began") as caught:
        fit_foreign(trainer)
    assert trainer.global_step == 4
    assert len([w for w in caught if "added after" in str(w.message)]) == 1


class Failing(Logger):
    """A logger whose server does not answer."""

    name, version = "failing", "0"

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        if any("importance" in name for name in metrics):
            raise ConnectionError("no answer")


def test_logger_that_fails_on_importances_ends_no_run(make_trainer, tmp_path):
    trainer = make_trainer(RedundancyMonitor(1), max_steps=4)
    trainer.loggers = [Failing()]
    with pytest.warns(UserWarning, match="a measurement left out. ConnectionError: no answer") as caught:
        fit_foreign(trainer)
    assert trainer.global_step == 4
    assert len([w for w in caught if "no answer" in str(w.message)]) == 1


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("file", ["importance.csv", "drop_plan.json", "report.html"])
def test_report_leaves_out_what_it_cannot_read_or_write(make_trainer, tmp_path, file):
    class Spoil(At):
        def act(self, trainer, pl_module):
            path = tmp_path / "run" / file
            path.unlink(missing_ok=True)
            path.mkdir() if file == "report.html" else path.write_text("{not a row")

    trainer = make_trainer(
        Report(1), RedundancyMonitor(1), SublayerDrop(2, count=1, quality_batches=0), Spoil(4), max_steps=4
    )
    with pytest.warns(UserWarning, match="Report: .* left out") as caught:
        fit_foreign(trainer)
    assert len([w for w in caught if str(w.message).startswith("Report")]) == 1
    assert trainer.state.finished
    assert (tmp_path / "run" / "report.html").is_file() == (file != "report.html")
