"""The roofline model: a machine's ceilings, and the least time of work under them.

Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore architectures",
Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from layershed.arguments import check_kind, shown
from layershed.errors import MeasurementError, UnknownNameError


@dataclass(frozen=True)
class Cost:
    """Cost of a piece of work.

    Args:
        flops: Floating-point operations; a multiply-add is two.
        bytes: Bytes moved between the processor and its memory.
    """

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Ceilings:
    """Highest rates of a machine.

    Args:
        name: Name of the machine.
        flops: Rate of dense matrix products, in FLOP/s.
        bandwidth: Bandwidth of the main memory, in bytes/s.
        source: Source of the figures.
        memory: Bytes of the main memory; None if unknown.
    """

    name: str
    flops: float
    bandwidth: float
    source: str
    memory: float | None = None

    def seconds(self, costs: Iterable[Cost]) -> float:
        """Return the least seconds of consecutive pieces of work: the sum of max(flops / ceiling, bytes / ceiling)."""
        return sum(max(cost.flops / self.flops, cost.bytes / self.bandwidth) for cost in costs)


def _accelerator(name: str, teraflops: float, gigabytes_per_s: float, gigabytes: float, source: str) -> Ceilings:
    # memory sizes are in binary gigabytes, bandwidths in decimal ones
    return Ceilings(name, teraflops * 1e12, gigabytes_per_s * 1e9, source, gigabytes * 2**30)


# Dense BF16 tensor-core rates with FP32 accumulation (FP16 on the V100), without sparsity; figures of the vendors.
ACCELERATORS: dict[str, Ceilings] = {
    "v100": _accelerator("NVIDIA V100 SXM2 32 GB", 125, 900, 32, "NVIDIA V100 datasheet, January 2020"),
    "a100": _accelerator("NVIDIA A100 SXM 80 GB", 312, 2039, 80, "NVIDIA A100 datasheet, June 2021"),
    "a100-40gb": _accelerator("NVIDIA A100 SXM 40 GB", 312, 1555, 40, "NVIDIA A100 datasheet, June 2021"),
    "h100": _accelerator("NVIDIA H100 SXM", 989.4, 3350, 80, "NVIDIA H100 datasheet, 2023; whitepaper v1.04"),
    "h200": _accelerator("NVIDIA H200 SXM", 989.4, 4800, 141, "NVIDIA H200 datasheet, 2024"),
    "l4": _accelerator("NVIDIA L4", 121, 300, 24, "NVIDIA L4 datasheet, 2023 (half of its figure with sparsity)"),
    "l40s": _accelerator("NVIDIA L40S", 362.05, 864, 48, "NVIDIA L40S datasheet, 2023"),
    "rtx4090": _accelerator("NVIDIA RTX 4090", 165.2, 1008, 24, "NVIDIA Ada GPU architecture whitepaper v2.1, 2023"),
    "mi300x": _accelerator("AMD Instinct MI300X", 1307.4, 5300, 192, "AMD Instinct MI300X data sheet, 2023"),
}


def accelerator(name: str) -> Ceilings:
    """Return the published ceilings of a common accelerator.

    Args:
        name: A key of ``ACCELERATORS``, such as ``"a100"``.

    Raises:
        UnknownNameError: If the name is unknown.
    """
    if not isinstance(name, str) or name not in ACCELERATORS:
        raise UnknownNameError("accelerator", name, ACCELERATORS)
    return ACCELERATORS[name]


def measure_ceilings(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    anew: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> Ceilings:
    """Measure the ceilings of this machine with short matrix products and short copies.

    - Products and copies start small. Their size doubles while three of the next size fit into the remaining time, of
      0.2 s for the products and 0.1 s for the copies. The rest of the time repeats the last size.
    - The compute ceiling is the best rate of all products. The memory ceiling is the best rate of the largest copies
      alone, as small ones stay in the processor's caches.
    - A device with a queue runs 20 pieces of work between two readings of the clock, so that latency does not count.
    - The result is cached for the process, by device, dtype and number of CPU threads.

    Args:
        device: The device to measure.
        dtype: Type of the matrices. Autocast on this device overrides it.
        anew: Measure again. Needed after a change that this function cannot see, such as a new precision of float32
            products (TF32).
        clock: Function that returns seconds, for tests. Each clock has its own cached result.
    """
    check_kind(dtype, torch.dtype, "measure_ceilings: dtype", MeasurementError)
    try:
        device = torch.empty(0, device=device).device  # with its index
    except (TypeError, RuntimeError, AssertionError) as error:
        raise MeasurementError(f"measure_ceilings: device={shown(device)} is no device here ({error}).") from None
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    key = (device, dtype, torch.get_num_threads() if device.type == "cpu" else None, clock)
    if anew or key not in _MEASURED:
        _MEASURED[key] = _measure(device, dtype, clock)
    return _MEASURED[key]


_MEASURED: dict[tuple[torch.device, torch.dtype, int | None, Callable[[], float]], Ceilings] = {}


@dataclass(frozen=True)
class _Work:
    """Work of variable size.

    Args:
        prepare: Function from a size to the work of that size.
        amount: Function from a size to the FLOPs or bytes of one piece of work.
        smallest: The size to start with.
        largest: The size to stop at.
        growth: Factor of the time when the size doubles.
        seconds: Time for all sizes together.
    """

    prepare: Callable[[int], Callable[[], object]]
    amount: Callable[[int], int]
    smallest: int
    largest: int
    growth: int
    seconds: float


def _measure(device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> Ceilings:
    queued = device.type != "cpu"
    largest_copy = 2**30 if queued else 2**28

    def product_of(size: int) -> Callable[[], object]:
        left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        return lambda: torch.matmul(left, right)

    def copy_of(size: int) -> Callable[[], object]:
        source = torch.ones(size, dtype=torch.uint8, device=device)
        target = source.clone()  # allocates its pages before the first copy
        return lambda: target.copy_(source)

    def timed(work: Callable[[], object]) -> float:
        start = clock()
        for _ in range(_QUEUED if queued else 1):
            work()
        if queued:
            torch.accelerator.synchronize(device)
        return (clock() - start) / (_QUEUED if queued else 1)

    products = _Work(product_of, lambda size: 2 * size**3, 64, 8192, 8, 0.2)
    copies = _Work(copy_of, lambda size: 2 * size, 2**23, largest_copy, 2, 0.1)
    with torch.no_grad():
        flops, bandwidth = _rates(products, timed, clock), _rates(copies, timed, clock)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    kind = str(dtype).removeprefix("torch.")
    return Ceilings(
        name=f"{device.type} ({kind}{threads})",
        flops=max(flops.values()),
        bandwidth=bandwidth[max(bandwidth)],
        source=f"measured: the best of products up to {max(flops)} x {max(flops)}, and of copies of "
        f"{max(bandwidth) / 1e6:.0f} MB",
    )


_QUEUED = 20
_REPEATS = 3  # pieces of the next size that must fit


def _rates(work: _Work, timed: Callable[[Callable[[], object]], float], clock: Callable[[], float]) -> dict[int, float]:
    """Return the best rate, in FLOP/s or bytes/s, of every size that fits into the time."""
    size, piece = work.smallest, work.prepare(work.smallest)
    timed(piece)  # not counted, as the first product on a device loads its libraries
    rates: dict[int, float] = {}
    begin = clock()
    while True:
        start = clock()
        seconds = timed(piece)
        rates[size] = max(rates.get(size, 0.0), work.amount(size) / seconds)
        one = clock() - start  # a whole queue of them
        left = work.seconds - (clock() - begin)
        if size < work.largest and _REPEATS * work.growth * one <= left:
            size *= 2
            piece = work.prepare(size)
        elif one > left:
            return rates
