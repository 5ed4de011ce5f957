"""Speed of one forward pass, dense against dropped, for models that do not decode token by token.

These are encoders, vision and audio models, encoder-decoders, and models of torch with a SublayerAdapter.
"""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layershed.batches import device_of
from layershed.devices import WallClock, clock_for
from layershed.discovery.find import find_transformer
from layershed.discovery.probe import eager, evaluating, example_inputs
from layershed.errors import MeasurementError
from layershed.performance.intervals import bootstrap_interval
from layershed.performance.model_size import weight_sizes
from layershed.performance.peak_memory import watching_memory
from layershed.performance.speed_report import PhaseSpeed, phase_from, size_fields, size_lines
from layershed.performance.stopwatch import SpeedSettings, casting_alike, check_compiled, describe_device
from layershed.recovery.lora import adapters_off
from layershed.surgery import bypassed_sublayers, dense

FORWARD, ENCODER = "forward", "encoder"
_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions")


@dataclass(frozen=True)
class ForwardReport:
    """Result of :func:`measure_forward`.

    Args:
        phases: Speeds by name: ``forward``, and for an encoder-decoder also its ``encoder`` alone.
        parameters_dense: Number of parameters of the dense model.
        parameters_dropped: Number of parameters that the dropped model computes with.
        file_bytes_dense: Bytes of the dense model's saved weights, without the header of the file.
        file_bytes_dropped: The same of the dropped model.
        peak_memory_dense: Bytes of the dense model's weights, plus the peak that a forward pass allocates.
        peak_memory_dropped: The same of the dropped model, without its dropped weights.
        runs: Number of paired runs.
        batch_size: Sequences or images per run.
        units: What a run counts, such as tokens.
        device: The device, such as ``"cpu (2 threads)"``.
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
    units: int
    device: str

    @property
    def forward(self) -> PhaseSpeed:
        """Speed of the whole forward pass."""
        return self.phases[FORWARD]

    @property
    def forward_ms(self) -> tuple[float, float]:
        """Milliseconds of a forward pass, dense and dropped."""
        return 1000 * self.units / self.forward.dense, 1000 * self.units / self.forward.dropped

    def __str__(self) -> str:
        """Format the report in a few lines, the dense model first."""
        lines = [f"{name}: {phase}" for name, phase in self.phases.items()]
        lines += [*size_lines(self), f"{self.runs} pairs, {self.units} {self.forward.unit}, {self.device}"]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Convert the report to plain primitives, for JSON and for checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> ForwardReport:
        """Read the result of :meth:`to_dict`."""
        return cls(**{**content, "phases": {name: phase_from(fields) for name, fields in content["phases"].items()}})


def measure_forward(
    model: nn.Module,
    *,
    tokens: int = 128,
    batch_size: int = 1,
    runs: int = 9,
    warmup: int = 1,
    inputs: Mapping[str, Any] | None = None,
    name: str | None = None,
    clock: Callable[[], float] | None = None,
) -> ForwardReport:
    """Measure the speed of a forward pass of the dropped model against the dense one, its own weights without bypass.

    Dense and dropped alternate in one process, in eval mode without gradients. The speedup is the median over the
    pairs, with a 95 % bootstrap interval.

    Args:
        model: A transformer with bypassed sublayers, or a module that holds one.
        tokens: Tokens per sequence of a text model; as many as its positions allow, if these are fewer.
        batch_size: Sequences or images per run.
        runs: Number of dense and dropped pairs.
        warmup: Number of uncounted pairs before them.
        inputs: Keyword arguments of the forward pass. None makes them: random tokens, or an image or sound of the
            model's size. A model with a SublayerAdapter gets the inputs of its adapter, ``batch_size`` times.
        name: Path of the transformer inside ``model``; needed if the model holds several.
        clock: Function that returns seconds, for tests; None for the clock of the device.

    Returns:
        Speeds with their unit, parameters and memory, dense and dropped.

    Raises:
        MeasurementError: If nothing is bypassed, a number is too low, or a wrapper of ``torch.compile`` holds it.
    """
    SpeedSettings(prompt_tokens=tokens, batch_size=batch_size, runs=runs, warmup=warmup).check_numbers()
    transformer = find_transformer(model, name=name)
    if not bypassed_sublayers(transformer):
        raise MeasurementError("measure_forward: nothing is bypassed, so there is nothing to compare. Bypass first.")
    check_compiled(model, transformer)
    device = device_of(transformer)
    given = forward_inputs(transformer, tokens, batch_size) if inputs is None else dict(inputs)
    given = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in given.items()}
    unit, counted = counted_in(given)
    watch = clock_for(device) if clock is None else WallClock(device, clock)
    passes = _passes(transformer, given)

    def seconds(work: Callable[[], Any]) -> float:
        start = watch.mark()
        work()
        return watch.seconds(start, watch.mark())

    def peak(lifted: bool) -> int:
        with dense(transformer) if lifted else nullcontext(), eager(transformer), watching_memory(device) as reached:
            passes[FORWARD]()
            return reached()

    times: dict[str, list[tuple[float, float]]] = {phase: [] for phase in passes}
    with ExitStack() as contexts:
        contexts.enter_context(torch.no_grad())
        for context in (evaluating, adapters_off, casting_alike):
            contexts.enter_context(context(transformer))
        for _ in range(warmup + runs):
            for phase, work in passes.items():
                with dense(transformer):
                    slow = seconds(work)
                times[phase].append((slow, seconds(work)))
        memory = peak(True), peak(False)
    sizes = weight_sizes(transformer, lifted=True), weight_sizes(transformer)
    return ForwardReport(
        phases={phase: _speed(pairs[warmup:], counted, unit) for phase, pairs in times.items()},
        **size_fields(sizes, memory),
        runs=runs,
        batch_size=batch_size,
        units=counted,
        device=describe_device(device),
    )


def forward_inputs(transformer: nn.Module, tokens: int, batch_size: int) -> dict[str, Any]:
    """Inputs of a forward pass: the small ones of discovery, with ``batch_size`` rows and more tokens."""
    inputs = dict(example_inputs(transformer))
    if isinstance(transformer, PreTrainedModel):
        text = transformer.config.get_text_config()
        limits = [getattr(text, name, None) for name in _POSITIONS]
        # some models begin to count positions after the padding token
        room = min([limit - 2 for limit in limits if isinstance(limit, int) and limit > 2] or [tokens])
        generator = torch.Generator().manual_seed(0)
        shape = (1, min(tokens, room))
        for name in ("input_ids", "decoder_input_ids"):
            if isinstance(inputs.get(name), Tensor) and inputs[name].shape[0] == 1:
                inputs[name] = torch.randint(text.vocab_size, shape, generator=generator)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim > 1}
    if all(value.shape[0] == 1 for value in tensors.values()):
        inputs.update({name: value.repeat(batch_size, *[1] * (value.ndim - 1)) for name, value in tensors.items()})
    return inputs


def counted_in(inputs: Mapping[str, Any]) -> tuple[str, int]:
    """What a forward pass is counted in, and how many: tokens of token ids, else images or sequences."""
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    first = next(iter(tensors.values()), None)
    if first is None:
        return "sequences", 1
    if not first.is_floating_point() and first.ndim == 2:
        return "tokens", first.numel()
    return "images" if "pixel_values" in inputs or first.ndim == 4 else "sequences", first.shape[0]


def _passes(transformer: nn.Module, inputs: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """The passes to time; of an encoder-decoder also that of the encoder."""
    passes: dict[str, Callable[[], Any]] = {FORWARD: lambda: transformer(**inputs)}
    if isinstance(transformer, PreTrainedModel) and transformer.config.is_encoder_decoder:
        encoder: Any = transformer.get_encoder()
        known = inspect.signature(encoder.forward).parameters
        own = {name: value for name, value in inputs.items() if name in known and name != "use_cache"}
        passes[ENCODER] = lambda: encoder(**own)
    return passes


def _speed(pairs: list[tuple[float, float]], counted: int, unit: str) -> PhaseSpeed:
    slow, fast = zip(*pairs, strict=True)
    return PhaseSpeed(
        dense=counted / statistics.median(slow),
        dropped=counted / statistics.median(fast),
        speedup=bootstrap_interval([a / b for a, b in pairs]),
        dense_spread=bootstrap_interval([counted / each for each in slow]),
        dropped_spread=bootstrap_interval([counted / each for each in fast]),
        unit=unit,
    )
