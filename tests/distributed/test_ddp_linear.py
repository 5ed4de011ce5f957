"""Linear maps and a search on two ranks: the same on both, and that of one process over all batches."""

import copy

import pytest
import torch
from torch.utils.data import DataLoader

import layershed as ls
from layershed.callbacks import SublayerDrop
from layershed.planning.plan import DropPlan
from tests.support.ranks import linear
from tests.support.runs import BATCH, Foreign, same, sequences, val_loader
from tests.support.two_ranks import run_two_ranks


@pytest.mark.slow
def test_search_and_maps_on_two_ranks_are_those_of_one_process(tmp_path, make_trainer):
    run_two_ranks("tests.support.ranks.linear", tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert same(first, second)
    # one process that sees both shares in every step, up to the drop
    items = sequences(2 * BATCH * 5)
    both = DataLoader(items, batch_size=2 * BATCH)
    module = Foreign()
    kept = {}

    class Before(linear.Watch):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 2:
                kept["net"] = copy.deepcopy(pl_module.net)

    drop = SublayerDrop(2, count=2, method="best", calibration_batches=4, quality_batches=0)
    trainer = make_trainer(Before(None), drop, linear.Maps(None), max_steps=3)
    trainer.fit(module, both, val_loader())
    assert set(DropPlan.from_dict(first["plan"])) == set(drop.plan)
    maps = ls.fit_linear_maps(kept["net"], list(both)[:4], drop.plan)
    for sublayer, linear_map in maps.items():
        torch.testing.assert_close(first["maps"][sublayer.name], linear_map.up.weight, rtol=1e-3, atol=1e-4)
