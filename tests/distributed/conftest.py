"""One launch of two ranks for all tests of a strategy: the first test process that needs it starts it."""

import pytest
from filelock import FileLock

from tests.support.two_ranks import run_two_ranks


@pytest.fixture(scope="session")
def ddp_folder(tmp_path_factory, worker_id):
    """A folder for each scenario of tests/support/ranks/ddp.py, with what both ranks saved."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "ddp"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            run_two_ranks("tests.support.ranks.ddp", folder, timeout=600)
            (folder / "done").touch()
    return folder
