"""Runs with a drop and LoRA."""

import copy

import lightning.pytorch as pl
import pytest
import torch

from layershed.callbacks import LoRARecovery, SublayerDrop
from tests.support.runs import (
    Foreign,
    HeadLoss,
    Watch,
    fit_foreign,
    same,
)

RANK, ALPHA = 4, 8


class Headed(HeadLoss, Foreign):
    """A transformer and a linear head of one's own after it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        torch.manual_seed(3)
        self.head = torch.nn.Linear(97, 97)


def dropping(start=4, **kwargs):
    return SublayerDrop(start, **{"count": 3, "calibration_batches": 2, "quality_batches": 0, **kwargs})


def recovery(**kwargs):
    return LoRARecovery(**{"rank": RANK, "alpha": ALPHA, **kwargs})


def refused_at_start(trainer, module, error, match):
    """It raises, and no step was taken."""
    seen = Watch(lambda *_: None)
    trainer.callbacks.append(seen)
    before = copy.deepcopy(dict(module.state_dict()))
    with pytest.raises(error, match=match):
        fit_foreign(trainer, module)
    assert trainer.global_step == 0
    assert seen.seen == []
    assert same(dict(module.state_dict()), before)


class Stop(pl.Callback):
    """Ends the run after two steps."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step >= 2
