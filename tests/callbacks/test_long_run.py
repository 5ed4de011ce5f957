"""A short benchmarks/long_run.py: the memory of callbacks and the size of checkpoints do not grow with the steps."""

import pytest

from layershed import callbacks
from layershed.integration import course
from layershed.reporting.downsampling import ThinnedCurve
from tests.support.long_run import held, train


@pytest.mark.filterwarnings("ignore")  # of Lightning, about so small a run
def test_callbacks_and_checkpoint_do_not_grow_in_a_long_run(tmp_path, unpainted, monkeypatch):
    """80 steps more would be 11 kB more of losses and 29 kB more of importances."""
    monkeypatch.setattr(course, "ThinnedCurve", lambda: ThinnedCurve(20))
    look = train(240, 6, tmp_path)
    assert look.steps == [40, 80, 120, 160, 200, 240]
    for sizes in (look.held, look.checkpoint):
        for early, late in ((0, 1), (3, 5)):  # before the drop, and after it
            assert sizes[late] - sizes[early] < 4_000, sizes
    assert look.checkpoint[0] > 20_000
    assert (tmp_path / "importance.csv").stat().st_size > 50_000


def test_long_run_check_counts_held_memory():
    class Keeps(callbacks.Export):
        def __init__(self):
            self.rows = {"a": [ThinnedCurve(10_000)], "b": (set(),)}

    callback = Keeps()
    before = held(callback)
    for step in range(1000):
        callback.rows["a"][0].add(1000 + step, step / 7)
        callback.rows["b"][0].add(step + 5000)
    assert held(callback) - before > 1000 * (24 + 28 + 56 + 28)
