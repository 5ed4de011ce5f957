"""What SpeedMonitor measures of a model: prefill and decode, or the forward pass of one that does not decode."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from layershed.discovery.find import predicts_next_token
from layershed.errors import MeasurementError
from layershed.integration.metric_names import speed_name
from layershed.performance.forward import counted_in, forward_inputs
from layershed.performance.speed_report import MeasuredSpeed
from layershed.performance.stopwatch import SpeedSettings

_DEFAULT = SpeedSettings()


@dataclass(frozen=True)
class SpeedTrial:
    """How a model is measured.

    Args:
        settings: Lengths and numbers.
        generates: Whether prefill and decode are measured; else the forward pass.
        notes: Why a causal language model is measured by its forward pass, and which given lengths have no effect.
    """

    settings: SpeedSettings
    generates: bool
    notes: tuple[str, ...] = ()


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
    notes: list[str] = []
    if predicts_next_token(transformer):
        settings.check_structure(transformer)
        try:
            settings.check(transformer)
            return SpeedTrial(settings, generates=True)
        except MeasurementError as error:
            notes.append(f"It measures the forward pass instead of decoding. {error}")
    return SpeedTrial(settings, False, (*notes, *_without_effect(transformer, settings, prompt_tokens, new_tokens)))


def _without_effect(
    transformer: nn.Module, settings: SpeedSettings, prompt_tokens: int | None, new_tokens: int | None
) -> Iterator[str]:
    """Say which given lengths do not change what the forward pass takes."""
    unit, counted = counted_in(forward_inputs(transformer, settings.prompt_tokens, settings.batch_size))
    given = [] if new_tokens is None else [f"new_tokens={new_tokens}"]
    if prompt_tokens is not None and (unit, counted) != ("tokens", prompt_tokens * settings.batch_size):
        given.insert(0, f"prompt_tokens={prompt_tokens}")
    if given:
        yield (
            f"{' and '.join(given)} {'have' if len(given) > 1 else 'has'} no effect: a forward pass of "
            f"{type(transformer).__name__} is measured, over {counted:,} {unit}. Leave out what has no effect. A "
            "hand-written model is measured on the inputs of its SublayerAdapter; a text model on at most as many "
            "tokens as its positions allow."
        )


def _lengths(transformer: nn.Module, prompt_tokens: int | None, new_tokens: int | None) -> tuple[int, int]:
    """The given lengths, or the default ones, made shorter where the model has fewer positions."""
    prompt = _DEFAULT.prompt_tokens if prompt_tokens is None else prompt_tokens
    new = _DEFAULT.new_tokens if new_tokens is None else new_tokens
    config: Any = getattr(transformer, "config", None)
    places = getattr(config.get_text_config(), "max_position_embeddings", 0) if predicts_next_token(transformer) else 0
    if not places or places < 2:
        return prompt, new
    if new_tokens is None:  # what a given prompt leaves, or half
        room = places // 2 if prompt_tokens is None else places - prompt_tokens
        new = max(1, min(new, room))
    if prompt_tokens is None:
        prompt = max(1, min(prompt, places - new))
    return prompt, new


def figures(report: MeasuredSpeed) -> dict[str, float]:
    """The logged figures of a measurement, by their names."""
    found: dict[str, float] = {
        "parameters": float(report.parameters_dropped),
        "peak_memory": float(report.peak_memory_dropped),
        "file_bytes": float(report.file_bytes_dropped),
        "batch_size": float(report.batch_size),
    }
    found.update({name: float(length) for name, length in report.lengths.items()})
    if report.kv_bytes is not None:
        found["kv_bytes_per_token"] = report.kv_bytes[1]
    for name, phase in report.phases.items():
        found[f"{name}_ms"] = report.milliseconds[name][1]
        found[f"{name}_{phase.unit}_per_s_dense"] = phase.dense
        found[f"{name}_{phase.unit}_per_s"] = phase.dropped
        found[f"{name}_speedup"] = phase.speedup.median
        found[f"{name}_speedup_low"] = phase.speedup.low
        found[f"{name}_speedup_high"] = phase.speedup.high
        if phase.predicted is not None:
            found[f"{name}_predicted"] = phase.predicted
    return {speed_name(name): value for name, value in found.items()}
