"""Weights that are unfrozen during a run on two ranks: averaged over the ranks from then on, dropped ones left out."""

import pytest
import torch

from tests.support.finetuned import DROPS
from tests.support.ranks.unfreezing import CUTS
from tests.support.runs import same
from tests.support.two_ranks import run_two_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The results of both ranks."""
    folder = tmp_path_factory.mktemp("unfreezing")
    run_two_ranks("tests.support.ranks.unfreezing", folder, timeout=600)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("name", DROPS)
def test_ddp_ranks_stay_equal_when_a_callback_unfreezes_and_a_resumed_run_equals_it(ranks, name, unused):
    first, second = (rank[name, unused, None] for rank in ranks)
    assert first.get("error") is None
    assert same(first["state"], second["state"])
    assert len(first["dropped"]) == 3
    assert first["frozen"] == second["frozen"] == []
    assert any(path.startswith("backbone.") for path in first["trainable"])
    for cut in CUTS:
        for rank in ranks:
            assert same(rank[name, unused, cut], rank[name, unused, None]), cut


def test_twenty_alternations_of_what_trains_leave_one_wrapper_and_equal_ranks(tmp_path):
    run_two_ranks("tests.support.ranks.alternating", tmp_path, timeout=300)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same(first["state"], second["state"])
    for rank in (first, second):
        assert len(rank["alive"]) == 2
        assert set(rank["alive"]) == {1}
        assert len(set(rank["hooks"])) == 1
