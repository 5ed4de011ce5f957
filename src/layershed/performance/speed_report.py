"""Results of a speed measurement, dense against dropped, and the speedup degradation ratio."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from layershed.arguments import check_number
from layershed.errors import MeasurementError
from layershed.formatting import short_bytes, short_count, short_number
from layershed.performance.intervals import Interval
from layershed.performance.model_size import WeightSizes


@dataclass(frozen=True)
class PhaseSpeed:
    """Speed of one phase: prefill or decode, or the forward pass of a model that does not decode.

    Args:
        dense: Tokens (or what ``unit`` says) per second of the dense model, median over runs.
        dropped: The same of the dropped model.
        speedup: Speed, dropped over dense, from the paired runs.
        predicted: Speedup that the roofline model predicts from the ceilings; None if the model's costs are unknown.
        dense_spread: ``dense`` with its interval.
        dropped_spread: ``dropped`` with its interval.
        unit: What is counted: ``tokens``, ``images`` or ``sequences``.
    """

    dense: float
    dropped: float
    speedup: Interval
    predicted: float | None = None
    dense_spread: Interval | None = field(default=None, compare=False)
    dropped_spread: Interval | None = field(default=None, compare=False)
    unit: str = "tokens"

    @property
    def measurable(self) -> bool:
        """True if the runs are enough for a 95 % interval of the speedup and the interval excludes 1."""
        return self.speedup.trustworthy and not self.speedup.low <= 1 <= self.speedup.high

    @property
    def measured_over_predicted(self) -> float | None:
        """Measured speedup over predicted speedup; None without a prediction."""
        return None if self.predicted is None else self.speedup.median / self.predicted

    def degradation(self, points_lost: float) -> float:
        """SDR by :func:`speedup_degradation_ratio`; NaN if no speedup is measurable."""
        return speedup_degradation_ratio(points_lost, self.speedup.median) if self.measurable else math.nan

    def __str__(self) -> str:
        """Format the speed in one line."""
        speedup = f"x{self.speedup.median:.2f} [{self.speedup.low:.2f}, {self.speedup.high:.2f}]"
        if self.predicted is not None:
            speedup += f", x{self.predicted:.2f} in theory"
        doubt = "" if self.measurable else "no measurable speedup, "
        return f"{short_number(self.dense)} -> {short_number(self.dropped)} {self.unit}/s, {doubt}{speedup}"


@dataclass(frozen=True)
class SpeedReport:
    """Result of :func:`~layershed.performance.speed.measure_speed`.

    Args:
        prefill: Speed over the prompt.
        decode: Speed of cached one-token steps.
        parameters_dense: Number of parameters of the dense model.
        parameters_dropped: Number of parameters that the dropped model computes with.
        kv_bytes_dense: Bytes of the dense model's KV cache per token and sequence, read from the real cache.
        kv_bytes_dropped: The same of the dropped model.
        file_bytes_dense: Bytes of the dense model's saved weights, without the header of the file.
        file_bytes_dropped: The same of the dropped model.
        peak_memory_dense: Bytes of the dense model's weights, plus the peak that a prefill and the decoding after it
            allocate.
        peak_memory_dropped: The same of the dropped model, without its dropped weights.
        runs: Number of paired runs.
        batch_size: Sequences per run.
        prompt_tokens: Tokens per prompt.
        new_tokens: Decoded tokens per sequence.
        device: The device, such as ``"cpu (2 threads)"`` or ``"NVIDIA H100"``.
    """

    prefill: PhaseSpeed
    decode: PhaseSpeed
    parameters_dense: int
    parameters_dropped: int
    kv_bytes_dense: float
    kv_bytes_dropped: float
    file_bytes_dense: int
    file_bytes_dropped: int
    peak_memory_dense: int
    peak_memory_dropped: int
    runs: int
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    device: str

    @property
    def phases(self) -> dict[str, PhaseSpeed]:
        """Both phases by name."""
        return {"prefill": self.prefill, "decode": self.decode}

    @property
    def prefill_ms(self) -> tuple[float, float]:
        """Milliseconds of the prefill, dense and dropped."""
        tokens = 1000 * self.batch_size * self.prompt_tokens
        return tokens / self.prefill.dense, tokens / self.prefill.dropped

    @property
    def decode_ms(self) -> tuple[float, float]:
        """Milliseconds per decoded token of a sequence, dense and dropped."""
        return 1000 * self.batch_size / self.decode.dense, 1000 * self.batch_size / self.decode.dropped

    def __str__(self) -> str:
        """Format the report in a few lines, the dense model first."""
        lines = (
            f"prefill: {self.prefill}",
            f"decode: {self.decode}",
            *size_lines(self),
            f"KV cache per token: {self.kv_bytes_dense:,.0f} -> {self.kv_bytes_dropped:,.0f} bytes",
            f"{self.runs} pairs, {self.batch_size} x {self.prompt_tokens} + {self.new_tokens} tokens, {self.device}",
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Convert the report to plain primitives, for JSON and for checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> SpeedReport:
        """Read the result of :meth:`to_dict`."""
        phases = {}
        for name in ("prefill", "decode"):
            phases[name] = phase_from(content[name])
        return cls(**{**content, **phases})


def size_fields(sizes: tuple[WeightSizes, WeightSizes], working: tuple[int, int]) -> dict[str, int]:
    """The fields of a report about its sizes; each pair holds those of the dense and of the dropped model.

    Args:
        sizes: What the weights are.
        working: Bytes of peak memory beside the weights.
    """
    sides = zip(("dense", "dropped"), sizes, working, strict=True)
    return {
        name: value
        for side, weights, beside in sides
        for name, value in (
            (f"parameters_{side}", weights.parameters),
            (f"file_bytes_{side}", weights.bytes),
            (f"peak_memory_{side}", weights.bytes + beside),
        )
    }


def size_lines(report: Any) -> tuple[str, str, str]:
    """The lines of a report about the fields of :func:`size_fields`."""
    return (
        f"parameters: {short_count(report.parameters_dense)} -> {short_count(report.parameters_dropped)}",
        f"file: {short_bytes(report.file_bytes_dense)} -> {short_bytes(report.file_bytes_dropped)}",
        f"peak memory: {short_bytes(report.peak_memory_dense)} -> {short_bytes(report.peak_memory_dropped)}",
    )


def phase_from(fields: dict[str, Any]) -> PhaseSpeed:
    """The speed of a phase from its fields as primitives."""
    intervals = {key: Interval(**value) for key, value in fields.items() if isinstance(value, dict)}
    return PhaseSpeed(**{**fields, **intervals})


def speedup_degradation_ratio(points_lost: float, speedup: float) -> float:
    r"""Compute the SDR :math:`\gamma = \Delta\mathrm{avg} / \Delta\mathrm{speedup}` of arXiv 2406.15786.

    Args:
        points_lost: Points of the average score lost, in percent (68.2 -> 65.8 is 2.4).
        speedup: Speed, dropped over dense, such as 1.11.

    Returns:
        Points lost per percent of speed gained. Lower is better; negative if quality rose; NaN without a speedup.

    Example:
        >>> round(speedup_degradation_ratio(68.2 - 65.8, 1.11), 2)
        0.22
    """
    for name, number in (("points_lost", points_lost), ("speedup", speedup)):
        check_number(number, f"speedup_degradation_ratio: {name}", MeasurementError)
    gained = (speedup - 1) * 100
    return points_lost / gained if gained > 0 else float("nan")
