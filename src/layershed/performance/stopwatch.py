"""Times the two phases of generation: the prefill of a prompt and the cached decoding after it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from layershed.arguments import check_number
from layershed.devices import Clock, clock_for, module_of
from layershed.discovery.find import predicts_next_token
from layershed.discovery.probe import quietly
from layershed.errors import MeasurementError, UnknownNameError
from layershed.spellings import CACHE_NAMES, cache_in, cache_name

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class SpeedSettings:
    """Lengths and numbers of a speed measurement.

    Args:
        prompt_tokens: Tokens per prompt (prefill).
        new_tokens: Tokens decoded one at a time from the KV cache.
        batch_size: Sequences per run.
        runs: Number of measured runs, or of pairs of a dense and a dropped run.
        warmup: Number of uncounted runs, or pairs, before them.
    """

    prompt_tokens: int = 128
    new_tokens: int = 32
    batch_size: int = 1
    runs: int = 9
    warmup: int = 1

    def check(self, transformer: nn.Module) -> PreTrainedModel:
        """Refuse a model that cannot be measured. Checks its structure, then decodes one token.

        Returns:
            The transformer, typed as a causal language model.

        Raises:
            MeasurementError: As :meth:`check_structure`, or if the model cannot generate from a KV cache.
        """
        causal = self.check_structure(transformer)
        if not any(parameter.is_meta for parameter in causal.parameters()):
            _try_out(causal)
        return causal

    def check_numbers(self) -> None:
        """Refuse numbers that are too low, and what is no number.

        Raises:
            MeasurementError: If one is.
        """
        for name, number in asdict(self).items():
            least = 0 if name == "warmup" else 1
            check_number(number, f"speed: {name}", MeasurementError, whole=True)
            if number < least:
                raise MeasurementError(f"speed: {name}={number}: it must be at least {least}.")

    def check_structure(self, transformer: nn.Module) -> PreTrainedModel:
        """Refuse settings and models that cannot be measured, without running the model.

        Returns:
            The transformer, typed as a causal language model.

        Raises:
            MeasurementError: If a number is too low, the model is not a causal language model, or prompt and new
                tokens exceed its positions.
        """
        self.check_numbers()
        if not predicts_next_token(transformer):
            raise MeasurementError(
                f"speed: {type(transformer).__name__} does not predict the next token, so it cannot decode. Use a "
                "causal language model, or layershed.measure_forward."
            )
        places = getattr(transformer.config.get_text_config(), "max_position_embeddings", None)
        if places is not None and 0 < places < self.prompt_tokens + self.new_tokens:
            raise MeasurementError(
                f"speed: prompt_tokens={self.prompt_tokens} and new_tokens={self.new_tokens} do not fit into the "
                f"model's {places} positions. Lower one of them."
            )
        return transformer


@dataclass(frozen=True)
class Timing:
    """Times of one prefill and of the decoding after it.

    Args:
        prefill: Seconds of the prefill.
        decode: Seconds of all decoding steps together.
        kv_bytes: Bytes of the KV cache at the end.
    """

    prefill: float
    decode: float
    kv_bytes: int


class Stopwatch:
    """Times repeated greedy generation from one prompt. The caller sets eval mode and turns gradients off.

    Args:
        transformer: A causal language model.
        settings: Lengths of the prompt and of the decoding.
        clock: The clock; None for the clock of the device.
    """

    def __init__(self, transformer: PreTrainedModel, settings: SpeedSettings, clock: Clock | None = None) -> None:
        self.transformer, self.new_tokens = transformer, settings.new_tokens
        self.clock = clock_for(transformer.device) if clock is None else clock
        vocabulary = transformer.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(vocabulary, (settings.batch_size, settings.prompt_tokens), generator=generator)
        self.prompt = prompt.to(transformer.device)
        # like generate(): logits of the last position only, if the model supports it
        last_only = "logits_to_keep" in inspect.signature(transformer.forward).parameters
        self.options = {"use_cache": True, **({"logits_to_keep": 1} if last_only else {})}
        self.cache_name = cache_name(transformer.forward)

    def prefill(self) -> Any:
        """Run the prompt and return the model's output with its KV cache."""
        return self.transformer(input_ids=self.prompt, **self.options)

    def decode(self, output: Any) -> Any:
        """Run the cached one-token steps after ``output`` and return the last output.

        Raises:
            MeasurementError: If the model takes or returns no KV cache.
        """
        if self.cache_name is None or cache_in(output) is None:
            raise MeasurementError(
                f"speed: {type(self.transformer).__name__} {'takes' if self.cache_name is None else 'returns'} no KV "
                f"cache under a known name ({', '.join(CACHE_NAMES[:3])})."
            )
        for _ in range(self.new_tokens):
            token = output.logits[:, -1:].argmax(-1)
            output = self.transformer(input_ids=token, **{self.cache_name: cache_in(output)}, **self.options)
        return output

    def run(self) -> Timing:
        """Time one prefill and the decoding after it."""
        start = self.clock.mark()
        output = self.prefill()
        # reading the clock waits for the prefill; else the host would already prepare the first decoding steps
        prefill = self.clock.seconds(start, self.clock.mark())
        start = self.clock.mark()
        output = self.decode(output)
        decode = self.clock.seconds(start, self.clock.mark())
        return Timing(prefill, decode, cache_bytes(cache_in(output)))


def check_phase(phase: Phase) -> None:
    """Refuse an unknown phase.

    Raises:
        UnknownNameError: If the phase is neither ``"prefill"`` nor ``"decode"``.
    """
    if phase not in get_args(Phase):
        raise UnknownNameError("phase", phase, get_args(Phase))


@contextmanager
def casting_alike(transformer: nn.Module) -> Iterator[None]:
    """Make every floating-point weight trainable within the context.

    Autocast caches the cast of trainable weights only. It would cast weights that a bypass froze in every pass of the
    dense model, which would then look too slow.
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
    """Refuse a transformer inside a compiled wrapper, as the compiled code would not be measured.

    Args:
        model: The module that holds the transformer.
        transformer: The transformer itself.

    Raises:
        MeasurementError: If a wrapper of ``torch.compile`` holds the transformer.
    """
    wrappers = (module for module in model.modules() if "_orig_mod" in module._modules)
    if any(transformer is inner for wrapper in wrappers for inner in wrapper.modules()):
        raise MeasurementError(
            "speed: the compiled code cannot be measured, as torch.compile(...) put it into a wrapper around the "
            "transformer. Compile in place: model.compile()."
        )


def _try_out(transformer: PreTrainedModel) -> None:
    """Decode one token from a cache of two. Some models that predict the next token cannot do that."""
    with quietly(transformer):
        stopwatch = Stopwatch(transformer, SpeedSettings(prompt_tokens=2, new_tokens=1))
        try:
            cache_bytes(cache_in(stopwatch.decode(stopwatch.prefill())))
        except Exception as error:  # the model's own code may raise anything
            reason = next(iter(str(error).splitlines()), "no message").rstrip(".")
            raise MeasurementError(
                f"speed: {type(transformer).__name__} could not decode a token from its KV cache "
                f"({type(error).__name__}: {reason}). Check that its generate(use_cache=True) works."
            ) from error


def cache_bytes(cache: Any) -> int:
    """Return the bytes of the keys and values in a KV cache. Shared memory counts once."""
    cache = getattr(cache, "self_attention_cache", cache)
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def describe_device(device: torch.device) -> str:
    """Describe a device, such as ``cpu (2 threads)`` or ``NVIDIA H100``."""
    module = module_of(device, "get_device_name")
    if module is not None:
        return str(module.get_device_name(device))
    return f"{device.type} ({torch.get_num_threads()} threads)"
