"""LoRARecovery on two ranks."""

import pytest
import torch

from tests.support.ranks.lora import CONTINUED, CUT, RUNS
from tests.support.runs import (
    same,
)


@pytest.fixture
def ranks(ddp_folder):
    """The folder with what both ranks saved."""
    return ddp_folder / "lora"


def of_both(folder, name, resumed):
    found = [torch.load(folder / f"{name}-{resumed}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [own.get("error") for own in found] == [None, None]
    return found


@pytest.mark.parametrize("name", RUNS)
def test_ddp_lora_ranks_hold_equal_weights_and_trained_adapters(ranks, name):
    first, second = of_both(ranks, name, False)
    assert same(first["state"], second["state"])
    assert first["losses"] != second["losses"]  # they did see different data
    middle = torch.load(ranks / f"{name}.ckpt", weights_only=True)["state_dict"]
    learned = {key: value for key, value in middle.items() if ".lora_B." in key}
    assert len(learned) > 4
    assert any(value.abs().sum() > 0 for value in learned.values())


@pytest.mark.parametrize("name", CONTINUED)
def test_ddp_lora_resumed_equals_uninterrupted(ranks, name):
    for resumed, whole in zip(of_both(ranks, name, True), of_both(ranks, name, False), strict=True):
        assert resumed["losses"] == whole["losses"][CUT:]
        assert same(resumed["state"], whole["state"])
