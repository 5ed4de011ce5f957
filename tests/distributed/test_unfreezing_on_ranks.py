"""Weights that are unfrozen during a run on two ranks, under DDP and FSDP2; benchmarks/ranks.py tries the same."""

import pytest

from tests.support.ranks import unfreezing_checks as checks

pytestmark = pytest.mark.slow
REPLICATED, SHARDED = checks.checks_of_replicated(), checks.checks_of_sharded()


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return checks.run_replicated(tmp_path_factory.mktemp("unfreezing"))


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory):
    return checks.run_sharded(tmp_path_factory.mktemp("sharded_unfreezing"))


@pytest.mark.parametrize("name", REPLICATED)
def test_ddp_check_of_an_unfreezing_run_holds_on_two_ranks(ddp, name):
    REPLICATED[name](ddp)


@pytest.mark.parametrize("name", SHARDED)
def test_fsdp2_check_of_an_unfreezing_run_holds_on_two_ranks(fsdp2, name):
    SHARDED[name](fsdp2)
