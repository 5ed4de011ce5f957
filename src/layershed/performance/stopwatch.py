"""Times the two phases of generation: the prefill of a prompt, and cached decoding after it."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layershed.discovery.find import predicts_next_token
from layershed.discovery.probe import quietly
from layershed.errors import MeasurementError, UnknownNameError

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class SpeedSettings:
    """Lengths and numbers of a speed measurement.

    Args:
        prompt_tokens: Tokens per prompt (prefill).
        new_tokens: Tokens decoded one at a time from the KV cache.
        batch_size: Sequences at once.
        runs: Number of measured runs, or of pairs of a dense and a dropped one.
        warmup: Runs, or pairs, that go first and are not counted.
    """

    prompt_tokens: int = 128
    new_tokens: int = 32
    batch_size: int = 1
    runs: int = 9
    warmup: int = 1

    def check(self, transformer: nn.Module) -> PreTrainedModel:
        """Refuse a model that cannot be measured: by its structure first, then by decoding one token.

        Returns:
            The transformer, known to be a causal language model.

        Raises:
            MeasurementError: As :meth:`check_structure`, or if the model cannot generate from a KV cache.
        """
        causal = self.check_structure(transformer)
        if not any(parameter.is_meta for parameter in causal.parameters()):
            _try_out(causal)
        return causal

    def check_structure(self, transformer: nn.Module) -> PreTrainedModel:
        """Refuse what cannot be measured, without running the model.

        Returns:
            The transformer, known to be a causal language model.

        Raises:
            MeasurementError: If a number is too low, the model is no causal language model, or prompt and new tokens
                exceed its positions.
        """
        for name, number in asdict(self).items():
            least = 0 if name == "warmup" else 1
            if number < least:
                raise MeasurementError(f"speed: {name}={number}: it must be at least {least}.")
        if not predicts_next_token(transformer):
            raise MeasurementError(
                f"speed: {type(transformer).__name__} does not predict the next token; decoding needs a causal "
                "language model."
            )
        places = getattr(transformer.config.get_text_config(), "max_position_embeddings", None)
        if places is not None and 0 < places < self.prompt_tokens + self.new_tokens:
            raise MeasurementError(
                f"speed: prompt_tokens={self.prompt_tokens} and new_tokens={self.new_tokens} do not fit into the "
                f"model's {places} positions."
            )
        return transformer


class Clock(Protocol):
    """Marks points in time, and tells how far apart two of them are."""

    def mark(self) -> Any:
        """Now, once all work before is done or in the order of the device's queue."""

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds between two marks."""


class WallClock:
    """For a device whose work is done when the call returns, or that is waited for.

    Args:
        device: The device that works; anything but a CPU is synchronised at every mark.
        now: Returns seconds.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.now = device, now

    def mark(self) -> float:
        """The time, with nothing left in the device's queue."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return self.now()

    def seconds(self, start: float, end: float) -> float:
        """Seconds between two marks."""
        return end - start


class EventClock:
    """For CUDA: events in the stream, so that the host never waits between two marks.

    Args:
        device: The device that works.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> torch.cuda.Event:
        """An event after everything that is in the stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Seconds between two events; waits for the later one."""
        end.synchronize()
        return start.elapsed_time(end) / 1000


def clock_of(device: torch.device) -> Clock:
    """The clock of a device: CUDA events there, else the wall's."""
    return EventClock(device) if device.type == "cuda" else WallClock(device)


@dataclass(frozen=True)
class Timing:
    """One prefill and the decoding after it.

    Args:
        prefill: Seconds.
        decode: Seconds, all steps together.
        kv_bytes: Bytes of the KV cache at the end.
    """

    prefill: float
    decode: float
    kv_bytes: int


class Stopwatch:
    """Times generation from the same prompt, over and over, on a model in eval mode and without gradients.

    Args:
        transformer: A causal language model.
        settings: Lengths; each new token is the most likely one.
        clock: None for that of the device.
    """

    def __init__(self, transformer: PreTrainedModel, settings: SpeedSettings, clock: Clock | None = None) -> None:
        self.transformer, self.new_tokens = transformer, settings.new_tokens
        self.clock = clock_of(transformer.device) if clock is None else clock
        vocabulary = transformer.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(vocabulary, (settings.batch_size, settings.prompt_tokens), generator=generator)
        self.prompt = prompt.to(transformer.device)
        # as generate() does: logits of the last position only, where the model can
        last_only = "logits_to_keep" in inspect.signature(transformer.forward).parameters
        self.options = {"use_cache": True, **({"logits_to_keep": 1} if last_only else {})}

    def prefill(self) -> Any:
        """The model's output for the prompt, with its KV cache."""
        return self.transformer(input_ids=self.prompt, **self.options)

    def decode(self, output: Any) -> Any:
        """The output of the last of the cached one-token steps that follow."""
        for _ in range(self.new_tokens):
            token = output.logits[:, -1:].argmax(-1)
            output = self.transformer(input_ids=token, past_key_values=output.past_key_values, **self.options)
        return output

    def run(self) -> Timing:
        """One prefill, and the decoding after it."""
        start = self.clock.mark()
        output = self.prefill()
        # read before decoding begins, which waits for it: else the host would prepare the first steps meanwhile
        prefill = self.clock.seconds(start, self.clock.mark())
        start = self.clock.mark()
        output = self.decode(output)
        decode = self.clock.seconds(start, self.clock.mark())
        return Timing(prefill, decode, cache_bytes(output.past_key_values))


def check_phase(phase: Phase) -> None:
    """Refuse an unknown phase.

    Raises:
        UnknownNameError: If it is neither ``"prefill"`` nor ``"decode"``.
    """
    if phase not in get_args(Phase):
        raise UnknownNameError("phase", phase, get_args(Phase))


@contextmanager
def casting_alike(transformer: nn.Module) -> Iterator[None]:
    """Within the context every weight counts as trainable.

    Autocast keeps the cast of trainable weights alone; what a bypass has frozen, it would cast anew in every pass of
    the dense model, which would look slower than it is.
    """
    frozen = [p for p in transformer.parameters() if p.is_floating_point() and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def check_compiled(model: nn.Module, transformer: nn.Module) -> None:
    """Refuse a transformer whose compiled code stands in a wrapper around it, and would not be measured.

    Args:
        model: What holds the transformer.
        transformer: The transformer itself.

    Raises:
        MeasurementError: If so.
    """
    wrappers = (module for module in model.modules() if "_orig_mod" in module._modules)
    if any(transformer is inner for wrapper in wrappers for inner in wrapper.modules()):
        raise MeasurementError(
            "speed: torch.compile(...) has put the transformer into a wrapper, and without that it would be measured "
            "eagerly; compile it in place: model.compile()."
        )


def _try_out(transformer: PreTrainedModel) -> None:
    """Generate a token from the cache of two, which some models that predict a next token cannot."""
    with quietly(transformer):
        stopwatch = Stopwatch(transformer, SpeedSettings(prompt_tokens=2, new_tokens=1))
        try:
            cache_bytes(stopwatch.decode(stopwatch.prefill()).past_key_values)
        except Exception as error:  # whatever its own code raises
            reason = next(iter(str(error).splitlines()), "no message").rstrip(".")
            raise MeasurementError(
                f"speed: {type(transformer).__name__} could not decode a token from its KV cache "
                f"({type(error).__name__}: {reason})."
            ) from error


def cache_bytes(cache: Any) -> int:
    """Bytes of memory behind the keys and values that a KV cache holds; memory that two share counts once."""
    cache = getattr(cache, "self_attention_cache", cache)
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def describe_device(device: torch.device) -> str:
    """Such as ``cpu (2 threads)`` or ``NVIDIA H100``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"
