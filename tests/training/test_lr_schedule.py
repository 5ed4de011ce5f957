"""Schedules equal those of transformers and span the length of the run."""

import math

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import get_scheduler

from layershed.training.causal_lm import CausalLM
from layershed.training.lr_schedule import share_of_peak
from tests.support.models import SIZES

CONFIG = {"model_type": "llama", **SIZES, "num_hidden_layers": 1}


@pytest.mark.parametrize("warmup", [0, 3, 20])
@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_share_of_peak_equals_the_schedules_of_transformers(name, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=9)
    wanted = scheduler.lr_lambdas[0]
    for step in range(12):
        assert share_of_peak(name, step, warmup, 9) == pytest.approx(wanted(step), abs=1e-15)


@pytest.mark.parametrize(
    ("length", "steps"),
    [
        ({"max_steps": 5}, 5),
        ({"max_epochs": 3}, 24),
        ({"max_epochs": 3, "max_steps": 10}, 10),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, 6),
        ({"max_epochs": 2, "limit_train_batches": 5}, 10),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 8),
    ],
    ids=["steps", "epochs", "the shorter", "accumulated", "limited", "share"],
)
def test_schedule_ends_at_the_last_optimizer_step(length, steps, tmp_path):
    """Eight batches per epoch. The rate of a linear schedule is 0 only after the last step."""
    rates = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step > len(rates):
                rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    rows = [{"input_ids": torch.arange(3, 11), "labels": torch.arange(3, 11)} for _ in range(16)]
    module = CausalLM(config=CONFIG, schedule="linear", optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[Look()],
        limit_val_batches=0,
        **length,
    )
    trainer.fit(module, DataLoader(rows, batch_size=2), DataLoader(rows, batch_size=2))
    assert trainer.estimated_stepping_batches == steps
    assert rates == pytest.approx([1 - step / steps for step in range(1, steps + 1)])
    assert not math.isclose(rates[-2], 0)
