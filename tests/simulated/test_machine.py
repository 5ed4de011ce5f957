"""What the code for CUDA takes from the device's module: events, peak memory, random states, name and size."""

import torch

import layershed as ls
from layershed.devices import EventClock, WallClock, clock_for
from layershed.integration.rng import random_states, set_random_states
from layershed.performance.peak_memory import watching_memory
from layershed.performance.prediction import ceilings_of
from layershed.performance.stopwatch import describe_device
from tests.support.models import build_model, some
from tests.support.simulated.device import CALLS, MEMORY, NAME
from tests.support.simulated.tensors import SIM, waits


def device():
    return torch.device(SIM, 0)


SETTINGS = {"prompt_tokens": 8, "new_tokens": 2, "runs": 2, "warmup": 1}


def test_clock_of_the_device_records_events_and_waits_only_when_read():
    clock = clock_for(device())
    assert isinstance(clock, EventClock)
    with waits() as marking:
        marks = [clock.mark() for _ in range(3)]
    with waits() as reading:
        assert clock.seconds(marks[0], marks[2]) > 0
    assert (dict(marking), dict(reading)) == ({}, {"queue": 1})
    assert CALLS == ["Event.record"] * 3 + ["Event.synchronize", "Event.elapsed_time"]


def test_wall_clock_of_the_device_waits_for_its_queue_at_every_mark():
    clock = WallClock(device())
    assert clock.seconds(clock.mark(), clock.mark()) > 0
    assert CALLS == ["synchronize"] * 2


def test_peak_memory_comes_from_the_allocator_of_the_device():
    with watching_memory(device()) as peak:
        for _ in range(3):
            torch.ones(1000, device=SIM).add(1)
        assert peak() == 2 * 4000  # the ones and their sum; freed before the next round
    names = ["memory_allocated", "reset_peak_memory_stats", "max_memory_allocated"]
    assert ["synchronize", *names] == CALLS


def test_speed_is_measured_with_events_and_the_allocator():
    models = [build_model(num_hidden_layers=3).to(place) for place in (SIM, "cpu")]
    reports = []
    for model in models:
        ls.bypass(model, some(model))
        CALLS.clear()
        reports.append(ls.measure_speed(model, ceilings=ls.accelerator("h100"), **SETTINGS))
        calls = {name: CALLS.count(name) for name in CALLS}
        runs = 2 * (SETTINGS["runs"] + SETTINGS["warmup"])  # dense and dropped
        simulated = {"Event.record": 4 * runs, "Event.synchronize": 2 * runs, "Event.elapsed_time": 2 * runs}
        memory = dict.fromkeys(
            ("synchronize", "memory_allocated", "reset_peak_memory_stats", "max_memory_allocated"), 2
        )
        assert calls == ({**simulated, **memory} if model is models[0] else {})
    found, expected = reports
    assert found.device == NAME
    assert found.kv_bytes_dropped == expected.kv_bytes_dropped
    for side in ("peak_memory_dense", "peak_memory_dropped"):
        assert 0.8 < getattr(found, side) / getattr(expected, side) < 1.25, side


def test_latency_of_sublayers_is_measured_with_events():
    model = build_model(num_hidden_layers=3).to(SIM)
    ls.find_sublayers(model)
    CALLS.clear()
    found = ls.measure_latency(model, phase="prefill", **SETTINGS)
    assert len(found.sublayers) == 6
    assert CALLS.count("Event.record") >= 2 * 6 * SETTINGS["runs"]
    assert "synchronize" not in CALLS


def test_teacher_is_timed_with_events_that_are_read_only_on_request():
    model = build_model(num_hidden_layers=3).to(SIM)
    ls.bypass(model, some(model))
    CALLS.clear()
    parts = ls.recovery.distillation.self_distillation(
        model, torch.ones(1, 6, dtype=torch.long, device=SIM), ls.Distillation()
    )
    assert CALLS == ["Event.record"] * 2
    assert parts.teacher_seconds > 0
    assert CALLS[2:] == ["Event.synchronize", "Event.elapsed_time"]


def test_random_states_of_the_device_are_kept_and_set():
    torch.manual_seed(3)
    states = random_states()
    assert len(states[SIM]) == 1
    torch.manual_seed(4)
    assert not torch.equal(torch.sim.get_rng_state(), states[SIM][0])
    set_random_states(states)
    assert torch.equal(torch.sim.get_rng_state(), states[SIM][0])
    assert [name for name in CALLS if "rng" in name] == ["get_rng_state_all", "set_rng_state_all"]


def test_random_states_of_another_number_of_devices_or_of_none_change_nothing():
    torch.manual_seed(3)
    states = random_states()
    torch.manual_seed(4)
    kept = torch.sim.get_rng_state()
    for others in ([], states[SIM] * 2):
        set_random_states({**states, SIM: others})
        assert torch.equal(torch.sim.get_rng_state(), kept)
    old = {name: state for name, state in states.items() if name != SIM}
    set_random_states({**old, "cuda": []})  # as earlier versions wrote it
    assert torch.equal(torch.sim.get_rng_state(), kept)
    assert torch.equal(torch.get_rng_state(), states["torch"])


def test_name_and_memory_come_from_the_device():
    assert describe_device(device()) == NAME
    assert ceilings_of("this", device(), torch.float32).memory == MEMORY
