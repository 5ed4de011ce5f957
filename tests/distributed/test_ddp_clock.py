"""SublayerDrop with a target speedup on two ranks, against a run by hand."""

import itertools

import pytest
import torch
from torch.utils.data import DataLoader

from tests.support.ranks.clock import START, STEPS, TARGET, WINDOW
from tests.support.runs import (
    BATCH,
    HandRun,
    same,
    sequences,
)
from tests.support.speed_targets import enough, queue
from tests.support.ticking import Ticking, mlps_take_more


def test_ddp_target_speedup_uses_the_clock_of_rank_zero(ddp_folder):
    found = [torch.load(ddp_folder / "clock" / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert same(*found)
    assert "x4.75" in found[0]["refused"]
    clock, other = Ticking(), Ticking(decode=mlps_take_more, rest=2.0)
    items = sequences(2 * BATCH * STEPS)
    batches = [
        next(iter(DataLoader(items[rank::2][BATCH * step : BATCH * (step + 1)], batch_size=BATCH)))
        for step in range(STEPS)
        for rank in (0, 1)
    ]
    for name, result in found[0].items():
        if name == "refused":
            continue

        def choose(scores, clock=clock, name=name):
            order = queue(scores, "joint", "speed", clock.decode)
            return enough(clock, order, TARGET) if name == "target" else [*itertools.chain(*order[:3])]

        hand = HandRun(accumulate=2)
        for step in hand.train(batches):
            if step == START - WINDOW:
                hand.seen()
            if step == START:
                scores = hand.seen()
                hand.drop(choose(scores))
        assert set(hand.dropped) != set(choose(scores, other)), "else the clocks would not matter here"
        assert [(entry["block"], entry["kind"]) for entry in result["plan"]["drops"]] == hand.dropped
        assert set(result["bypassed"]) == set(hand.dropped)
        for key, weight in hand.module.state_dict().items():
            torch.testing.assert_close(result["state"]["weights"][key], weight, rtol=1e-4, atol=1e-5)
    assert found[0]["target"]["speedup"] == pytest.approx(
        clock.speedup([(entry["block"], entry["kind"]) for entry in found[0]["target"]["plan"]["drops"]])
    )
