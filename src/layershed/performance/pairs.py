"""Dense and dropped in turns, and the speed of a phase from its pairs of times."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import nn

from layershed.discovery.probe import evaluating
from layershed.performance.intervals import bootstrap_interval
from layershed.performance.speed_report import PhaseSpeed
from layershed.performance.stopwatch import casting_alike
from layershed.progress import track
from layershed.recovery.lora import adapters_off

Run = TypeVar("Run")


@contextmanager
def as_measured(*transformers: nn.Module) -> Iterator[None]:
    """Within the context: eval mode, no gradients, adapters off (merged, they cost nothing), weights cast alike."""
    with ExitStack() as contexts:
        contexts.enter_context(torch.no_grad())
        for transformer in {id(each): each for each in transformers}.values():
            for context in (evaluating, adapters_off, casting_alike):
                contexts.enter_context(context(transformer))
        yield


def in_turns(dense: Callable[[], Run], dropped: Callable[[], Run], runs: int, warmup: int) -> list[tuple[Run, Run]]:
    """Run dense and dropped in turns, A B A B, and return the pairs after the warm-up."""
    turns = track(range(warmup + runs), "Measuring speed", warmup + runs)
    return [(dense(), dropped()) for _ in turns][warmup:]


def phase_speed(
    pairs: Sequence[tuple[float, float]], counted: int, unit: str = "tokens", predicted: float | None = None
) -> PhaseSpeed:
    """The speed of a phase.

    Args:
        pairs: Seconds of each pair of runs, dense and dropped.
        counted: How many of ``unit`` a run takes.
        unit: What is counted.
        predicted: The speedup in theory; None if unknown.
    """
    return PhaseSpeed(
        dense=counted / statistics.median(slow for slow, _ in pairs),
        speedup=bootstrap_interval([slow / fast for slow, fast in pairs]),
        predicted=predicted,
        dense_spread=bootstrap_interval([counted / slow for slow, _ in pairs]),
        unit=unit,
    )
