"""The small forward pass that discovery records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call
from transformers import Cache, EncoderDecoderCache, PreTrainedModel

from layershed.batches import device_of, is_offloaded
from layershed.discovery.autocast import without_autocast
from layershed.discovery.captured import without_requests
from layershed.discovery.capturing_hooks import without_capturing
from layershed.discovery.configured import configured
from layershed.discovery.probe_failures import advice, with_attention, without_flex
from layershed.discovery.recording import Call, Tape, recording
from layershed.discovery.registry import registered_adapter
from layershed.errors import LayershedError, UnprovenStructureError
from layershed.spellings import CACHE_NAMES, cache_in, cache_name
from layershed.stand_ins.contexts import lifted

_TOKENS = 4
_REQUEST = "output_attentions"
_SAMPLES = 4000  # of a sound wave: a quarter of a second
_PROBING: ContextVar[bool] = ContextVar("layershed_probing", default=False)


def run_probe(transformer: nn.Module) -> Tape:
    """Record one small forward pass, in eval mode, without gradients and without moving the random state.

    Args:
        transformer: The model, its bypass lifted; on the meta device the pass runs on fake tensors.

    Raises:
        UnprovenStructureError: If the forward pass fails.
    """
    with quietly(transformer), recording(transformer) as tape, _as_structure_error(transformer):
        _forward(transformer)
    return tape


def outputs_of(transformer: nn.Module, paths: Iterable[str]) -> list[Tensor]:
    """The first value that each module returns in a probe without a recording; empty on the meta device.

    Raises:
        UnprovenStructureError: If the forward pass fails.
    """
    found: list[Tensor] = []

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        first = next(iter(output), None) if isinstance(output, tuple | list) else output
        if isinstance(first, Tensor):
            found.append(first)

    if _is_skeleton(transformer):
        return found
    with quietly(transformer), ExitStack() as hooks, _as_structure_error(transformer):
        for path in paths:
            hooks.callback(transformer.get_submodule(path).register_forward_hook(note).remove)
        _forward(transformer)
    return found


@contextmanager
def _as_structure_error(transformer: nn.Module) -> Iterator[None]:
    """Turns any exception of a forward pass into an error that says what to do."""
    try:
        yield
    except LayershedError:
        raise
    except Exception as error:
        name, first_line = type(transformer).__name__, next(iter(str(error).splitlines()), "no message")
        raise UnprovenStructureError(
            f"{name}: a forward pass over {_TOKENS} tokens failed ({type(error).__name__}: "
            f"{first_line.rstrip('.')}). {advice(transformer, error)}"
        ) from error


def watch_cache(transformer: nn.Module) -> dict[str, tuple[int, int]] | None:
    """By module path, the slot of the KV cache that the module fills, and the number of probe tokens it stores.

    Runs a separate forward pass with the cache that the model makes for itself.

    Returns:
        Empty for a model without a cache; None if the pass failed, or filled a cache that is not of transformers.
    """
    generates = isinstance(transformer, PreTrainedModel) and bool(transformer.can_generate())
    known, name = signature(transformer.forward).parameters, cache_name(transformer.forward)
    if "use_cache" not in known and (name is None or (name not in known and not generates)):
        return {}
    watch, own_config = _CacheWatch(), [transformer.config] if isinstance(transformer, PreTrainedModel) else []
    with quietly(transformer), ExitStack() as hooks:
        for path, module in transformer.named_modules():
            hooks.callback(module.register_forward_pre_hook(partial(watch.enter, path), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(watch.leave, always_call=True).remove)
        output, more = None, False
        # some encoders refuse True from their model, or from the config, whose value is a decoder's default
        for own, default in ((True, True), (None, True), (None, False)):
            with suppress(Exception), configured(own_config, {"use_cache": default}):  # it may not support a cache
                output = _forward(transformer, use_cache=own)
                more = name is None and not generates and _values(output) > _values(_forward(transformer))
                break
    if output is None or (own is None and not watch.seen):
        return {} if name is None and not generates else None
    hidden = cache_in(output) is not None or (name is None and (generates or more))
    return None if hidden and not watch.seen else watch.slots


def _values(output: Any) -> int:
    """How many values a model returned; one that returns a cache returns more than without it."""
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    return sum(value is not None for value in values)


def refuse_hidden_cache(transformer: nn.Module) -> None:
    """Refuse a model that takes ``use_cache``, but takes its KV cache under no known name.

    Call it if :func:`watch_cache` found no cache of transformers either: a stand-in cannot see that a cache is used.

    Raises:
        UnprovenStructureError: If it is such a model.
    """
    if "use_cache" in signature(transformer.forward).parameters and cache_name(transformer.forward) is None:
        raise UnprovenStructureError(
            f"{type(transformer).__name__} takes use_cache, but no KV cache under a known name "
            f"({', '.join(CACHE_NAMES[:3])}), and passes no Cache of transformers to its parts. Dropping an attention "
            "could silently break its cached decoding. Rename the argument, or update layershed."
        )


def asking(transformer: nn.Module, plain: Mapping[str, Call]) -> dict[str, dict[str, Any]]:
    """By module path, what its stand-in must know to answer a request for attention weights.

    Some modules return more values if an argument asks for them. A separate forward pass shows which.

    Args:
        transformer: The model.
        plain: The recorded call of each module, without a request.
    """
    arguments = {path: list(signature(transformer.get_submodule(path).forward).parameters) for path in plain}
    asked = {path: names.index(_REQUEST) for path, names in arguments.items() if _REQUEST in names}
    if not asked or not isinstance(transformer, PreTrainedModel):
        return {}
    found: dict[str, dict[str, Any]] = {}

    def note(path: str, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        key = _REQUEST if _REQUEST in kwargs else asked[path]
        values, before = output if isinstance(output, tuple | list) else (), plain[path].outputs
        news = [i for i, x in enumerate(values) if isinstance(x, Tensor) and (i >= len(before) or before[i] is None)]
        if news:
            found[path] = {"asked_by": key, "asked": tuple((i, values[i].ndim) for i in news)}

    eagerly = with_attention(transformer, lambda _: "eager")  # no other kind returns weights
    with quietly(transformer), eagerly, without_capturing(transformer), ExitStack() as hooks, suppress(Exception):
        for path in asked:
            hook = partial(note, path)
            hooks.callback(transformer.get_submodule(path).register_forward_hook(hook, with_kwargs=True).remove)
        _forward(transformer, output_attentions=True)
    return found


def filled_cache(transformer: nn.Module) -> Any:
    """The KV cache that the model makes for itself, filled with the tokens of a probe.

    Raises:
        UnprovenStructureError: If the forward pass fails.
    """
    with quietly(transformer), _as_structure_error(transformer):
        return cache_in(_forward(transformer, use_cache=True))


class _CacheWatch:
    """Notes which module is running whenever a cache is filled."""

    def __init__(self) -> None:
        self.slots: dict[str, tuple[int, int]] = {}
        self.seen = False
        self._running: list[str] = []

    def enter(self, path: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self._running.append(path)
        for value in (*args, *kwargs.values()):
            cache = value.self_attention_cache if isinstance(value, EncoderDecoderCache) else value
            self.seen |= isinstance(cache, Cache)
            if isinstance(cache, Cache) and "update" not in cache.__dict__:
                cache.__dict__["update"] = partial(self._update, cache.update)

    def leave(self, *_: object) -> None:
        self._running.pop()

    def _update(self, update: Any, keys: Tensor, values: Tensor, layer_idx: int, *more: Any, **options: Any) -> Any:
        for path in self._running:
            self.slots.setdefault(path, (layer_idx, keys.shape[-2]))
        return update(keys, values, layer_idx, *more, **options)


def probing() -> bool:
    """Whether the running forward pass is a probe; measurements must not count it."""
    return _PROBING.get()


@contextmanager
def quietly(transformer: nn.Module) -> Iterator[None]:
    """Within the context a forward pass is a probe: dense, eager and in eval mode. It leaves no trace in the model."""
    # in inference mode torch does not break operations down into those that the tape knows
    with (
        _marked(),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        ExitStack() as contexts,
    ):
        for context in (evaluating, lifted, eager, without_requests, without_flex, without_autocast):
            contexts.enter_context(context(transformer))
        yield


@contextmanager
def _marked() -> Iterator[None]:
    token = _PROBING.set(True)
    try:
        yield
    finally:
        _PROBING.reset(token)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode within the context; afterwards every module has its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def eager(model: nn.Module) -> AbstractContextManager[Any]:
    """Makes compiled modules run eagerly, because compiled code calls no module."""
    if not any(module._compiled_call_impl is not None for module in model.modules()):
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within the context FSDP2 keeps its weights gathered; it would free tensors that the tape holds."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [module._get_fsdp_state()._fsdp_param_group for module in sharded]
    before = [None if group is None else group.post_forward_mesh_info for group in groups]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module, group, after_forward in zip(sharded, groups, before, strict=True):
            if group is not None:
                group.post_forward_mesh_info = after_forward
            module.reshard()


def _forward(transformer: nn.Module, **more: Any) -> Any:
    if not _is_skeleton(transformer):
        device = device_of(transformer)
        inputs = {name: _moved(value, device) for name, value in example_inputs(transformer).items()}
        return transformer(**{**inputs, **more})
    # without real data, grouped matrix products of expert layers require bfloat16
    # on the CPU also within torch.device("meta"): some versions of transformers ask for the autocast of the device
    with torch.device("cpu"), FakeTensorMode(allow_non_fake_inputs=True):
        state = {
            name: torch.empty(tensor.shape, dtype=torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in (*transformer.named_parameters(), *transformer.named_buffers())
        }
        return functional_call(transformer, state, kwargs={**example_inputs(transformer), **more})


def _is_skeleton(transformer: nn.Module) -> bool:
    """Whether a model has shapes and no numbers; accelerate brings the numbers of an offloaded one while it runs."""
    return any(parameter.is_meta for parameter in transformer.parameters()) and not is_offloaded(transformer)


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def example_inputs(transformer: nn.Module) -> Mapping[str, Any]:
    """Arguments of a small forward pass: a sequence of four tokens, an image or a stretch of sound."""
    registered = registered_adapter(transformer)
    if registered is not None:
        return registered.inputs(transformer)
    assert isinstance(transformer, PreTrainedModel)
    known = signature(transformer.forward).parameters
    config, text = transformer.config, transformer.config.get_text_config()
    tokens = torch.arange(1, _TOKENS + 1).remainder(getattr(text, "vocab_size", _TOKENS + 1))[None]
    inputs: dict[str, Any] = {}
    main = transformer.main_input_name
    if main == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.zeros(1, config.num_channels, height, width)
        inputs["pixel_values"] = pixels + torch.linspace(-1, 1, width)
    elif main == "input_features":
        frames = 2 * config.max_source_positions
        inputs["input_features"] = torch.zeros(1, config.num_mel_bins, frames) + torch.linspace(-1, 1, frames)
    elif main == "input_values":
        inputs["input_values"] = torch.linspace(-1, 1, _SAMPLES)[None]
    else:
        tables = transformer.get_input_embeddings()
        # several tables: a row for each codebook of a sequence, as of sound
        inputs["input_ids"] = tokens.repeat(len(tables), 1) if isinstance(tables, nn.ModuleList) else tokens
    if config.is_encoder_decoder and "decoder_input_ids" in known:
        inputs["decoder_input_ids"] = tokens
    if "use_cache" in known or any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        inputs["use_cache"] = False
    return inputs
