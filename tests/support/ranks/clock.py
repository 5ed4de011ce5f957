"""Two ranks whose clocks differ: rank 0's counts."""

import os

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from layershed.callbacks import SublayerDrop
from layershed.errors import SpeedupError
from layershed.surgery import bypassed_sublayers
from tests.support.ranks.trainer import trainer_on_ranks
from tests.support.runs import (
    BATCH,
    sequences,
    state_of,
)
from tests.support.speed_targets import FAST, watched
from tests.support.ticking import Ticking, attentions_take_more, install, mlps_take_more

STEPS, START, WINDOW, TARGET = 6, 4, 3, 1.3


RUNS = {"target": {"target_speedup": TARGET, "objective": "speed"}, "count": {"count": 3, "objective": "speed"}}


class Upside(SublayerDrop):
    """Has it that the most important are the least."""

    def _scores(self, trainer, pl_module):
        scores = super()._scores(trainer, pl_module)
        scores.update({sublayer: 1 - score for sublayer, score in scores.items()})
        return scores


def run(folder):
    """One rank's run; by rank 1's clock and scores other sublayers would go, and another number."""
    rank = int(os.environ["RANK"])
    clock = Ticking() if rank == 0 else Ticking(decode=mlps_take_more, prefill=attentions_take_more, rest=2.0)
    with pytest.MonkeyPatch.context() as patch:
        results = _runs(folder, rank, install(patch, clock))
    torch.save(results, folder / f"{rank}.pt")


def _runs(folder, rank, clock):
    results = {}
    for name, arguments in RUNS.items():
        kind = SublayerDrop if rank == 0 else Upside
        drop = kind(START, calibration_batches=WINDOW, quality_batches=0, speed=FAST, **arguments)
        trainer = trainer_on_ranks(folder / name, [drop], max_steps=STEPS, limit_val_batches=0)
        module = watched(clock)
        items = sequences(2 * BATCH * STEPS)
        share = DistributedSampler(items, num_replicas=2, rank=rank, shuffle=False)
        trainer.fit(module, DataLoader(items, batch_size=BATCH, sampler=share))
        results[name] = {
            "state": state_of(trainer, module),
            "plan": drop.plan.to_dict(),
            "bypassed": [(s.block, s.kind) for s in bypassed_sublayers(module)],
            "speedup": drop.speedup,
        }
    far = SublayerDrop(START, quality_batches=0, speed=FAST, target_speedup=5.0)  # by rank 1's clock within reach
    try:
        trainer_on_ranks(folder / "far", [far], max_steps=STEPS, limit_val_batches=0).fit(
            watched(clock), DataLoader(items, batch_size=BATCH, sampler=share)
        )
    except SpeedupError as error:
        results["refused"] = str(error)
    return results
