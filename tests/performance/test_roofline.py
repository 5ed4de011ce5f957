"""Ceilings on a clock that is told how long each piece of work takes."""

from itertools import accumulate

import pytest
import torch

from layershed.errors import UnknownNameError
from layershed.performance.roofline import ACCELERATORS, Ceilings, Cost, accelerator, measure_ceilings

MACHINE = Ceilings("made up", flops=100.0, bandwidth=10.0, source="nowhere")


@pytest.mark.parametrize(
    ("costs", "seconds"),
    [
        ([Cost(200, 5)], 2.0),  # 2 s to compute, half a second to move
        ([Cost(50, 30)], 3.0),
        ([Cost(100, 10)], 1.0),
        ([Cost(200, 5), Cost(50, 30)], 5.0),  # not 3.5: one piece after the other, no overlap between them
        ([Cost(200, 5) + Cost(50, 30)], 3.5),
        ([Cost()], 0.0),
        ([], 0.0),
    ],
)
def test_work_takes_as_long_as_its_narrowest_resource(costs, seconds):
    assert MACHINE.seconds(iter(costs)) == seconds


def scripted(*durations):
    """A clock between whose pairs of readings the given seconds pass; between pairs a hundred do."""
    return map(float, accumulate(step for seconds in durations for step in (100, seconds))).__next__


def test_the_ceilings_are_the_fastest_runs_without_the_warm_up():
    clock = scripted(0.5, 4, 2, 8, 0.25, 16, 32, 8)  # a warm-up and three products, a warm-up and three copies
    found = measure_ceilings(size=4, copied=1000, repeats=3, clock=clock)
    assert (found.flops, found.bandwidth) == (2 * 4**3 / 2, 2 * 1000 / 8)
    assert found.name == f"cpu (float32, {torch.get_num_threads()} threads)"
    assert found.source == "measured: the fastest of 3 4 x 4 products and 0 MB copies"
    assert found.memory is None


def test_a_device_with_a_queue_is_waited_for(monkeypatch):
    events = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: events.append(device.type))

    def clock():
        events.append("clock")
        return float(len(events))

    found = measure_ceilings("meta", torch.bfloat16, size=2, copied=8, repeats=1, clock=clock)
    assert events == ["clock", "meta", "clock"] * 4
    assert found.name == "meta (bfloat16)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_this_machine_has_ceilings(dtype):
    found = measure_ceilings(dtype=dtype, size=16, copied=64, repeats=1)
    assert found.flops > 0
    assert found.bandwidth > 0


@pytest.mark.parametrize("name", ACCELERATORS)
def test_published_ceilings_are_plausible_and_have_a_source(name):
    found = accelerator(name)
    assert found is ACCELERATORS[name]
    assert 1e14 < found.flops < 2e15
    assert 2e11 < found.bandwidth < 1e13
    assert 1e10 < found.memory < 3e11
    # none fills its memory's bandwidth with fewer than 100 or needs more than 500 FLOPs per byte
    assert 100 < found.flops / found.bandwidth < 500
    assert found.name.startswith(("NVIDIA", "AMD"))
    assert found.source.startswith(found.name.split()[0])
    assert "20" in found.source  # a year


def test_names_and_figures_are_told_apart():
    assert len({found.name for found in ACCELERATORS.values()}) == len(ACCELERATORS)
    assert ACCELERATORS["h200"].bandwidth > ACCELERATORS["h100"].bandwidth
    assert ACCELERATORS["a100"].flops == ACCELERATORS["a100-40gb"].flops


def test_an_unknown_accelerator_is_refused_with_those_that_are_known():
    with pytest.raises(UnknownNameError, match=r"a1000.*a100"):
        accelerator("a1000")
