"""Measured speed: dense against dropped, interleaved in one process, prefill and cached decode apart."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Interval:
    """A median with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class PhaseSpeed:
    """Speed of one phase, prefill or decode.

    Args:
        dense: Tokens per second of the dense model, median over runs.
        dropped: Tokens per second of the dropped model, median over runs.
        speedup: dropped over dense, from the paired runs.
    """

    dense: float
    dropped: float
    speedup: Interval

    @property
    def measurable(self) -> bool:
        """Whether the interval of the speedup excludes 1."""
        return not self.speedup.low <= 1 <= self.speedup.high


@dataclass(frozen=True)
class SpeedReport:
    """What :func:`measure_speed` measured.

    Args:
        prefill: Speed over the prompt.
        decode: Speed of cached one-token steps.
        parameters_dense: Number of parameters of the dense model.
        parameters_dropped: Number of parameters that the dropped model computes with.
        kv_bytes_dense: Bytes of the dense model's KV cache per token and sequence, read off the real cache.
        kv_bytes_dropped: The same of the dropped model.
        runs: Number of paired runs.
        batch_size: Sequences per run.
        prompt_tokens: Tokens per prompt.
        new_tokens: Decoded tokens per run.
        device: Such as ``"cpu (2 threads)"`` or ``"NVIDIA H100"``.
    """

    prefill: PhaseSpeed
    decode: PhaseSpeed
    parameters_dense: int
    parameters_dropped: int
    kv_bytes_dense: float
    kv_bytes_dropped: float
    runs: int
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    device: str

    def to_dict(self) -> dict[str, Any]:
        """Plain primitives, for JSON and for checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> SpeedReport:
        """The inverse of :meth:`to_dict`."""
        phases = {
            name: PhaseSpeed(phase["dense"], phase["dropped"], Interval(**phase["speedup"]))
            for name, phase in content.items()
            if name in ("prefill", "decode")
        }
        return cls(**{**content, **phases})


def speedup_degradation_ratio(points_lost: float, speedup: float) -> float:
    r"""SDR :math:`\gamma = \Delta\mathrm{avg} / \Delta\mathrm{speedup}` of arXiv 2406.15786.

    Args:
        points_lost: Points of the average score lost, in percent (68.2 -> 65.8 is 2.4).
        speedup: Dropped over dense, such as 1.11.

    Returns:
        Points lost per percent of speed gained; lower is better, negative where quality rose. NaN without a gain.

    Example:
        >>> round(speedup_degradation_ratio(68.2 - 65.8, 1.11), 2)
        0.22
    """
    gained = (speedup - 1) * 100
    return points_lost / gained if gained > 0 else float("nan")
