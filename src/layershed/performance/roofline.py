"""What a machine can do at most, and how long work must take at least: the roofline model.

Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore architectures",
Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from layershed.errors import UnknownNameError


@dataclass(frozen=True)
class Cost:
    """What a stretch of work takes.

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
    """What a machine can do at most.

    Args:
        name: Its name.
        flops: Dense matrix products, in FLOP/s.
        bandwidth: Of its main memory, in bytes/s.
        source: Where the figures come from.
        memory: Bytes of its main memory; None if that is not said.
    """

    name: str
    flops: float
    bandwidth: float
    source: str
    memory: float | None = None

    def seconds(self, costs: Iterable[Cost]) -> float:
        """Least time for pieces of work done one after the other: max(flops / ceiling, bytes / ceiling) of each."""
        return sum(max(cost.flops / self.flops, cost.bytes / self.bandwidth) for cost in costs)


def _accelerator(name: str, teraflops: float, gigabytes_per_s: float, gigabytes: float, source: str) -> Ceilings:
    # memory is sold in binary gigabytes, unlike its bandwidth
    return Ceilings(name, teraflops * 1e12, gigabytes_per_s * 1e9, source, gigabytes * 2**30)


# Dense BF16 tensor-core rates with FP32 accumulation (FP16 on the V100), without sparsity; vendors' own figures.
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
    """The published ceilings of a common accelerator.

    Args:
        name: A key of ``ACCELERATORS``, such as ``"a100"``.

    Raises:
        UnknownNameError: If it is none.
    """
    if name not in ACCELERATORS:
        raise UnknownNameError("accelerator", name, ACCELERATORS)
    return ACCELERATORS[name]


def measure_ceilings(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    size: int | None = None,
    copied: int | None = None,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> Ceilings:
    """The ceilings of this machine: the fastest of some short matrix products, and of some copies.

    Args:
        device: What to measure. What has a queue of its own works through 20 of each between two readings of the clock,
            so that the way there and back does not count.
        dtype: Of the matrices; under autocast they are of its type.
        size: Rows and columns of the two matrices; a product takes 2 * size**3 FLOPs. None for 1024 on a CPU and 8192
            elsewhere.
        copied: Bytes of the tensor that is copied; a copy moves them twice, there and back. None for 64 MiB on a CPU
            and 1 GiB elsewhere, more than caches hold.
        repeats: How often each is done; one more goes before as a warm-up.
        clock: Returns seconds; for tests.
    """
    device = torch.device(device)
    queued = device.type != "cpu"
    size = size or (8192 if queued else 1024)
    copied = copied or (2**30 if queued else 2**26)
    each = 20 if queued else 1
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def fastest(work: Callable[[], object]) -> float:
        seconds = []
        for _ in range(repeats + 1):
            start = clock()
            for _ in range(each):
                work()
            if queued:
                torch.accelerator.synchronize(device)
            seconds.append(clock() - start)
        return min(seconds[1:]) / each

    with torch.no_grad():
        flops = 2 * size**3 / fastest(lambda: torch.matmul(left, right))
        bandwidth = 2 * copied / fastest(lambda: target.copy_(source))
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    kind = str(dtype).removeprefix("torch.")
    return Ceilings(
        name=f"{device.type} ({kind}{threads})",
        flops=flops,
        bandwidth=bandwidth,
        source=f"measured: the fastest of {repeats} {size} x {size} products and {copied / 1e6:.0f} MB copies",
    )
