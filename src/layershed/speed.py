"""Measured speed: dense against dropped, interleaved in one process, prefill and cached decode apart."""

from __future__ import annotations

import inspect
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layershed.discovery import find_transformer, predicts_next_token
from layershed.errors import MeasurementError
from layershed.probe import evaluating
from layershed.recovery import adapted_modules, adapters_off
from layershed.surgery import bypassed_sublayers, dense, dropped_parameter_names


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


def measure_speed(
    model: nn.Module,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    batch_size: int = 1,
    runs: int = 5,
    warmup: int = 1,
    name: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> SpeedReport:
    """Speed of the dropped model against the dense one: the same weights with the bypass lifted.

    Dense and dropped alternate in one process (A B A B ...), in eval mode without gradients, so that whatever else the
    machine does hits both. The speedup is the median over the pairs, with a 95 % bootstrap interval. Recovery adapters
    are off on both sides, as if they were merged; of a quantized model both sides are quantized.

    Args:
        model: A causal language model with bypassed sublayers, or a module that holds one.
        prompt_tokens: Tokens per prompt (prefill).
        new_tokens: Tokens decoded one at a time from the KV cache.
        batch_size: Sequences per run.
        runs: Number of dense and dropped pairs.
        warmup: Pairs that run first and are not counted.
        name: Path of the transformer inside ``model``, needed where it holds more than one.
        clock: Returns seconds; for tests.

    Returns:
        Tokens per second, speedups, parameters and KV-cache bytes, dense and dropped.

    Raises:
        MeasurementError: If nothing is bypassed, a number is below 1, or the model has no place for that many tokens.
    """
    transformer = find_transformer(model, name=name)
    check_room(transformer, prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch_size=batch_size, runs=runs)
    if not bypassed_sublayers(transformer):
        raise MeasurementError("measure_speed: nothing is bypassed, so there is nothing to compare; bypass first.")
    if warmup < 0:
        raise MeasurementError(f"measure_speed(warmup={warmup}): it must not be negative.")
    stopwatch = _Stopwatch(transformer, prompt_tokens, new_tokens, batch_size, clock)
    timings: dict[str, list[_Timing]] = {"dense": [], "dropped": []}
    # adapters off on both sides: merged, they cost nothing
    with evaluating(transformer), torch.no_grad(), adapters_off(transformer):
        for pair in range(warmup + runs):
            for side, context in (("dense", dense(transformer)), ("dropped", nullcontext())):
                timing = stopwatch.run(context)
                if pair >= warmup:
                    timings[side].append(timing)
    prompt, decoded = batch_size * prompt_tokens, batch_size * new_tokens
    gone = dropped_parameter_names(transformer)
    parameters = _parameter_sizes(transformer)
    return SpeedReport(
        prefill=_phase([t.prefill for t in timings["dense"]], [t.prefill for t in timings["dropped"]], prompt),
        decode=_phase([t.decode for t in timings["dense"]], [t.decode for t in timings["dropped"]], decoded),
        parameters_dense=sum(parameters.values()),
        parameters_dropped=sum(size for name, size in parameters.items() if name not in gone),
        kv_bytes_dense=timings["dense"][-1].kv_bytes / (prompt + decoded),
        kv_bytes_dropped=timings["dropped"][-1].kv_bytes / (prompt + decoded),
        runs=runs,
        batch_size=batch_size,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        device=_describe(next(transformer.parameters()).device),
    )


def bootstrap_interval(values: Sequence[float], *, resamples: int = 2000) -> Interval:
    """Median with its 95 % percentile-bootstrap interval (Efron and Tibshirani 1993, chapter 13), always the same.

    Example:
        >>> bootstrap_interval([1.2, 1.2, 1.2])
        Interval(median=1.2, low=1.2, high=1.2)
    """
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(resamples))
    low, high = medians[int(0.025 * resamples)], medians[int(0.975 * resamples) - 1]
    return Interval(statistics.median(values), low, high)


@dataclass(frozen=True)
class _Timing:
    prefill: float
    decode: float
    kv_bytes: int


class _Stopwatch:
    """Times one prefill and the decoding after it, over and over on the same prompt."""

    def __init__(
        self,
        transformer: PreTrainedModel,
        prompt_tokens: int,
        new_tokens: int,
        batch_size: int,
        clock: Callable[[], float],
    ) -> None:
        self.transformer, self.new_tokens, self.clock = transformer, new_tokens, clock
        vocabulary = transformer.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(vocabulary, (batch_size, prompt_tokens), generator=generator)
        self.prompt = prompt.to(transformer.device)
        # as generate() does: logits of the last position only, where the model can
        last_only = "logits_to_keep" in inspect.signature(transformer.forward).parameters
        self.options = {"use_cache": True, **({"logits_to_keep": 1} if last_only else {})}

    def run(self, context: AbstractContextManager[None]) -> _Timing:
        """One prefill and one decoding within a context."""
        with context:
            start = self._now()
            output = self.transformer(input_ids=self.prompt, **self.options)
            prefilled = self._now()
            for _ in range(self.new_tokens):
                token = output.logits[:, -1:].argmax(-1)
                output = self.transformer(input_ids=token, past_key_values=output.past_key_values, **self.options)
            decoded = self._now()
        return _Timing(prefilled - start, decoded - prefilled, cache_bytes(output.past_key_values))

    def _now(self) -> float:
        if self.transformer.device.type != "cpu":  # an accelerator only queues the work
            torch.accelerator.synchronize(self.transformer.device)
        return self.clock()


def cache_bytes(cache: Any) -> int:
    """Bytes of memory behind the keys and values that a KV cache holds; memory that two share counts once."""
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _parameter_sizes(transformer: nn.Module) -> dict[str, int]:
    """Number of weights by name: of a packed 4-bit one those that it stands for, and none of adapters."""
    adapters = {
        id(parameter)
        for layer in adapted_modules(transformer).values()
        for name, parameter in layer.named_parameters()
        if not name.startswith("base_layer.")
    }
    return {
        name: math.prod(getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape))
        for name, parameter in transformer.named_parameters()
        if id(parameter) not in adapters
    }


def _phase(dense_seconds: list[float], dropped_seconds: list[float], tokens: int) -> PhaseSpeed:
    ratios = [slow / fast for slow, fast in zip(dense_seconds, dropped_seconds, strict=True)]
    return PhaseSpeed(
        dense=tokens / statistics.median(dense_seconds),
        dropped=tokens / statistics.median(dropped_seconds),
        speedup=bootstrap_interval(ratios),
    )


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def check_room(transformer: nn.Module, *, prompt_tokens: int, new_tokens: int, batch_size: int, runs: int) -> None:
    """Refuse, before anything runs, settings of :func:`measure_speed` that cannot be measured.

    Raises:
        MeasurementError: If a number is below 1, or prompt and new tokens exceed the model's positions.
    """
    numbers = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch_size": batch_size, "runs": runs}
    for name, number in numbers.items():
        if number < 1:
            raise MeasurementError(f"measure_speed({name}={number}): it must be at least 1.")
    if not predicts_next_token(transformer):
        raise MeasurementError(
            f"measure_speed: {type(transformer).__name__} does not predict the next token; decoding needs a causal "
            "language model."
        )
    places = getattr(transformer.config.get_text_config(), "max_position_embeddings", None)
    if places is not None and prompt_tokens + new_tokens > places:
        raise MeasurementError(
            f"measure_speed: prompt_tokens={prompt_tokens} and new_tokens={new_tokens} do not fit into the model's "
            f"{places} positions."
        )
