"""Weights that are unfrozen during a run on two ranks under FSDP2; benchmarks/ranks.py tries the same, and DDP."""

import pytest

from tests.support.ranks.unfreezing_checks import checks_of_sharded, run_sharded

pytestmark = pytest.mark.slow
CHECKS = checks_of_sharded()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_sharded(tmp_path_factory.mktemp("unfreezing"))


@pytest.mark.parametrize("name", CHECKS)
def test_fsdp2_check_of_an_unfreezing_run_holds_on_two_ranks(ranks, name):
    CHECKS[name](ranks)
