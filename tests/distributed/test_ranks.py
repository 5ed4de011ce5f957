"""DDP and FSDP2 on two processes; the script benchmarks/ranks.py tries more of the same."""

from types import SimpleNamespace

import pytest
import torch

from layershed.integration.namespaces import NAMESPACES
from tests.support.namespaces import SECOND, VARIABLE
from tests.support.ranks import replicated
from tests.support.ranks.checks import (
    as_one_process,
    checks_of_replicated,
    checks_of_sharded,
    former_shards_are_left,
    replicated_in,
    run_sharded,
    same_on_both_ranks,
)
from tests.support.ranks.deaths import SHARDS
from tests.support.two_ranks import run_two_ranks, said, seconds_to_follow

REPLICATED, SHARDED = checks_of_replicated(), checks_of_sharded("some")


@pytest.fixture(scope="module")
def ddp(ddp_folder):
    return replicated_in(ddp_folder / "replicated")


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory):
    return run_sharded(tmp_path_factory.mktemp("fsdp2"), "some")


@pytest.mark.parametrize("name", REPLICATED)
def test_ddp_check_holds_on_two_ranks(ddp, name):
    REPLICATED[name](ddp)


@pytest.mark.parametrize("name", SHARDED)
def test_fsdp2_check_holds_on_two_ranks(fsdp2, name):
    SHARDED[name](fsdp2)


@pytest.mark.parametrize(
    "name", ["lora", *(pytest.param(each, marks=pytest.mark.slow) for each in ("running", "qlora"))]
)
def test_ddp_run_under_lightnings_second_name_equals_one_process(tmp_path, name):
    run_two_ranks("tests.support.ranks.named", tmp_path, name, environment={VARIABLE: SECOND})
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert ranks[0]["lightning"] == NAMESPACES[1].pytorch
    found = SimpleNamespace(ranks=ranks, one={name: replicated.train(tmp_path / "one", name, 1)})
    same_on_both_ranks(name, found)
    as_one_process(name, found)


@pytest.mark.parametrize(
    ("place", "dies"),
    [
        pytest.param("scoring pass", 1, marks=pytest.mark.slow),
        pytest.param("speed measurement", 0, marks=pytest.mark.slow),
        (SHARDS, 1),
    ],
)
def test_dead_rank_ends_the_other_with_an_error(tmp_path, place, dies):
    killed, other, seconds = seconds_to_follow("tests.support.ranks.deaths", tmp_path, place, str(dies), dies=dies)
    assert killed == -9, said(tmp_path)
    assert other == 1, said(tmp_path)
    assert seconds < 60
    assert "gloo" in (tmp_path / f"output-{1 - dies}.txt").read_text()
    if place == SHARDS:
        former_shards_are_left(tmp_path)
