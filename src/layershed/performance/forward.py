"""Speed of one forward pass, dense against dropped, for models that do not decode token by token.

These are encoders, vision and audio models, encoder-decoders, and models of torch with a SublayerAdapter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layershed.batches import device_of
from layershed.devices import WallClock, clock_for
from layershed.discovery.find import find_transformer
from layershed.discovery.probe import eager, example_inputs
from layershed.errors import MeasurementError
from layershed.performance.model_size import weight_sizes
from layershed.performance.pairs import as_measured, in_turns, phase_speed
from layershed.performance.peak_memory import watching_memory
from layershed.performance.speed_report import ForwardReport, size_fields
from layershed.performance.stopwatch import SpeedSettings, check_compiled, describe_device
from layershed.surgery import bypassed_sublayers, dense

# The report is defined in speed_report and exported here, beside the function that returns it.
__all__ = ["ForwardReport", "counted_in", "forward_inputs", "measure_forward"]

FORWARD, ENCODER = "forward", "encoder"
_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions")


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
    pairs, with a 95 % bootstrap interval; the dropped speed is the dense speed, a median over runs, times the speedup.

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

    def run() -> dict[str, float]:
        return {phase: seconds(work) for phase, work in passes.items()}

    def run_dense() -> dict[str, float]:
        with dense(transformer):
            return run()

    with as_measured(transformer):
        pairs = in_turns(run_dense, run, runs, warmup)
        memory = peak(True), peak(False)
    sizes = weight_sizes(transformer, lifted=True), weight_sizes(transformer)
    return ForwardReport(
        phases={phase: phase_speed([(a[phase], b[phase]) for a, b in pairs], counted, unit) for phase in passes},
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
