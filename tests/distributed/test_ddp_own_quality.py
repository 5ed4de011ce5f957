"""The module's own validation and a given plan on two ranks, and a run without a logger."""

from pathlib import Path

import pytest
import torch

import layershed as ls
from tests.support.ranks.own_quality import VALIDATION, Graded
from tests.support.runs import same, sequences


@pytest.fixture(scope="module")
def found(ddp_folder):
    return [torch.load(ddp_folder / "own_quality" / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_ddp_own_quality_is_the_mean_over_the_rows_of_both_ranks(ddp_folder, found):
    assert same(*({k: v for k, v in each.items() if k != "left"} for each in found))
    module = Graded()
    ls.bypass(module, tuple(ls.DropPlan.load(ddp_folder / "own_quality" / "own" / "drop_plan.json")))
    module.load_state_dict(found[0]["weights"])
    module.net.eval()
    items = sequences(VALIDATION, 100)
    rows = torch.stack([items[number % VALIDATION]["input_ids"] for number in range(VALIDATION + 1)])
    with torch.no_grad():
        logits = module.net(input_ids=rows, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    accuracy = (logits.argmax(-1) == rows[:, 1:]).float().mean()
    assert found[0]["quality"].keys() == {"before", "after", "end"}
    assert found[0]["quality"]["end"]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert found[0]["quality"]["end"]["val_acc"] == pytest.approx(accuracy.item(), abs=1e-6)


def test_ddp_sum_minimum_and_maximum_are_those_of_the_batches_of_both_ranks(found):
    items = sequences(VALIDATION, 100)
    shares = [[0, 2, 4], [1, 3, 0]]  # in batches of two rows
    batches = [[items[row]["input_ids"] for row in part] for rows in shares for part in (rows[:2], rows[2:])]
    means = [torch.stack(batch).float().mean().item() for batch in batches]
    expected = {"sum": sum(means), "min": min(means), "max": max(means)}
    assert found[0]["reduced"] == found[1]["reduced"] == pytest.approx(expected, rel=1e-5)


def test_ddp_validation_that_fails_on_one_rank_ends_no_run_and_gives_no_quality(found):
    assert found[0]["failing"] == found[1]["failing"] == (4, {}, 2)


def test_ddp_given_plan_is_dropped_on_both_ranks(ddp_folder, found):
    plan = ls.DropPlan.load(ddp_folder / "own_quality" / "own" / "drop_plan.json")
    assert found[0]["given"] == [sublayer.name for sublayer in sorted(plan)]


def test_ddp_ranks_share_one_temporary_directory_without_a_logger(found):
    assert found[0]["left"] == found[1]["left"] == []
    assert (Path(found[0]["temporary"]) / "drop_plan.json").is_file()
