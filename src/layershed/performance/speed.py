"""Measured speed: dense against dropped, interleaved in one process, prefill and cached decode apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from layershed.discovery.find import find_transformer
from layershed.discovery.probe import eager, evaluating
from layershed.errors import LayershedError, MeasurementError
from layershed.formatting import short_bytes, short_count, short_number
from layershed.performance.costs import CostModel
from layershed.performance.intervals import Interval, bootstrap_interval
from layershed.performance.model_size import WeightSizes, weight_sizes
from layershed.performance.peak_memory import watching_memory
from layershed.performance.roofline import Ceilings, measure_ceilings
from layershed.performance.stopwatch import (
    SpeedSettings,
    Stopwatch,
    Timing,
    WallClock,
    casting_alike,
    check_compiled,
    describe_device,
)
from layershed.recovery.lora import adapters_off
from layershed.surgery import bypassed_sublayers, dense


@dataclass(frozen=True)
class PhaseSpeed:
    """Speed of one phase, prefill or decode.

    Args:
        dense: Tokens per second of the dense model, median over runs.
        dropped: Tokens per second of the dropped model, median over runs.
        speedup: dropped over dense, from the paired runs.
        predicted: The speedup that the roofline model predicts from this machine's ceilings; None if the costs of the
            model could not be told.
        dense_spread: ``dense`` with its interval.
        dropped_spread: ``dropped`` with its interval.
    """

    dense: float
    dropped: float
    speedup: Interval
    predicted: float | None = None
    dense_spread: Interval | None = field(default=None, compare=False)
    dropped_spread: Interval | None = field(default=None, compare=False)

    @property
    def measurable(self) -> bool:
        """Whether there were enough runs for a 95 % interval of the speedup, and it excludes 1."""
        return self.speedup.trustworthy and not self.speedup.low <= 1 <= self.speedup.high

    @property
    def measured_over_predicted(self) -> float | None:
        """The measured speedup over the predicted one; None without a prediction."""
        return None if self.predicted is None else self.speedup.median / self.predicted

    def degradation(self, points_lost: float) -> float:
        """SDR of so many points, as :func:`speedup_degradation_ratio`; NaN where no speedup is measurable."""
        return speedup_degradation_ratio(points_lost, self.speedup.median) if self.measurable else math.nan

    def __str__(self) -> str:
        """In one line."""
        speedup = f"x{self.speedup.median:.2f} [{self.speedup.low:.2f}, {self.speedup.high:.2f}]"
        if self.predicted is not None:
            speedup += f", x{self.predicted:.2f} in theory"
        doubt = "" if self.measurable else "no measurable speedup, "
        return f"{short_number(self.dense)} -> {short_number(self.dropped)} tokens/s, {doubt}{speedup}"


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
        file_bytes_dense: Bytes of the dense model's saved weights, but for the header of the file.
        file_bytes_dropped: The same of what is left of them.
        peak_memory_dense: Bytes of the dense model's weights and of the most that a prefill and the decoding after it
            allocate beside them.
        peak_memory_dropped: The same of the dropped model, its dropped weights not counted.
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
    def prefill_ms(self) -> tuple[float, float]:
        """Milliseconds until the prompt is read, dense and dropped."""
        tokens = 1000 * self.batch_size * self.prompt_tokens
        return tokens / self.prefill.dense, tokens / self.prefill.dropped

    @property
    def decode_ms(self) -> tuple[float, float]:
        """Milliseconds per decoded token of a sequence, dense and dropped."""
        return 1000 * self.batch_size / self.decode.dense, 1000 * self.batch_size / self.decode.dropped

    def __str__(self) -> str:
        """In a few lines, the dense model first."""
        file, memory = (
            f"{short_bytes(dense)} -> {short_bytes(dropped)}"
            for dense, dropped in (
                (self.file_bytes_dense, self.file_bytes_dropped),
                (self.peak_memory_dense, self.peak_memory_dropped),
            )
        )
        lines = (
            f"prefill: {self.prefill}",
            f"decode: {self.decode}",
            f"parameters: {short_count(self.parameters_dense)} -> {short_count(self.parameters_dropped)}",
            f"file: {file}",
            f"peak memory: {memory}",
            f"KV cache per token: {self.kv_bytes_dense:,.0f} -> {self.kv_bytes_dropped:,.0f} bytes",
            f"{self.runs} pairs, {self.batch_size} x {self.prompt_tokens} + {self.new_tokens} tokens, {self.device}",
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain primitives, for JSON and for checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> SpeedReport:
        """The inverse of :meth:`to_dict`."""
        phases = {}
        for name in ("prefill", "decode"):
            fields = content[name]
            intervals = {key: Interval(**value) for key, value in fields.items() if isinstance(value, dict)}
            phases[name] = PhaseSpeed(**{**fields, **intervals})
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


def measure_speed(
    model: nn.Module,
    *,
    base: nn.Module | None = None,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    batch_size: int = 1,
    runs: int = 9,
    warmup: int = 1,
    name: str | None = None,
    ceilings: Ceilings | None = None,
    clock: Callable[[], float] | None = None,
) -> SpeedReport:
    """Speed of the dropped model against the dense one: the same weights with the bypass lifted, or another model.

    Dense and dropped alternate in one process (A B A B ...), in eval mode without gradients, so that whatever else the
    machine does hits both. The speedup is the median over the pairs, with a 95 % bootstrap interval, which takes at
    least six runs. On CUDA the marks are events. Recovery adapters are off on both sides, as if they were
    merged; of a quantized model both sides are quantized. Under ``torch.autocast``, or of a compiled model, what is
    measured is that; give a compiled one enough warm-up.

    Args:
        model: A causal language model with bypassed sublayers, or a module that holds one.
        base: The dense model to compare with; None for ``model`` with its bypass lifted. With it, ``model`` is taken as
            it is, so that also one whose sublayers were removed can be measured.
        prompt_tokens: Tokens per prompt (prefill).
        new_tokens: Tokens decoded one at a time from the KV cache.
        batch_size: Sequences per run.
        runs: Number of dense and dropped pairs.
        warmup: Pairs that run first and are not counted.
        name: Path of the transformer inside ``model``, needed where it holds more than one.
        ceilings: What the machine can do at most, for the predicted speedup; None measures it, which
            takes a third of a second once per process.
        clock: Returns seconds; for tests. None for that of the device.

    Returns:
        Tokens per second, speedups, parameters, memory and KV-cache bytes, dense and dropped.

    Raises:
        MeasurementError: If nothing is bypassed and there is no base, a number is too low, the model has no place for
            that many tokens or cannot decode from a cache, or a wrapper of ``torch.compile`` is around it.
    """
    settings = SpeedSettings(prompt_tokens, new_tokens, batch_size, runs, warmup)
    transformer = settings.check_structure(find_transformer(model, name=name))
    if base is None and not bypassed_sublayers(transformer):
        raise MeasurementError("measure_speed: nothing is bypassed, so there is nothing to compare. Bypass first.")
    other = transformer if base is None else settings.check_structure(find_transformer(base))
    for holder, held in ((model, transformer), (base or model, other)):
        check_compiled(holder, held)
    for held in {id(held): held for held in (transformer, other)}.values():
        settings.check(held)
    watch = None if clock is None else WallClock(transformer.device, clock)
    before = _Side(Stopwatch(other, settings, watch), lifted=base is None)
    after = _Side(Stopwatch(transformer, settings, watch), lifted=False)
    with ExitStack() as contexts:
        contexts.enter_context(torch.no_grad())
        for side in {id(side.transformer): side for side in (before, after)}.values():
            contexts.enter_context(evaluating(side.transformer))
            contexts.enter_context(adapters_off(side.transformer))  # merged, they cost nothing
            contexts.enter_context(casting_alike(side.transformer))
        pairs = [(before.run(), after.run()) for _ in range(warmup + runs)][warmup:]
        working = before.working_memory(), after.working_memory()
    slow, fast = zip(*pairs, strict=True)
    predicted = _predicted_speedups(before, after, settings, ceilings)
    prompt, decoded = batch_size * prompt_tokens, batch_size * new_tokens
    sizes = before.sizes(), after.sizes()
    return SpeedReport(
        prefill=_phase([t.prefill for t in slow], [t.prefill for t in fast], prompt, predicted[0]),
        decode=_phase([t.decode for t in slow], [t.decode for t in fast], decoded, predicted[1]),
        parameters_dense=sizes[0].parameters,
        parameters_dropped=sizes[1].parameters,
        kv_bytes_dense=slow[-1].kv_bytes / (prompt + decoded),
        kv_bytes_dropped=fast[-1].kv_bytes / (prompt + decoded),
        file_bytes_dense=sizes[0].bytes,
        file_bytes_dropped=sizes[1].bytes,
        peak_memory_dense=sizes[0].bytes + working[0],
        peak_memory_dropped=sizes[1].bytes + working[1],
        runs=runs,
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        device=describe_device(transformer.device),
    )


@dataclass(frozen=True)
class _Side:
    """One of the two that are compared."""

    stopwatch: Stopwatch
    lifted: bool

    @property
    def transformer(self) -> PreTrainedModel:
        return self.stopwatch.transformer

    def run(self) -> Timing:
        with self._as_compared():
            return self.stopwatch.run()

    def working_memory(self) -> int:
        """The most bytes that are allocated beside the weights; compiled code would not let itself be watched."""
        with self._as_compared(), eager(self.transformer), watching_memory(self.transformer.device) as peak:
            self.stopwatch.decode(self.stopwatch.prefill())
            return peak()

    def sizes(self) -> WeightSizes:
        return weight_sizes(self.transformer, lifted=self.lifted)

    def seconds(self, costs: CostModel, ceilings: Ceilings, settings: SpeedSettings) -> tuple[float, float]:
        """The least time of both phases that theory allows."""
        return costs.seconds(ceilings, settings, dropped=() if self.lifted else costs.dropped)

    def _as_compared(self) -> AbstractContextManager[None]:
        return dense(self.transformer) if self.lifted else nullcontext()


def _predicted_speedups(
    before: _Side, after: _Side, settings: SpeedSettings, ceilings: Ceilings | None
) -> tuple[float, float] | tuple[None, None]:
    try:
        costs = CostModel(after.transformer)
        other = costs if before.lifted else CostModel(before.transformer)
    except LayershedError:  # of a model whose structure does not tell, there is no prediction
        return None, None
    if ceilings is None:
        ceilings = measure_ceilings(after.transformer.device, after.transformer.dtype)
    slow, fast = before.seconds(other, ceilings, settings), after.seconds(costs, ceilings, settings)
    return slow[0] / fast[0], slow[1] / fast[1]


def _phase(slow: list[float], fast: list[float], tokens: int, predicted: float | None) -> PhaseSpeed:
    return PhaseSpeed(
        dense=tokens / statistics.median(slow),
        dropped=tokens / statistics.median(fast),
        speedup=bootstrap_interval([a / b for a, b in zip(slow, fast, strict=True)]),
        predicted=predicted,
        dense_spread=bootstrap_interval([tokens / seconds for seconds in slow]),
        dropped_spread=bootstrap_interval([tokens / seconds for seconds in fast]),
    )
