"""What SpeedMonitor measures of a model: prefill and decode, or the forward pass of one that does not decode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from layershed.discovery.find import predicts_next_token
from layershed.errors import MeasurementError
from layershed.integration.metric_names import speed_name
from layershed.performance.forward import ForwardReport
from layershed.performance.speed import SpeedReport
from layershed.performance.speed_report import PhaseSpeed
from layershed.performance.stopwatch import Phase, SpeedSettings

AnySpeed = SpeedReport | ForwardReport
_DEFAULT = SpeedSettings()


@dataclass(frozen=True)
class SpeedTrial:
    """How a model is measured.

    Args:
        settings: Lengths and numbers.
        generates: Whether prefill and decode are measured; else the forward pass.
        reason: Why a causal language model is measured by its forward pass; empty if it is not.
    """

    settings: SpeedSettings
    generates: bool
    reason: str = ""


def speed_trial(
    transformer: nn.Module, prompt_tokens: int | None, new_tokens: int | None, batch_size: int, runs: int
) -> SpeedTrial:
    """Decide how a model is measured. Lengths that are None fit into the model's positions.

    Raises:
        MeasurementError: If a number is too low, or given lengths exceed the model's positions.
    """
    lengths = _lengths(transformer, prompt_tokens, new_tokens)
    settings = SpeedSettings(*lengths, batch_size, runs)
    settings.check_numbers()
    if not predicts_next_token(transformer):
        return SpeedTrial(settings, generates=False)
    settings.check_structure(transformer)
    try:
        settings.check(transformer)
    except MeasurementError as error:
        return SpeedTrial(settings, generates=False, reason=str(error))
    return SpeedTrial(settings, generates=True)


def _lengths(transformer: nn.Module, prompt_tokens: int | None, new_tokens: int | None) -> tuple[int, int]:
    """The given lengths, or the default ones, made shorter where the model has fewer positions."""
    prompt = _DEFAULT.prompt_tokens if prompt_tokens is None else prompt_tokens
    new = _DEFAULT.new_tokens if new_tokens is None else new_tokens
    config: Any = getattr(transformer, "config", None)
    places = getattr(config.get_text_config(), "max_position_embeddings", 0) if predicts_next_token(transformer) else 0
    if places and places > 1:
        if new_tokens is None:
            new = max(1, min(new, (places - (prompt_tokens or 0)) // (2 if prompt_tokens is None else 1)))
        if prompt_tokens is None:
            prompt = max(1, min(prompt, places - new))
    return prompt, new


def report_from(content: dict[str, Any]) -> AnySpeed:
    """Read a report of either kind from its primitives."""
    return ForwardReport.from_dict(content) if "phases" in content else SpeedReport.from_dict(content)


def phase_in(report: AnySpeed, phase: Phase) -> PhaseSpeed:
    """The phase whose speedup counts; the forward pass of a model that does not decode."""
    return report.forward if isinstance(report, ForwardReport) else report.phases[phase]


def figures(report: AnySpeed) -> dict[str, float]:
    """The logged figures of a measurement, by their names."""
    found: dict[str, float] = {
        "parameters": float(report.parameters_dropped),
        "peak_memory": float(report.peak_memory_dropped),
        "file_bytes": float(report.file_bytes_dropped),
    }
    if isinstance(report, ForwardReport):
        found["forward_ms"] = report.forward_ms[1]
    else:
        found["kv_bytes_per_token"] = report.kv_bytes_dropped
        found["prefill_ms"], found["decode_ms"] = report.prefill_ms[1], report.decode_ms[1]
    for name, phase in report.phases.items():
        found[f"{name}_{phase.unit}_per_s_dense"] = phase.dense
        found[f"{name}_{phase.unit}_per_s"] = phase.dropped
        found[f"{name}_speedup"] = phase.speedup.median
        found[f"{name}_speedup_low"] = phase.speedup.low
        found[f"{name}_speedup_high"] = phase.speedup.high
        if phase.predicted is not None:
            found[f"{name}_predicted"] = phase.predicted
    return {speed_name(name): value for name, value in found.items()}
