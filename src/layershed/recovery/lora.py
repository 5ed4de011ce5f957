"""LoRA in the remaining linear maps of a dropped model: injected, switched off for a teacher, merged or removed.

The adapters are peft's own (Hu et al. 2021, arXiv 2106.09685): a weight W becomes W + s B A with A of shape (rank, in),
B of shape (out, rank), and s = alpha / rank, or alpha / sqrt(rank) with rsLoRA.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from layershed.arguments import check_number
from layershed.discovery.find import check_module, find_transformer, secure_quantized
from layershed.errors import QuantizationError, RecoveryError
from layershed.recovery.fused_layers import allow_fusing, keep_from_fusing
from layershed.recovery.lora_options import as_targets, check_lora, lora_arguments, settings_of
from layershed.recovery.lora_targets import Placement, no_target, refuse_computed, targets_of
from layershed.stand_ins.carried import maps_of
from layershed.stand_ins.install import hidden_parameters, take_over_hooks
from layershed.stand_ins.record import exchange, overridden
from layershed.stand_ins.stand_in import StandIn

if TYPE_CHECKING:  # peft imports bitsandbytes, which is slow: import it only where LoRA is injected
    from peft import LoraConfig

ADAPTER = "recovery"
_TRAINABLE = "_trainable_before_recovery"  # kept on the model itself, like all state of its changes


def inject_lora(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: int = 16,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    placement: Placement = "all",
    rslora: bool = False,
    dora: bool = False,
    seed: int = 0,
    name: str | None = None,
) -> LoraConfig:
    """Put LoRA into the linear maps that still run, and freeze everything else of the transformer.

    The model's outputs do not change, because B starts at zero. Called again with the same options after a further
    drop, it adds the adapters that are missing. It uses a random state of its own, so that every rank gets the same.

    Args:
        model: A transformer, of Hugging Face or with a SublayerAdapter, or a module that holds one.
        rank: Rank of the adapters.
        alpha: Sets their scale, alpha / rank.
        dropout: Dropout probability of their inputs, in [0, 1).
        target_modules: ``"all-linear"``, every linear map but the output embedding, or ends of module paths, such as
            ``["q_proj", "v_proj"]``.
        placement: ``"all"``, or ``"neighbours"``: only in the nearest sublayers before and after each dropped one.
        rslora: Scale by alpha / sqrt(rank) (rank-stabilised LoRA, arXiv 2312.03732).
        dora: Train magnitude and direction apart (DoRA, arXiv 2402.09353).
        seed: Seed of A's initial values.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Returns:
        peft's config, with the paths of all adapted modules in ``target_modules``.

    Raises:
        RecoveryError: If an option is invalid, there is nothing to adapt, or the model has adapters from elsewhere or
            with other settings.
    """
    check_number(seed, "LoRA: seed", RecoveryError, whole=True)
    target_modules = as_targets(target_modules)
    check_lora(rank=rank, alpha=alpha, dropout=dropout, target_modules=target_modules, placement=placement)
    transformer = find_transformer(model, name=name)
    targets = targets_of(transformer, target_modules, placement)
    present = adapted_modules(transformer)
    if not targets - present.keys() and not present:
        raise RecoveryError(no_target(transformer, target_modules, placement))
    settings = lora_arguments(rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, dora=dora)
    return inject_at(transformer, targets | present.keys(), settings, seed=int(seed))


def check_targets(
    model: nn.Module, target_modules: str | Sequence[str], *, merges: bool = False, name: str | None = None
) -> None:
    """Refuse a model that :func:`inject_lora`, or a later merge, would refuse after any drop; call it before training.

    Raises:
        RecoveryError: If it carries adapters from elsewhere, or a target is missing, tied to another module or cannot
            be merged into.
    """
    transformer = find_transformer(model, name=name)
    _refuse_others(transformer)
    targets = modules_to_adapt(transformer, target_modules)
    if merges:
        refuse_computed(targets)


def modules_to_adapt(transformer: nn.Module, target_modules: str | Sequence[str]) -> dict[str, nn.Module]:
    """The linear maps that may get adapters, by path; of an adapted one, the map itself."""
    paths = sorted(targets_of(transformer, target_modules, "all"))
    found = {path: transformer.get_submodule(path) for path in paths}
    return {path: getattr(module, "base_layer", module) for path, module in found.items()}


def inject_at(transformer: nn.Module, targets: set[str], settings: dict[str, Any], *, seed: int = 0) -> LoraConfig:
    """Put LoRA at the given paths that have none yet; :func:`inject_lora` chooses the paths and calls this.

    Args:
        transformer: A transformer.
        targets: Paths of linear modules.
        settings: Arguments of peft's LoraConfig.
        seed: Seed of A's initial values.
    """
    from peft import LoraConfig, inject_adapter_in_model

    _refuse_others(transformer)
    secure_quantized(transformer)
    present = lora_settings(transformer)
    if present is None:
        transformer.__dict__[_TRAINABLE] = _trainable_names(transformer)
    elif present["settings"] != settings:
        raise RecoveryError(
            f"The model carries LoRA adapters of other settings: {present['settings']}, not {settings}; merge or "
            "remove them first."
        )
    wanted = sorted(targets - adapted_modules(transformer).keys())
    maps = _training_maps(transformer)
    _refuse_strangers(transformer, wanted)
    for transposed in (False, True):  # GPT-2's Conv1D keeps its weight transposed
        paths = [path for path in wanted if isinstance(transformer.get_submodule(path), Conv1D) == transposed]
        if paths:
            transformer.__dict__.pop("peft_config", None)  # peft would warn of a second adapter; it is the same one
            lora = LoraConfig(**settings, fan_in_fan_out=transposed, target_modules=exactly(transformer, paths))
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs, too
                inject_adapter_in_model(lora, transformer, ADAPTER)
    wrapper: Any
    for path in wanted:
        wrapper = transformer.get_submodule(path)
        wrapper.train(wrapper.base_layer.training)
        take_over_hooks(wrapper.base_layer, wrapper)
    for parameter in maps:
        parameter.requires_grad_(True)  # they train on beside the adapters
    keep_from_fusing(transformer, {transformer.get_submodule(path) for path in wanted})
    for module, override in overridden(transformer):
        # peft has made all adapters trainable; a sublayer restored later is frozen but for its adapters
        dropped = [(name, parameter) for name, parameter in hidden_parameters(module) if parameter.requires_grad]
        override.frozen = tuple(
            dict.fromkeys((*(n for n in override.frozen if "lora_" in n), *(n for n, _ in dropped)))
        )
        for _, parameter in dropped:
            parameter.requires_grad_(False)
    _forget_gradients(transformer)
    config = peft_config_of(transformer)
    config.target_modules = set(targets)
    return config


def _forget_gradients(transformer: nn.Module) -> None:
    for parameter in transformer.parameters():
        if not parameter.requires_grad:
            parameter.grad = None  # no optimizer would zero it any more, and clipping by norm would count it


def _training_maps(transformer: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters of linear maps."""
    return [p for each in maps_of(transformer).values() for p in each.parameters() if p.requires_grad]


def adapted_modules(model: nn.Module) -> dict[str, Any]:
    """The modules of peft that hold our LoRA, by path."""
    return {path: module for path, module in model.named_modules() if ADAPTER in getattr(module, "lora_A", ())}


def lora_settings(transformer: nn.Module) -> dict[str, Any] | None:
    """Arguments of :func:`inject_at` that recreate the LoRA of a model, as primitives; None without LoRA."""
    targets = sorted(adapted_modules(transformer))
    if not targets:
        return None
    return {"targets": targets, "settings": settings_of(peft_config_of(transformer))}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within the context the model computes as if it had no adapters.

    Unlike peft's own switch, it does not change what is trainable.
    """
    check_module(model)
    layers = [layer for layer in adapted_modules(model).values() if not layer.disable_adapters]
    _switch(layers, False)
    try:
        yield
    finally:
        _switch(layers, True)


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Switch the adapters on or off until further notice; what is trainable does not change."""
    _switch(adapted_modules(model).values(), enabled)


def merge_lora(model: nn.Module, *, force: bool = False, name: str | None = None) -> None:
    """Add the adapters to the weights and remove them; the model computes the same up to rounding.

    The parameters that were trainable before injection are trainable again.

    Args:
        model: A transformer, or a module that holds one.
        force: Merge into quantized weights too, which rounds most of the recovery away.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Raises:
        RecoveryError: If there are no adapters, they hold NaN or infinite values, or a weight is computed from others.
        QuantizationError: If the weights are quantized and ``force`` is False.
    """
    transformer = find_transformer(model, name=name)
    layers = _adapted(transformer, "merge_lora")
    if getattr(transformer, "is_quantized", False) and not force:
        raise QuantizationError(
            "merge_lora: the weights are quantized, and rounding would throw the recovery away; call "
            "layershed.dequantize(model) first and merge then, which is exact, or give force=True."
        )
    for path, layer in layers.items():
        if not all(parameter.isfinite().all() for name, parameter in layer.named_parameters() if "lora_" in name):
            raise RecoveryError(f"merge_lora: the adapter of {path} holds NaN or infinite values; nothing was merged.")
    refuse_computed(layers)
    for layer in layers.values():
        layer.merge(adapter_names=[ADAPTER])
    _unwrap(transformer, layers)


def remove_lora(model: nn.Module, *, name: str | None = None) -> None:
    """Remove the adapters; its outputs (bit for bit) and trainable parameters are those before injection.

    Raises:
        RecoveryError: If there are none.
    """
    transformer = find_transformer(model, name=name)
    _unwrap(transformer, _adapted(transformer, "remove_lora"))


def peft_config_of(transformer: Any) -> LoraConfig:
    """Peft's config of the adapters, which peft keeps on the model."""
    config: LoraConfig = transformer.peft_config[ADAPTER]
    return config


def exactly(transformer: nn.Module, paths: list[str]) -> list[str] | str:
    """Paths as peft's ``target_modules``: a pattern where an end of another path equals one, as peft compares ends."""
    ends, wanted = tuple(f".{path}" for path in paths), set(paths)
    if any(path.endswith(ends) and path not in wanted for path, _ in transformer.named_modules()):
        return "|".join(map(re.escape, paths))
    return paths


def _switch(layers: Iterable[Any], enabled: bool) -> None:
    for layer in layers:
        layer._disable_adapters = not enabled  # peft's own setter would also change what is trainable


def _unwrap(transformer: nn.Module, layers: dict[str, Any]) -> None:
    for path, layer in layers.items():
        allow_fusing(layer)
        exchange(transformer, path, layer.base_layer)
    del transformer.peft_config
    trainable = transformer.__dict__.pop(_TRAINABLE, set())
    resting: set[str] = set()
    for override, names in _dropped_names(transformer):
        resting.update(names.values())
        override.frozen = tuple(name for name, full in names.items() if full in trainable)
    for name, parameter in transformer.named_parameters():
        if name in trainable and name not in resting and parameter.is_floating_point():
            parameter.requires_grad_(True)


def _trainable_names(transformer: nn.Module) -> set[str]:
    """Names of the parameters that are trainable, or would be if they were not dropped."""
    resting = {
        names[name] for override, names in _dropped_names(transformer) for name in override.frozen if name in names
    }
    return resting | {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}


def trainable_before(transformer: nn.Module) -> list[nn.Parameter]:
    """The parameters that were trainable before the drop and the adapters, and can be again."""
    names = transformer.__dict__.get(_TRAINABLE, set()) | _trainable_names(transformer)
    plain = {name.replace(".base_layer.", ".") for name in names if "lora_" not in name}
    named = transformer.named_parameters()
    return [p for name, p in named if name.replace(".base_layer.", ".") in plain and p.is_floating_point()]


def remember_trainable(transformer: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Note parameters that rest now: ``restore`` makes them trainable, and so does the end of LoRA."""
    wanted = {id(parameter) for parameter in parameters}
    if _TRAINABLE in transformer.__dict__:
        names = (name for name, parameter in transformer.named_parameters() if id(parameter) in wanted)
        transformer.__dict__[_TRAINABLE].update(name.replace(".base_layer.", ".") for name in names)
        return
    for module, override in overridden(transformer):
        own = [name for name, parameter in hidden_parameters(module) if id(parameter) in wanted]
        override.frozen = tuple(dict.fromkeys((*override.frozen, *own)))


def _dropped_names(transformer: nn.Module) -> Iterator[tuple[StandIn, dict[str, str]]]:
    """Every stand-in, with the names of the parameters that it hides: in its module, and in the transformer."""
    paths = {id(module): path for path, module in transformer.named_modules()}
    for module, override in overridden(transformer):
        yield override, {name: f"{paths[id(module)]}.{name}" for name, _ in hidden_parameters(module)}


def _adapted(transformer: nn.Module, what: str) -> dict[str, Any]:
    layers = adapted_modules(transformer)
    if not layers:
        raise RecoveryError(f"{what}: {type(transformer).__name__} carries no LoRA adapters.")
    return layers


def _refuse_strangers(transformer: nn.Module, targets: list[str]) -> None:
    modules = dict(transformer.named_modules())
    if strangers := [path for path in targets if not isinstance(modules.get(path), nn.Linear | Conv1D)]:
        raise RecoveryError(f"The adapters are for {strangers[0]!r}, which is no linear map of this model.")


def _refuse_others(transformer: nn.Module) -> None:
    others = set(getattr(transformer, "peft_config", ())) - {ADAPTER}
    if others:
        raise RecoveryError(
            f"The model carries adapters of peft already ({', '.join(sorted(others))}); merge "
            "them (merge_and_unload()) or remove them first."
        )
