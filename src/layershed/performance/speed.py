"""Measures speed, dense against dropped, interleaved in one process, with prefill and cached decode apart."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from layershed.arguments import check_kind
from layershed.devices import WallClock
from layershed.discovery.find import find_transformer
from layershed.discovery.probe import eager
from layershed.errors import LayershedError, MeasurementError
from layershed.performance.costs import CostModel
from layershed.performance.intervals import Interval
from layershed.performance.model_size import WeightSizes, weight_sizes
from layershed.performance.pairs import as_measured, in_turns, phase_speed
from layershed.performance.peak_memory import watching_memory
from layershed.performance.roofline import Ceilings, measure_ceilings
from layershed.performance.speed_report import PhaseSpeed, SpeedReport, size_fields, speedup_degradation_ratio
from layershed.performance.stopwatch import (
    SpeedSettings,
    Stopwatch,
    Timing,
    check_compiled,
    describe_device,
)
from layershed.surgery import bypassed_sublayers, dense

# The results are defined in speed_report and exported here, beside the function that returns them.
__all__ = ["Interval", "PhaseSpeed", "SpeedReport", "measure_speed", "speedup_degradation_ratio"]


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
    """Measure the speed of the dropped model against the dense one: its own weights without the bypass, or ``base``.

    - Dense and dropped alternate in one process (A B A B ...), in eval mode without gradients. Other load on the
      machine therefore affects both.
    - The speedup is the median over the pairs, with a 95 % bootstrap interval. The interval needs at least six runs.
    - The dense speed is the median over its runs, and the dropped speed is the dense speed times the speedup.
    - On CUDA the marks are events.
    - Recovery adapters are off on both sides, as merged adapters cost nothing. Both sides of a quantized model are
      quantized.
    - Compiled code and ``torch.autocast`` are measured as they are. Give a compiled model enough warm-up.

    Args:
        model: A causal language model with bypassed sublayers, or a module that holds one.
        base: The dense model to compare with; None for ``model`` with its bypass lifted. With a base, ``model`` is
            measured as it is, and its sublayers may be removed.
        prompt_tokens: Tokens per prompt (prefill).
        new_tokens: Tokens decoded one at a time from the KV cache.
        batch_size: Sequences per run.
        runs: Number of dense and dropped pairs.
        warmup: Number of uncounted pairs before them.
        name: Path of the transformer inside ``model``; needed if the model holds several.
        ceilings: The machine's ceilings, for the predicted speedup. None measures them, which takes a third of a
            second once per process.
        clock: Function that returns seconds, for tests; None for the clock of the device.

    Returns:
        Tokens per second, speedups, parameters, memory and KV-cache bytes, dense and dropped.

    Raises:
        MeasurementError: If nothing is bypassed and there is no base, a number is too low, the tokens exceed the
            model's positions, the model cannot decode from a cache, or a wrapper of ``torch.compile`` holds it.
    """
    settings = SpeedSettings(prompt_tokens, new_tokens, batch_size, runs, warmup)
    if ceilings is not None:
        check_kind(ceilings, Ceilings, "ceilings", MeasurementError)
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
    with as_measured(other, transformer):
        pairs = in_turns(before.run, after.run, runs, warmup)
        working = before.working_memory(), after.working_memory()
    slow, fast = pairs[-1]
    predicted = _predicted_speedups(before, after, settings, ceilings)
    prompt, decoded = batch_size * prompt_tokens, batch_size * new_tokens
    sizes = before.sizes(), after.sizes()
    return SpeedReport(
        phases={
            "prefill": phase_speed([(a.prefill, b.prefill) for a, b in pairs], prompt, predicted=predicted[0]),
            "decode": phase_speed([(a.decode, b.decode) for a, b in pairs], decoded, predicted=predicted[1]),
        },
        **size_fields(sizes, working),
        kv_bytes_dense=slow.kv_bytes / (prompt + decoded),
        kv_bytes_dropped=fast.kv_bytes / (prompt + decoded),
        runs=runs,
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        device=describe_device(transformer.device),
    )


@dataclass(frozen=True)
class _Side:
    """One side of the comparison, dense or dropped."""

    stopwatch: Stopwatch
    lifted: bool

    @property
    def transformer(self) -> PreTrainedModel:
        return self.stopwatch.transformer

    def run(self) -> Timing:
        with self._as_compared():
            return self.stopwatch.run()

    def working_memory(self) -> int:
        """Measure the peak bytes allocated beside the weights. Runs eagerly, as compiled code cannot be watched."""
        with self._as_compared(), eager(self.transformer), watching_memory(self.transformer.device) as peak:
            self.stopwatch.decode(self.stopwatch.prefill())
            return peak()

    def sizes(self) -> WeightSizes:
        return weight_sizes(self.transformer, lifted=self.lifted)

    def seconds(self, costs: CostModel, ceilings: Ceilings, settings: SpeedSettings) -> tuple[float, float]:
        """Return the least seconds of both phases in theory."""
        return costs.seconds(ceilings, settings, dropped=() if self.lifted else costs.dropped)

    def _as_compared(self) -> AbstractContextManager[None]:
        return dense(self.transformer) if self.lifted else nullcontext()


def _predicted_speedups(
    before: _Side, after: _Side, settings: SpeedSettings, ceilings: Ceilings | None
) -> tuple[float, float] | tuple[None, None]:
    try:
        costs = CostModel(after.transformer)
        other = costs if before.lifted else CostModel(before.transformer)
    except LayershedError:  # without known costs there is no prediction
        return None, None
    if ceilings is None:
        ceilings = measure_ceilings(after.transformer.device, after.transformer.dtype)
    slow, fast = before.seconds(other, ceilings, settings), after.seconds(costs, ceilings, settings)
    return slow[0] / fast[0], slow[1] / fast[1]
