"""A module whose batches are not text for a language model: measured by its own validation, or refused."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from layershed.callbacks import SublayerDrop
from layershed.errors import CalibrationError
from layershed.surgery import bypassed_sublayers
from tests.support.models import build_model


class Pairs(pl.LightningModule):
    """Its batches are lists of two tensors."""

    def __init__(self):
        super().__init__()
        self.net, self.steps = build_model("llama").train(), 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        ids, labels = batch
        return self.net(input_ids=ids, labels=labels).loss

    def validation_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def loader():
    ids = torch.randint(97, (8, 6), generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(ids, ids), batch_size=2)


def fit(module, tmp_path, **options):
    trainer = pl.Trainer(
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=tmp_path,
        num_sanity_val_steps=0,
        callbacks=[SublayerDrop(2, count=1, **options)],
    )
    trainer.fit(module, loader(), loader())


def test_calibration_refuses_unreadable_batches_before_training(tmp_path):
    module = Pairs()
    with pytest.raises(CalibrationError, match=r"A batch is a list\. .*Set calibrate_on='running'"):
        fit(module, tmp_path, calibrate_on="train", quality_batches=0)
    assert module.steps == 0


def test_default_quality_warns_once_of_a_validation_without_a_loss_and_the_run_goes_on(tmp_path):
    module = Pairs()
    with pytest.warns(
        UserWarning, match="the quality around the drop is left out. validation_step returns no"
    ) as caught:
        fit(module, tmp_path)
    assert len([each for each in caught if "quality" in str(each.message)]) == 1
    assert module.steps == 3
    assert len(bypassed_sublayers(module)) == 1


def test_advice_for_unreadable_batches_makes_the_run_pass(tmp_path):
    module = Pairs()
    fit(module, tmp_path, quality_batches=0, calibrate_on="running")
    assert module.steps == 3
    assert len(bypassed_sublayers(module)) == 1
