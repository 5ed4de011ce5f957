"""Measures the time of each sublayer inside real forward passes."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from layershed.devices import Clock
from layershed.discovery.find import dissect, find_transformer
from layershed.discovery.probe import eager, evaluating
from layershed.performance.stopwatch import Phase, SpeedSettings, Stopwatch, casting_alike, check_phase
from layershed.planning.plan import Sublayer
from layershed.progress import track
from layershed.recovery.lora import adapters_off
from layershed.stand_ins.contexts import lifted
from layershed.surgery import stopped_by


@dataclass(frozen=True)
class Latency:
    """Time of a forward pass, in total and by sublayer.

    Args:
        sublayers: Seconds per pass by sublayer. They cover the modules that do not run once the sublayer is dropped.
        total: Seconds per pass of the whole model.
    """

    sublayers: dict[Sublayer, float]
    total: float


def measure_latency(
    model: nn.Module,
    *,
    phase: Phase = "decode",
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    batch_size: int = 1,
    runs: int = 9,
    warmup: int = 1,
    name: str | None = None,
    clock: Clock | None = None,
) -> Latency:
    """Time every sublayer of the dense model inside real forward passes.

    Bypassed sublayers run during the measurement, and adapters are off. A compiled model runs eagerly, as compiled code
    has no boundaries between sublayers. On CUDA the marks are events in the stream, so nothing waits for them.

    Args:
        model: A causal language model, or a module that holds one.
        phase: ``"prefill"`` (one pass over the prompt) or ``"decode"`` (a cached one-token step).
        prompt_tokens: Tokens per prompt.
        new_tokens: Tokens decoded one at a time.
        batch_size: Sequences per run.
        runs: Number of runs. The result is their median.
        warmup: Number of uncounted runs before them.
        name: Path of the transformer inside ``model``; needed if the model holds several.
        clock: Clock for tests; None for the clock of the device.

    Raises:
        UnknownNameError: If the phase is unknown.
        MeasurementError: If a number is too low, or the tokens exceed the model's positions.
    """
    check_phase(phase)
    settings = SpeedSettings(prompt_tokens, new_tokens, batch_size, runs, warmup)
    transformer = settings.check(find_transformer(model, name=name))
    stopwatch = Stopwatch(transformer, settings, clock)
    recorder = _Recorder(stopwatch.clock)
    with ExitStack() as contexts:
        for context in (evaluating(transformer), torch.no_grad(), adapters_off(transformer), eager(transformer)):
            contexts.enter_context(context)
        contexts.enter_context(recorder.attached(transformer))
        contexts.enter_context(casting_alike(transformer))
        contexts.enter_context(lifted(transformer))
        turns = track(range(warmup + runs), "Measuring latency", warmup + runs)
        seconds = [recorder.run(stopwatch, phase) for _ in turns][warmup:]
    passes = 1 if phase == "prefill" else new_tokens
    return Latency(
        {sublayer: statistics.median(run[sublayer] for run, _ in seconds) / passes for sublayer in seconds[0][0]},
        statistics.median(total for _, total in seconds) / passes,
    )


class _Recorder:
    """Marks the start and the end of every module that a bypass would stop."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._marks: list[tuple[Sublayer, Any, Any]] = []
        self._begun: dict[nn.Module, Any] = {}

    def run(self, stopwatch: Stopwatch, phase: Phase) -> tuple[dict[Sublayer, float], float]:
        """Run a phase and return the seconds of each sublayer and of the whole phase."""
        output = None
        if phase == "decode":
            output, done = stopwatch.prefill(), self.clock.mark()
            self.clock.seconds(done, done)  # waits for the prefill
        self._marks.clear()
        start = self.clock.mark()
        if output is None:
            stopwatch.prefill()
        else:
            stopwatch.decode(output)
        end = self.clock.mark()
        total = self.clock.seconds(start, end)
        seconds: dict[Sublayer, float] = defaultdict(float)
        for sublayer, begin, stop in self._marks:
            seconds[sublayer] += self.clock.seconds(begin, stop)
        return dict(sorted(seconds.items())), total

    @contextmanager
    def attached(self, transformer: PreTrainedModel) -> Iterator[None]:
        """Watch the modules within the context."""
        branches = dissect(transformer).branches
        with ExitStack() as hooks:
            for branch in branches:
                paths = sorted(path for path, _ in stopped_by(branches, {branch.sublayer}))
                for path in paths:
                    if any(path.startswith(f"{outer}.") for outer in paths):
                        continue  # it runs inside another watched module
                    module = transformer.get_submodule(path)
                    end = partial(self._end, branch.sublayer)
                    hooks.callback(module.register_forward_pre_hook(self._begin).remove)
                    hooks.callback(module.register_forward_hook(end).remove)
            yield

    def _begin(self, module: nn.Module, _args: Any) -> None:
        self._begun[module] = self.clock.mark()

    def _end(self, sublayer: Sublayer, module: nn.Module, _args: Any, _output: Any) -> None:
        self._marks.append((sublayer, self._begun.pop(module), self.clock.mark()))
