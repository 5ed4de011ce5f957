"""What two ranks drop, hold and write, against one process by hand."""

import json

import pytest
import torch

from layershed import load_pretrained
from layershed.surgery import dropped_sublayers
from tests.support.ranks.files import RUNS, START, STEPS, WINDOW
from tests.support.runs import (
    BATCH,
    FILES,
    HandRun,
    ranked,
    same,
    sequences,
    val_loader,
)


@pytest.fixture(scope="module")
def ranks(ddp_folder):
    """What both ranks saved, and the folder of their files."""
    folder = ddp_folder / "files"
    found = {how: [torch.load(folder / how / f"{how}-{rank}.pt", weights_only=True) for rank in (0, 1)] for how in RUNS}
    return folder, found


@pytest.mark.parametrize("calibrate_on", ["running", "train"])
def test_ddp_ranks_drop_the_same_and_hold_equal_weights(ranks, calibrate_on):
    _, found = ranks
    first, second = (result["whole"] for result in found[calibrate_on])
    assert same(first["state"], second["state"])
    assert first["plan"] == second["plan"]
    assert first["bypassed"] == second["bypassed"]
    assert first["quality"] == second["quality"]
    assert first["losses"] != second["losses"]  # they did see different data


@pytest.mark.parametrize("calibrate_on", ["running", "train"])
def test_ddp_run_equals_one_process_over_the_batches_of_both(ranks, calibrate_on):
    """By hand in one process: each step averages the gradients of both ranks' batches."""
    _, found = ranks
    items = sequences(2 * BATCH * STEPS)
    batches = [
        next(iter(torch.utils.data.DataLoader(items[rank::2][BATCH * step : BATCH * (step + 1)], batch_size=BATCH)))
        for step in range(STEPS)
        for rank in (0, 1)
    ]
    hand = HandRun(accumulate=2)
    quality = {}
    for step in hand.train(batches):
        if step == START - WINDOW:
            hand.seen()
        if step == START:
            running = hand.seen()
            scores = running if calibrate_on == "running" else hand.importances(batches[: 2 * WINDOW])
            quality["before"] = hand.quality(val_loader(4))
            hand.drop(ranked(scores, "joint", 3))
            quality["after"] = hand.quality(val_loader(4))
    quality["end"] = hand.quality(val_loader(4))
    result = found[calibrate_on][0]["whole"]
    drops = result["plan"]["drops"]
    assert [(entry["block"], entry["kind"]) for entry in drops] == hand.dropped
    assert [entry["score"] for entry in drops] == pytest.approx([scores[key] for key in hand.dropped], rel=1e-4)
    for when, (loss, accuracy) in quality.items():
        assert result["quality"][when] == (pytest.approx(loss, rel=1e-4), pytest.approx(accuracy, abs=1e-6))
    for name, weight in hand.module.state_dict().items():
        torch.testing.assert_close(result["state"]["weights"][name], weight, rtol=1e-4, atol=1e-5)


def test_ddp_drop_resumed_equals_uninterrupted(ranks):
    """Cut within the window: every rank continues with its own sums."""
    folder, found = ranks
    for result in found["running"]:
        whole, resumed = result["whole"], result["resumed"]
        assert resumed["losses"] == whole["losses"][START - 1 :]
        assert same({**resumed, "losses": 0}, {**whole, "losses": 0})
    written = [(folder / "running" / name / "importance.csv").read_text() for name in ("whole", "resumed")]
    assert written[0] == written[1]
    assert len(written[0].splitlines()) > 1 + 2 * 12


def test_ddp_ranks_write_every_file_once_and_whole(ranks):
    folder, found = ranks
    assert {path.name for path in (folder / "running" / "whole").iterdir()} == FILES
    assert len(dropped_sublayers(load_pretrained(folder / "running" / "whole" / "pruned"))) == 3
    plan = json.loads((folder / "running" / "whole" / "drop_plan.json").read_text())
    assert plan == found["running"][0]["whole"]["plan"]
