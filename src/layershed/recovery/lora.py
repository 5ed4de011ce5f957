"""LoRA in the linear maps that a drop has left: put in, switched off for a teacher, merged, or taken out again.

The adapters are peft's own (Hu et al. 2021, arXiv 2106.09685): a weight W becomes W + s B A with A of shape (rank, in),
B of shape (out, rank), and s = alpha / rank, or alpha / sqrt(rank) with rsLoRA.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from layershed.discovery.find import find_transformer, secure_quantized
from layershed.errors import QuantizationError, RecoveryError, UnknownNameError
from layershed.recovery.lora_targets import Placement, no_target, targets_of
from layershed.stand_ins.install import exchange, overridden, take_over_hooks
from layershed.stand_ins.stand_in import StandIn

if TYPE_CHECKING:  # peft imports bitsandbytes, which takes its time: only where adapters are wanted
    from peft import LoraConfig

ADAPTER = "recovery"
# what tells adapters apart: fields of peft's LoraConfig
SETTINGS = {"r": int, "lora_alpha": int, "lora_dropout": float, "use_rslora": bool, "use_dora": bool}
_TRAINABLE = "_trainable_before_recovery"  # on the model itself, as all state of what is done to it


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

    The model computes what it did before, as B starts at zero. Called again with the same options, after a further
    drop, it adds the adapters that are missing. It draws from a random state of its own: every rank gets the same ones.

    Args:
        model: A Hugging Face transformer, or a module that holds one.
        rank: Rank of the adapters.
        alpha: Their scale is alpha / rank.
        dropout: Dropout probability of what goes into them, in [0, 1).
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
        RecoveryError: If an option has no meaning, there is nothing to adapt, or adapters of another origin or of
            other settings are there.
    """
    check_lora(rank=rank, alpha=alpha, dropout=dropout, target_modules=target_modules, placement=placement)
    transformer = find_transformer(model, name=name)
    targets = targets_of(transformer, target_modules, placement)
    present = adapted_modules(transformer)
    if not targets - present.keys() and not present:
        raise RecoveryError(no_target(transformer, target_modules, placement))
    settings = lora_arguments(rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, dora=dora)
    return inject_at(transformer, targets | present.keys(), settings, seed=seed)


def lora_arguments(*, rank: int, alpha: int, dropout: float, rslora: bool, dora: bool, **_: Any) -> dict[str, Any]:
    """Options of :func:`inject_lora` as peft's LoraConfig has them; those that only say where adapters go are left."""
    return dict(zip(SETTINGS, (rank, alpha, float(dropout), rslora, dora), strict=True))


def check_lora(*, rank: int, alpha: int, dropout: float, target_modules: str | Sequence[str], placement: str) -> None:
    """Refuse options of :func:`inject_lora` that have no meaning, without a model.

    Raises:
        RecoveryError: If a number is out of range or no target is given.
        UnknownNameError: If there is no such placement.
    """
    if rank < 1 or alpha < 1:
        raise RecoveryError(f"rank={rank}, alpha={alpha}: both must be at least 1.")
    if not 0 <= dropout < 1:
        raise RecoveryError(f"dropout={dropout}: it must be in [0, 1).")
    if placement not in get_args(Placement):
        raise UnknownNameError("placement of adapters", placement, get_args(Placement))
    if target_modules != "all-linear" and (isinstance(target_modules, str) or not target_modules):
        raise RecoveryError(
            f"target_modules={target_modules!r}: give 'all-linear', or a list of ends of module paths, such as "
            "['q_proj', 'v_proj']."
        )


def check_targets(model: nn.Module, target_modules: str | Sequence[str], *, name: str | None = None) -> None:
    """Refuse, before training, a model that :func:`inject_lora` would refuse, whatever will be dropped.

    Raises:
        RecoveryError: If it is no Hugging Face model, carries adapters of another origin, or a target is not there or
            tied to another module.
    """
    transformer = find_transformer(model, name=name)
    _refuse_others(transformer)
    targets_of(transformer, target_modules, "all")


def inject_at(transformer: nn.Module, targets: set[str], settings: dict[str, Any], *, seed: int = 0) -> LoraConfig:
    """Put LoRA at the given paths, where there is none yet; as :func:`inject_lora`, which decides where.

    Args:
        transformer: A Hugging Face transformer.
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
    _refuse_strangers(transformer, wanted)
    for transposed in (False, True):  # as GPT-2's Conv1D keeps its weight
        paths = [path for path in wanted if isinstance(transformer.get_submodule(path), Conv1D) == transposed]
        if paths:
            transformer.__dict__.pop("peft_config", None)  # peft would warn of a second adapter; it is the same one
            lora = LoraConfig(**settings, fan_in_fan_out=transposed, target_modules=paths)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs, too
                inject_adapter_in_model(lora, transformer, ADAPTER)
    wrapper: Any
    for path in wanted:
        wrapper = transformer.get_submodule(path)
        wrapper.train(wrapper.base_layer.training)
        take_over_hooks(wrapper.base_layer, wrapper)
    for module, override in overridden(transformer):
        # peft has made all adapters trainable; what is restored later is frozen, but for them
        dropped = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        override.frozen = tuple(
            dict.fromkeys((*(n for n in override.frozen if "lora_" in n), *(n for n, _ in dropped)))
        )
        for _, parameter in dropped:
            parameter.requires_grad_(False)
    for parameter in transformer.parameters():
        if not parameter.requires_grad:
            parameter.grad = None  # else nothing zeroes it any more, and clipping by norm counts it
    config = peft_config_of(transformer)
    config.target_modules = set(targets)
    return config


def adapted_modules(model: nn.Module) -> dict[str, Any]:
    """The modules of peft that hold a recovery adapter, by path; empty where there is none."""
    return {path: module for path, module in model.named_modules() if ADAPTER in getattr(module, "lora_A", ())}


def lora_settings(transformer: nn.Module) -> dict[str, Any] | None:
    """Arguments for :func:`inject_at` that bring the adapters of a model about again, as primitives, or None."""
    targets = sorted(adapted_modules(transformer))
    if not targets:
        return None
    return {"targets": targets, "settings": settings_of(peft_config_of(transformer))}


def settings_of(config: LoraConfig) -> dict[str, Any]:
    """What of peft's config tells adapters apart."""
    return {field: getattr(config, field) for field in SETTINGS}


def checked_settings(content: Any) -> tuple[set[str], dict[str, Any]]:
    """The targets and arguments that :func:`lora_settings` gave, checked, as they may come from a stranger's file.

    Raises:
        RecoveryError: If they are of another form.
    """
    try:
        targets, settings = set(content["targets"]), dict(content["settings"])
    except (TypeError, KeyError, ValueError) as error:
        raise RecoveryError(f"This does not describe adapters: {error}.") from None
    fit = settings.keys() == SETTINGS.keys() and all(type(settings[f]) is kind for f, kind in SETTINGS.items())
    if not fit or not targets or not all(isinstance(path, str) for path in targets):
        raise RecoveryError(f"This does not describe adapters: {settings}.")
    return targets, settings


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within the context the model computes as if it had no adapters.

    What is trainable is not changed, as peft's own way of switching them off would.
    """
    layers = [layer for layer in adapted_modules(model).values() if not layer.disable_adapters]
    _switch(layers, False)
    try:
        yield
    finally:
        _switch(layers, True)


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Switch the adapters on or off for good; what is trainable is not changed."""
    _switch(adapted_modules(model).values(), enabled)


def merge_lora(model: nn.Module, *, force: bool = False, name: str | None = None) -> None:
    """Add the adapters into the weights and take them out; the model computes the same up to rounding.

    What was trainable before the adapters came is so again.

    Args:
        model: A transformer, or a module that holds one.
        force: Merge into quantized weights all the same, which rounds most of the recovery away.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Raises:
        RecoveryError: If there are no adapters, or they hold what is not finite.
        QuantizationError: If the weights are quantized, unless forced.
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
    for layer in layers.values():
        layer.merge(adapter_names=[ADAPTER])
    _unwrap(transformer, layers)


def remove_lora(model: nn.Module, *, name: str | None = None) -> None:
    """Take the adapters out; the model computes what it did without them, bit for bit, and trains what it did.

    Raises:
        RecoveryError: If there are none.
    """
    transformer = find_transformer(model, name=name)
    _unwrap(transformer, _adapted(transformer, "remove_lora"))


def peft_config_of(transformer: Any) -> LoraConfig:
    """Peft's config of the adapters, where peft leaves it in the models that it adapts."""
    config: LoraConfig = transformer.peft_config[ADAPTER]
    return config


def _switch(layers: Iterable[Any], enabled: bool) -> None:
    for layer in layers:
        layer._disable_adapters = not enabled  # peft's own setter would also decide anew what is trainable


def _unwrap(transformer: nn.Module, layers: dict[str, Any]) -> None:
    for path, layer in layers.items():
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
    """What is trainable, and what would be if it were not dropped."""
    resting = {
        names[name] for override, names in _dropped_names(transformer) for name in override.frozen if name in names
    }
    return resting | {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}


def _dropped_names(transformer: nn.Module) -> Iterator[tuple[StandIn, dict[str, str]]]:
    """Every stand-in, with the names of the parameters behind it: in its module, and in the whole."""
    paths = {id(module): path for path, module in transformer.named_modules()}
    for module, override in overridden(transformer):
        yield override, {name: f"{paths[id(module)]}.{name}" for name, _ in module.named_parameters()}


def _adapted(transformer: nn.Module, what: str) -> dict[str, Any]:
    layers = adapted_modules(transformer)
    if not layers:
        raise RecoveryError(f"{what}: {type(transformer).__name__} carries no LoRA adapters.")
    return layers


def _refuse_strangers(transformer: nn.Module, targets: list[str]) -> None:
    modules = dict(transformer.named_modules())
    if strangers := [path for path in targets if not isinstance(modules.get(path), nn.Linear | Conv1D)]:
        raise RecoveryError(f"The adapters are for {strangers[0]!r}, where no linear map is.")


def _refuse_others(transformer: nn.Module) -> None:
    if not isinstance(transformer, PreTrainedModel):
        raise RecoveryError(
            f"LoRA goes into Hugging Face models, and {type(transformer).__name__} is none; recover it by full "
            "training (mode: full)."
        )
    others = set(getattr(transformer, "peft_config", ())) - {ADAPTER}
    if others:
        raise RecoveryError(
            f"The model carries adapters of peft already ({', '.join(sorted(others))}); merge them "
            "(merge_and_unload()) or take them out before recovery puts in its own."
        )
