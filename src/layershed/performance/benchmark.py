"""Compares the quality and measured speed of dropped models, one model or a sweep, with their dense base."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any, Literal

from torch import nn

from layershed.discovery.find import find_sublayers, find_transformer
from layershed.discovery.model_record import recorded
from layershed.errors import MeasurementError, SelectionError
from layershed.performance.latency import measure_latency
from layershed.performance.roofline import Ceilings, measure_ceilings
from layershed.performance.speed import SpeedReport, measure_speed
from layershed.performance.stopwatch import SpeedSettings, describe_device
from layershed.planning.plan import DropPlan, ImportanceScores, Scope
from layershed.planning.selection import Objective, check_objective, equal_scores, select_sublayers
from layershed.quality import Quality
from layershed.recovery.lora import adapted_modules, adapters_off
from layershed.surgery import bypass, bypassed_sublayers, dense, dropped_sublayers, removed_sublayers, restore

QualityName = Literal["accuracy", "loss", "perplexity"]
# Descriptions of a dense base from the dropped model's weights. Without adapters they may have changed since the drop.
LIFTED = "the same weights with the bypass lifted"
TEACHER = f"{LIFTED} and the adapters off"


@dataclass(frozen=True)
class Measurement:
    """Measured speed and quality of one dropped model.

    Args:
        scope: Scope of the ranking in a sweep; None for a single model.
        count: Number dropped in a sweep: blocks with scope ``"block"``, else sublayers. None for a single model.
        plan: The dropped sublayers.
        speed: Speed against the dense model.
        quality: Quality on the held-out text.
    """

    scope: Scope | None
    count: int | None
    plan: DropPlan
    speed: SpeedReport
    quality: Quality


@dataclass(frozen=True)
class Benchmark:
    """Result of a benchmark.

    Args:
        model: Name or path of the model.
        base: Name or path of the dense model, or a description such as ``LIFTED``.
        dense: Quality of the dense model.
        measurements: One for each dropped model.
        quality: The measure of quality that is shown and enters the SDR.
        ceilings: This machine's measured ceilings, the basis of the predicted speedups.
        settings: Options of the benchmark.
        machine: Description of the machine.
    """

    model: str
    base: str
    dense: Quality
    measurements: tuple[Measurement, ...]
    quality: QualityName
    ceilings: Ceilings
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]

    def degradation(self, measurement: Measurement) -> float:
        """SDR: points lost per percent of decode speed. NaN if no speedup is measurable or the loss is unknown.

        A point is a percentage point of accuracy, a hundredth of a nat or a hundredth of perplexity.
        """
        if self.base == LIFTED:
            return math.nan
        lost = shown_quality(measurement.quality, self.quality) - shown_quality(self.dense, self.quality)
        return measurement.speed.decode.degradation(-lost if self.quality == "accuracy" else 100 * lost)

    def to_dict(self) -> dict[str, Any]:
        """Convert the result to plain primitives, for JSON."""
        measurements = [
            {
                "scope": one.scope,
                "count": one.count,
                "plan": one.plan.to_dict(),
                "quality": _quality_fields(one.quality),
                "sdr": None if math.isnan(sdr := self.degradation(one)) else sdr,
                "speed": _speed_fields(one.speed),
            }
            for one in self.measurements
        ]
        return {**asdict(self), "dense": _quality_fields(self.dense), "measurements": measurements}


def shown_quality(quality: Quality, name: QualityName) -> float:
    """Return the accuracy in percent, the loss in nats or the perplexity."""
    return {"accuracy": 100 * quality.accuracy, "loss": quality.loss, "perplexity": math.exp(quality.loss)}[name]


def lifted_base(model: nn.Module) -> str:
    """Describe the dense base that results from lifting the bypass, with adapters off if there are any."""
    return TEACHER if adapted_modules(find_transformer(model)) else LIFTED


def check_comparison(model: nn.Module, base: str | None, scopes: Sequence[Scope], counts: Sequence[int]) -> None:
    """Check that there is something to compare, before anything runs.

    Args:
        model: The model.
        base: The dense model to load, if any.
        scopes: Scopes of a sweep.
        counts: Counts of a sweep; empty to compare the model as it is.

    Raises:
        MeasurementError: If nothing is dropped, there is no dense model, or a sweep starts from a dropped model.
        SelectionError: If a sweep names no scope or cannot meet a count.
    """
    gone = dropped_sublayers(model)
    names = ", ".join(sublayer.name for sublayer in gone)
    if counts:
        if gone or base is not None:
            reason = f"this model already lacks {names}" if gone else "that model is the base. Leave out base"
            raise MeasurementError(f"benchmark: a sweep over counts begins with the dense model, and {reason}.")
        _check_sweep(model, scopes, counts)
    elif base is None and removed_sublayers(model):
        raise MeasurementError(
            f"benchmark: there is no dense model to compare with, as the weights of {names} were removed. Give the "
            "original dense model with --base."
        )
    elif base is None and not gone:
        raise MeasurementError(
            "benchmark: there is nothing to compare. Give a dropped model with --base DENSE, a checkpoint with "
            "--ckpt_path FILE, or a dense model with --counts '[2, 4, 8]'."
        )


def _check_sweep(model: nn.Module, scopes: Sequence[Scope], counts: Sequence[int]) -> None:
    if not scopes:
        raise SelectionError("benchmark: scopes is empty. Give at least one.")
    equal = equal_scores(find_sublayers(model))
    for scope in scopes:
        for count in counts:
            select_sublayers(equal, scope, count=count)


class Bench:
    """Measures dropped models under the same settings.

    Args:
        model: The model, or a module that holds it.
        quality: Function that measures the quality of a model.
        settings: Lengths and numbers of the speed measurement.
        base: The dense model; None for ``model`` with its bypass lifted.
    """

    def __init__(
        self,
        model: nn.Module,
        quality: Callable[[nn.Module], Quality],
        settings: SpeedSettings,
        base: nn.Module | None = None,
    ) -> None:
        self.transformer = settings.check_structure(find_transformer(model))
        self.base = None if base is None else settings.check_structure(find_transformer(base))
        self.quality, self.settings = quality, settings
        for transformer in (self.transformer, self.base):
            if transformer is not None:
                settings.check(transformer)

    @cached_property
    def ceilings(self) -> Ceilings:
        """This machine's ceilings, measured on first use."""
        return measure_ceilings(self.transformer.device, self.transformer.dtype)

    def dense_quality(self) -> Quality:
        """Measure the quality of the base."""
        if self.base is not None:
            return self.quality(self.base)
        with ExitStack() as contexts:
            if bypassed_sublayers(self.transformer):
                contexts.enter_context(dense(self.transformer))
                contexts.enter_context(adapters_off(self.transformer))  # they were trained for the dropped model
            return self.quality(self.transformer)

    def measure(self, plan: DropPlan, scope: Scope | None = None, count: int | None = None) -> Measurement:
        """Measure the model in its current state."""
        speed = measure_speed(self.transformer, base=self.base, ceilings=self.ceilings, **asdict(self.settings))
        return Measurement(scope, count, recorded(plan, self.transformer), speed, self.quality(self.transformer))

    def sweep(
        self,
        scores: ImportanceScores,
        scopes: Sequence[Scope],
        counts: Sequence[int],
        objective: Objective = "importance",
    ) -> Iterator[Measurement]:
        """Measure every scope with every count, and restore the model after each.

        Raises:
            SelectionError: If the objective is unknown or a count cannot be met; raised before any measurement.
        """
        check_objective(objective)
        for scope in scopes:
            for count in counts:
                select_sublayers(scores, scope, count=count)
        latency = None
        if objective == "speed":
            latency = measure_latency(self.transformer, **asdict(self.settings)).sublayers
        for scope in scopes:
            for count in counts:
                plan = select_sublayers(scores, scope, count=count, objective=objective, latency=latency)
                bypass(self.transformer, plan)
                try:
                    measured = self.measure(plan, scope, count)
                finally:
                    restore(self.transformer, plan)
                yield measured

    def machine(self) -> dict[str, Any]:
        """Describe the machine and the versions of the libraries."""
        return {
            "device": describe_device(self.transformer.device),
            "dtype": str(self.transformer.dtype).removeprefix("torch."),
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers", "layershed")},
        }


def _quality_fields(quality: Quality) -> dict[str, float]:
    return {**asdict(quality), "perplexity": math.exp(quality.loss)}


def _speed_fields(speed: SpeedReport) -> dict[str, Any]:
    """Convert a report to primitives, computed properties included."""
    fields = speed.to_dict()
    for name, phase in speed.phases.items():
        fields["phases"][name] |= {
            **dict(zip(("dense_ms", "dropped_ms"), speed.milliseconds[name], strict=True)),
            "measurable": phase.measurable,
            "measured_over_predicted": phase.measured_over_predicted,
        }
    return fields
