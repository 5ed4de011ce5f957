"""Results of a speed measurement, dense against dropped, and the speedup degradation ratio."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from layershed.arguments import check_number
from layershed.errors import MeasurementError
from layershed.formatting import short_bytes, short_count, short_number
from layershed.performance.intervals import Interval
from layershed.performance.model_size import WeightSizes


@dataclass(frozen=True)
class PhaseSpeed:
    """Speed of one phase: prefill or decode, or the forward pass of a model that does not decode.

    Both speeds have one denominator: ``dropped`` is ``dense`` times the paired speedup, not a median of its own, so
    that the two give the speedup.

    Args:
        dense: Tokens (or what ``unit`` says) per second of the dense model, median over runs.
        speedup: Speed, dropped over dense: the median over the pairs of runs.
        predicted: Speedup that the roofline model predicts from the ceilings; None if the model's costs are unknown.
        dense_spread: ``dense`` with its interval.
        unit: What is counted: ``tokens``, ``images`` or ``sequences``.
    """

    dense: float
    speedup: Interval
    predicted: float | None = None
    dense_spread: Interval | None = field(default=None, compare=False)
    unit: str = "tokens"

    @property
    def dropped(self) -> float:
        """Tokens (or what ``unit`` says) per second of the dropped model: ``dense`` times the median speedup."""
        return self.dense * self.speedup.median

    @property
    def measurable(self) -> bool:
        """True if the runs are enough for a 95 % interval of the speedup and the interval excludes 1."""
        return not self.doubt

    @property
    def doubt(self) -> str:
        """Why no speedup is measurable; empty if one is."""
        return self.speedup.doubt or ("" if self.speedup.excludes(1) else "no measurable speedup")

    @property
    def measured_over_predicted(self) -> float | None:
        """Measured speedup over predicted speedup; None without a prediction."""
        return None if self.predicted is None else self.speedup.median / self.predicted

    def degradation(self, points_lost: float) -> float:
        """SDR by :func:`speedup_degradation_ratio`; NaN if no speedup is measurable."""
        return speedup_degradation_ratio(points_lost, self.speedup.median) if self.measurable else math.nan

    def __str__(self) -> str:
        """Format the speed in one line."""
        doubt = "" if self.speedup.excludes(1) or self.speedup.doubt else f"{self.doubt}, "
        speedup = shown_speedup(self.speedup) + (f" ({self.speedup.doubt})" if self.speedup.doubt else "")
        if self.predicted is not None:
            speedup += f", x{self.predicted:.2f} in theory"
        return f"{short_number(self.dense)} -> {short_number(self.dropped)} {self.unit}/s, {doubt}{speedup}"

    def to_dict(self) -> dict[str, Any]:
        """Convert the speed to plain primitives."""
        return {**asdict(self), "dropped": self.dropped}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> PhaseSpeed:
        """Read the result of :meth:`to_dict`; other entries are left out."""
        own = {each.name for each in fields(cls)}
        values: dict[str, Any] = {
            key: Interval(**value) if isinstance(value, dict) else value for key, value in content.items() if key in own
        }
        return cls(**values)


def shown_speedup(speedup: Interval) -> str:
    """A speedup with its interval, such as ``x1.30 [1.21, 1.37]``; without one if there are too few runs for it."""
    interval = "" if speedup.doubt else f" [{speedup.low:.2f}, {speedup.high:.2f}]"
    return f"x{speedup.median:.2f}{interval}"


@dataclass(frozen=True, kw_only=True)
class MeasuredSpeed(ABC):
    """What the reports of ``measure_speed`` and ``measure_forward`` share.

    Args:
        phases: Speeds by name.
        parameters_dense: Number of parameters of the dense model.
        parameters_dropped: Number of parameters that the dropped model computes with.
        file_bytes_dense: Bytes of the dense model's saved weights, without the header of the file.
        file_bytes_dropped: The same of the dropped model.
        peak_memory_dense: Bytes of the dense model's weights, plus the peak that a run allocates.
        peak_memory_dropped: The same of the dropped model, without its dropped weights.
        runs: Number of paired runs.
        batch_size: Sequences or images per run.
        device: The device, such as ``"cpu (2 threads)"`` or ``"NVIDIA H100"``.
    """

    phases: dict[str, PhaseSpeed]
    parameters_dense: int
    parameters_dropped: int
    file_bytes_dense: int
    file_bytes_dropped: int
    peak_memory_dense: int
    peak_memory_dropped: int
    runs: int
    batch_size: int
    device: str

    @property
    @abstractmethod
    def timed(self) -> dict[str, int]:
        """How many tokens, images or sequences the milliseconds of each phase are for."""

    @property
    @abstractmethod
    def lengths(self) -> dict[str, int]:
        """What a run took, by name, such as ``prompt_tokens``."""

    @property
    def kv_bytes(self) -> tuple[float, float] | None:
        """Bytes of the KV cache per token and sequence, dense and dropped; None without a cache."""
        return None

    @property
    def milliseconds(self) -> dict[str, tuple[float, float]]:
        """Milliseconds by phase, dense and dropped: of a prefill, a decoded token, or a forward pass."""
        return {
            name: (1000 * units / self.phases[name].dense, 1000 * units / self.phases[name].dropped)
            for name, units in self.timed.items()
        }

    def chosen(self, phase: str) -> tuple[str, PhaseSpeed]:
        """The phase of that name, or the forward pass of a model that does not decode."""
        name = phase if phase in self.phases else next(iter(self.phases))
        return name, self.phases[name]

    def __str__(self) -> str:
        """Format the report in a few lines, the dense model first."""
        sides = (
            ("parameters", short_count(self.parameters_dense), short_count(self.parameters_dropped)),
            ("file", short_bytes(self.file_bytes_dense), short_bytes(self.file_bytes_dropped)),
            ("peak memory", short_bytes(self.peak_memory_dense), short_bytes(self.peak_memory_dropped)),
        )
        lines = [f"{name}: {phase}" for name, phase in self.phases.items()]
        lines += [f"{name}: {before} -> {after}" for name, before, after in sides]
        if self.kv_bytes is not None:
            lines.append("KV cache per token: {:,.0f} -> {:,.0f} bytes".format(*self.kv_bytes))
        return "\n".join([*lines, f"{self.runs} pairs, {self._run()}, {self.device}"])

    @abstractmethod
    def _run(self) -> str:
        """A run in words."""

    def to_dict(self) -> dict[str, Any]:
        """Convert the report to plain primitives, for JSON and for checkpoints."""
        return {**asdict(self), "phases": {name: phase.to_dict() for name, phase in self.phases.items()}}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """Read the result of :meth:`to_dict`, also that of earlier versions."""
        content = dict(content)
        phases = content.pop("phases", None) or {name: content.pop(name) for name in ("prefill", "decode")}
        return cls(phases={name: PhaseSpeed.from_dict(fields) for name, fields in phases.items()}, **content)


@dataclass(frozen=True, kw_only=True)
class SpeedReport(MeasuredSpeed):
    """Result of :func:`~layershed.performance.speed.measure_speed`.

    Its phases are ``prefill``, over the prompt, and ``decode``, cached one-token steps.

    Args:
        kv_bytes_dense: Bytes of the dense model's KV cache per token and sequence, read from the real cache.
        kv_bytes_dropped: The same of the dropped model.
        prompt_tokens: Tokens per prompt.
        new_tokens: Decoded tokens per sequence.
    """

    kv_bytes_dense: float
    kv_bytes_dropped: float
    prompt_tokens: int
    new_tokens: int

    @property
    def prefill(self) -> PhaseSpeed:
        """Speed over the prompt."""
        return self.phases["prefill"]

    @property
    def decode(self) -> PhaseSpeed:
        """Speed of cached one-token steps."""
        return self.phases["decode"]

    @property
    def timed(self) -> dict[str, int]:
        """The tokens of all prompts, and one token of each sequence."""
        return {"prefill": self.batch_size * self.prompt_tokens, "decode": self.batch_size}

    @property
    def lengths(self) -> dict[str, int]:
        """Tokens per prompt, and decoded ones."""
        return {"prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens}

    @property
    def kv_bytes(self) -> tuple[float, float]:
        """Bytes of the KV cache per token and sequence, dense and dropped."""
        return self.kv_bytes_dense, self.kv_bytes_dropped

    @property
    def prefill_ms(self) -> tuple[float, float]:
        """Milliseconds of the prefill, dense and dropped."""
        return self.milliseconds["prefill"]

    @property
    def decode_ms(self) -> tuple[float, float]:
        """Milliseconds per decoded token of a sequence, dense and dropped."""
        return self.milliseconds["decode"]

    def _run(self) -> str:
        return f"{self.batch_size} x {self.prompt_tokens} + {self.new_tokens} tokens"


@dataclass(frozen=True, kw_only=True)
class ForwardReport(MeasuredSpeed):
    """Result of :func:`~layershed.performance.forward.measure_forward`.

    Its phases are ``forward``, and for an encoder-decoder also its ``encoder`` alone.

    Args:
        units: What a run counts, such as tokens.
    """

    units: int

    @property
    def forward(self) -> PhaseSpeed:
        """Speed of the whole forward pass."""
        return self.phases["forward"]

    @property
    def timed(self) -> dict[str, int]:
        """A whole run in each phase."""
        return dict.fromkeys(self.phases, self.units)

    @property
    def lengths(self) -> dict[str, int]:
        """Tokens, images or sequences of a forward pass."""
        return {f"forward_{self.forward.unit}": self.units}

    @property
    def forward_ms(self) -> tuple[float, float]:
        """Milliseconds of a forward pass, dense and dropped."""
        return self.milliseconds["forward"]

    def _run(self) -> str:
        return f"{self.units} {self.forward.unit}"


def report_from(content: dict[str, Any]) -> SpeedReport | ForwardReport:
    """Read a report of either kind from its primitives."""
    return ForwardReport.from_dict(content) if "units" in content else SpeedReport.from_dict(content)


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
