"""Ceilings of simulated machines, whose clock moves with their work."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from layershed.errors import UnknownNameError
from layershed.performance.roofline import ACCELERATORS, Ceilings, Cost, accelerator, measure_ceilings
from tests.support.thinned import crossed

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
    ids=["compute", "memory", "equal", "two pieces", "one sum", "no cost", "no piece"],
)
def test_roofline_time_is_that_of_the_slower_resource(costs, seconds):
    assert MACHINE.seconds(iter(costs)) == seconds


class Machine(TorchDispatchMode):
    """A simulated machine. It computes nothing; its clock moves by the time of each operation.

    Args:
        flops: Of its products, in FLOP/s.
        bandwidth: Of its copies, in bytes/s.
        start: Seconds that every operation takes before it works.
        slow_from: Size from which a product takes 100 times as long.
    """

    def __init__(self, flops=1e11, bandwidth=1e10, start=0.0, slow_from=math.inf):
        super().__init__()
        self.flops, self.bandwidth, self.start, self.slow_from = flops, bandwidth, start, slow_from
        self.now, self.products, self.copies = 0.0, [], []

    def clock(self):
        return self.now

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default:
            size = args[0].shape[0]
            self.products.append(size)
            self.now += self.start + 2 * size**3 / self.flops * (100 if size >= self.slow_from else 1)
            return args[0]
        if function is torch.ops.aten.copy_.default:
            self.copies.append(args[0].nbytes)
            self.now += self.start + 2 * args[0].nbytes / self.bandwidth
            return args[0]
        if function is torch.ops.aten.ones.default:
            function = torch.ops.aten.empty.memory_format
        return function(*args, **(kwargs or {}))


def measured_on(machine, device="cpu", dtype=torch.float32, **options):
    with machine:
        return measure_ceilings(device, dtype, clock=machine.clock, **options)


@pytest.mark.default_cases(4)
@pytest.mark.parametrize("flops", [1e8, 3e9, 1e11, 4e13])
@pytest.mark.parametrize("bandwidth", [1e9, 3e10])
def test_measured_ceilings_equal_the_simulated_machine(flops, bandwidth):
    found = measured_on(Machine(flops, bandwidth))
    assert (found.flops, found.bandwidth) == pytest.approx((flops, bandwidth))
    assert found.name == f"cpu (float32, {torch.get_num_threads()} threads)"
    assert found.memory is None


@pytest.mark.parametrize(
    ("flops", "bandwidth", "start"), crossed((1e6, 1e8, 3e9, 1e11, 4e13), (1e8, 1e9, 3e10), (0.0, 1e-4))
)
def test_measuring_ceilings_stays_within_its_time(flops, bandwidth, start):
    machine = Machine(flops, bandwidth, start)
    measured_on(machine)
    # a machine too slow for the smallest size runs it twice: a warm-up and a counted run
    least = 2 * (2 * 64**3 / flops + start), 2 * (2 * 2**23 / bandwidth + start)
    warm_ups = least[0] / 2 + least[1] / 2
    assert machine.now <= max(0.2, least[0] / 2) + max(0.1, least[1] / 2) + warm_ups + 1e-9


def test_products_double_until_three_of_the_next_would_not_fit():
    machine = Machine(flops=1e11)
    found = measured_on(machine)
    # 1024: 0.021 s; three products of 2048 would take 0.52 s of the 0.2 s
    assert sorted(set(machine.products)) == [64, 128, 256, 512, 1024]
    assert machine.products.count(1024) >= 3
    assert "products up to 1024 x 1024" in found.source


def test_copies_double_until_three_of_the_next_would_not_fit():
    machine = Machine(bandwidth=1e10)
    found = measured_on(machine)
    # 2**27 bytes: 0.027 s; three copies of 2**28 would take 0.16 s of the 0.1 s
    assert sorted(set(machine.copies)) == [2**size for size in range(23, 27)]
    assert found.source.endswith("copies of 67 MB")


def test_compute_ceiling_is_the_best_rate_before_a_slow_size():
    machine = Machine(flops=1e11, slow_from=512)
    assert measured_on(machine).flops == pytest.approx(1e11)
    assert max(machine.products) == 512
    assert machine.now <= 0.2 + 0.1 + 100 * 2 * 512**3 / 1e11


def test_overhead_per_call_does_not_lower_the_ceilings():
    """The smallest product reaches a thousandth of the rate, the largest nearly all of it."""
    found = measured_on(Machine(flops=1e11, start=5e-3 / 64))
    assert 0.99e11 < found.flops < 1e11


def test_queued_device_is_synchronised_after_twenty_calls(monkeypatch):
    machine = Machine(flops=4e14, bandwidth=2e12)
    waits = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: waits.append((device, len(machine.products))))
    found = measured_on(machine, "meta", torch.bfloat16)
    assert (found.flops, found.bandwidth) == pytest.approx((4e14, 2e12))
    assert found.name == "meta (bfloat16)"
    assert {device.type for device, _ in waits} == {"meta"}
    of_products = [done for _, done in waits if done < len(machine.products)]
    assert of_products == list(range(20, len(machine.products), 20))
    assert machine.now < 0.3 + 40 * 2 * 64**3 / 4e14 + 40 * 2 * 2**23 / 2e12
    assert max(machine.products) == 8192  # 20 take 0.055 s


def test_ceilings_are_measured_once_and_cached():
    machine = Machine()
    first = measured_on(machine)
    before = machine.now
    assert measured_on(machine) is first
    assert measured_on(machine, torch.device("cpu")) is first
    assert machine.now == before


def test_ceilings_are_measured_anew_on_request_and_cached():
    machine = Machine(flops=1e11)
    measured_on(machine)
    machine.flops = 2e11
    assert measured_on(machine).flops == pytest.approx(1e11)
    assert measured_on(machine, anew=True).flops == pytest.approx(2e11)
    assert measured_on(machine).flops == pytest.approx(2e11)


def another_dtype(machine, _monkeypatch):
    return measured_on(machine, dtype=torch.bfloat16)


def another_device(machine, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda _device: None)
    return measured_on(machine, "meta")


def another_number_of_threads(machine, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    return measured_on(machine)


def autocast_to_another_dtype(machine, _monkeypatch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return measured_on(machine)


@pytest.mark.parametrize(
    "change", [another_dtype, another_device, another_number_of_threads, autocast_to_another_dtype]
)
def test_ceilings_are_measured_anew_after_a_change(change, monkeypatch):
    machine = Machine(flops=1e11)
    before = measured_on(machine)
    machine.flops = 2e11
    found = change(machine, monkeypatch)
    assert found.name != before.name
    assert found.flops == pytest.approx(2e11)


def test_ceilings_under_autocast_use_its_dtype():
    machine = Machine()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = measured_on(machine)
    assert found.name.startswith("cpu (bfloat16")
    assert measured_on(machine, dtype=torch.bfloat16) is found


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_real_ceilings_of_this_machine_are_plausible(dtype):
    found = measure_ceilings(dtype=dtype)
    assert 1e7 < found.flops < 1e15
    assert 1e7 < found.bandwidth < 1e13


@pytest.mark.parametrize("name", ACCELERATORS)
def test_published_ceilings_are_plausible_and_have_a_source(name):
    found = accelerator(name)
    assert found is ACCELERATORS[name]
    assert 1e14 < found.flops < 2e15
    assert 2e11 < found.bandwidth < 1e13
    assert 1e10 < found.memory < 3e11
    # every accelerator computes between 100 and 500 FLOPs per byte
    assert 100 < found.flops / found.bandwidth < 500
    assert found.name.startswith(("NVIDIA", "AMD"))
    assert found.source.startswith(found.name.split()[0])
    assert "20" in found.source  # a year


def test_published_ceilings_differ_between_accelerators():
    assert len({found.name for found in ACCELERATORS.values()}) == len(ACCELERATORS)
    assert ACCELERATORS["h200"].bandwidth > ACCELERATORS["h100"].bandwidth
    assert ACCELERATORS["a100"].flops == ACCELERATORS["a100-40gb"].flops


def test_unknown_accelerator_error_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match=r"a1000.*a100"):
        accelerator("a1000")
