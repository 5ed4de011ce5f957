"""LoRA in the linear maps that a drop has left: put in, switched off for a teacher, merged, or taken out again.

The adapters are peft's own (Hu et al. 2021, arXiv 2106.09685): a weight W becomes W + s B A with A of shape (rank, in),
B of shape (out, rank), and s = alpha / rank, or alpha / sqrt(rank) with rsLoRA.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from layershed.discovery import dissect, find_transformer, secure_quantized
from layershed.errors import QuantizationError, RecoveryError, UnknownNameError
from layershed.overrides import exchange, overridden, take_over_hooks
from layershed.plan import Sublayer
from layershed.surgery import dropped_sublayers

if TYPE_CHECKING:  # peft imports bitsandbytes, which takes its time: only where adapters are wanted
    from peft import LoraConfig

Placement = Literal["all", "neighbours"]

ADAPTER = "recovery"


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

    The model computes what it did before, as B starts at zero. Called again, with further sublayers dropped, it adds
    the adapters that are missing. It draws from a random state of its own, so that every rank gets the same adapters.

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
        RecoveryError: If an option has no meaning, there is nothing to adapt, or adapters of another origin are there.
    """
    check_lora(rank=rank, alpha=alpha, dropout=dropout, target_modules=target_modules, placement=placement)
    transformer = find_transformer(model, name=name)
    targets = _targets(transformer, target_modules, placement)
    present = adapted_modules(transformer)
    if not targets - present.keys() and not present:
        raise RecoveryError(_no_target(transformer, target_modules, placement))
    settings = {"r": rank, "lora_alpha": alpha, "lora_dropout": float(dropout), "use_rslora": rslora, "use_dora": dora}
    return inject_at(transformer, targets | present.keys(), settings, seed=seed)


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
    wanted = sorted(targets - adapted_modules(transformer).keys())
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
    config = _peft_config(transformer)
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
    config = _peft_config(transformer)
    fields = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
    return {"targets": targets, "settings": {field: getattr(config, field) for field in fields}}


def checked_settings(content: Any) -> tuple[set[str], dict[str, Any]]:
    """The targets and arguments that :func:`lora_settings` gave, checked, as they may come from a stranger's file.

    Raises:
        RecoveryError: If they are of another form.
    """
    types = {"r": int, "lora_alpha": int, "lora_dropout": float, "use_rslora": bool, "use_dora": bool}
    try:
        targets, settings = set(content["targets"]), dict(content["settings"])
    except (TypeError, KeyError, ValueError) as error:
        raise RecoveryError(f"This does not describe adapters: {error}.") from None
    fit = settings.keys() == types.keys() and all(type(settings[field]) is kind for field, kind in types.items())
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
    """Take the adapters out; the model computes what it did without them, bit for bit.

    Raises:
        RecoveryError: If there are none.
    """
    transformer = find_transformer(model, name=name)
    _unwrap(transformer, _adapted(transformer, "remove_lora"))


def _peft_config(transformer: Any) -> LoraConfig:
    """Where peft leaves it in the models that it adapts."""
    config: LoraConfig = transformer.peft_config[ADAPTER]
    return config


def _switch(layers: Iterable[Any], enabled: bool) -> None:
    for layer in layers:
        layer._disable_adapters = not enabled  # peft's own setter would also decide anew what is trainable


def _unwrap(transformer: nn.Module, layers: dict[str, Any]) -> None:
    for path, layer in layers.items():
        exchange(transformer, path, layer.base_layer)
    del transformer.peft_config


def _adapted(transformer: nn.Module, what: str) -> dict[str, Any]:
    layers = adapted_modules(transformer)
    if not layers:
        raise RecoveryError(f"{what}: {type(transformer).__name__} carries no recovery adapters.")
    return layers


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


def _targets(transformer: nn.Module, target_modules: str | Sequence[str], placement: Placement) -> set[str]:
    """Paths of the modules to adapt: those chosen, which still run."""
    linear = set(_linear_modules(transformer))
    if isinstance(target_modules, str):
        head = getattr(transformer, "get_output_embeddings", lambda: None)()
        chosen = {path for path in linear if transformer.get_submodule(path) is not head}
    else:
        ends = tuple(f".{end}" for end in target_modules)
        chosen = {path for path in linear if f".{path}".endswith(ends)}
        unknown = [end for end in target_modules if not any(f".{path}".endswith(f".{end}") for path in linear)]
        if unknown:
            raise RecoveryError(
                f"target_modules: no linear module that runs is named {unknown[0]!r}; there are "
                f"{', '.join(sorted({path.rpartition('.')[2] for path in linear}))}."
            )
    _refuse_tied(transformer, chosen)
    if placement == "all":
        return chosen
    near = tuple(f"{path}." for path in _neighbours(transformer))
    return {path for path in chosen if f"{path}.".startswith(near)}


def _refuse_tied(transformer: nn.Module, paths: set[str]) -> None:
    """Merged into a weight that two modules share, an adapter would change the other one, too."""
    holders: dict[int, int] = {}
    for module in transformer.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    for path in sorted(paths):
        shared = [p for p in transformer.get_submodule(path).parameters() if holders[id(p)] > 1]
        if shared:
            raise RecoveryError(
                f"target_modules: the weight of {path} is tied to another module's, such as the input embedding, which "
                "merging would change, too; leave it out."
            )


def _linear_modules(transformer: nn.Module) -> Iterator[str]:
    """Paths of the linear modules that run, adapted ones included."""
    closed: list[str] = []
    carriers = {id(module) for module, _ in overridden(transformer)}
    for path, module in transformer.named_modules():
        if any(path.startswith(f"{outer}.") for outer in closed):
            continue
        # torch's own attention reads the weights inside it without calling their modules
        if id(module) in carriers or isinstance(module, nn.MultiheadAttention):
            closed.append(path)
        elif hasattr(module, "lora_A") or isinstance(module, nn.Linear | Conv1D):
            closed.append(path)
            yield path


def _neighbours(transformer: nn.Module) -> set[str]:
    """Paths of the modules that compute the nearest kept sublayers before and after each dropped one."""
    branches = {branch.sublayer: branch for branch in dissect(transformer).branches}
    dropped = set(dropped_sublayers(transformer))
    order: list[Sublayer] = sorted({*branches, *dropped})
    near: set[Sublayer] = set()
    for step in (1, -1):
        beside_dropped = False
        for sublayer in order[::step]:
            if sublayer not in dropped and beside_dropped:
                near.add(sublayer)
            beside_dropped = sublayer in dropped
    return {path for sublayer in near for path, _ in (*branches[sublayer].stand_ins, *branches[sublayer].support)}


def _no_target(transformer: nn.Module, target_modules: str | Sequence[str], placement: str) -> str:
    if placement == "neighbours" and not dropped_sublayers(transformer):
        return "placement='neighbours': nothing is dropped, so that nothing stands beside a dropped sublayer."
    return (
        f"There is nothing to adapt in {type(transformer).__name__} (target_modules={target_modules!r}, "
        f"placement={placement!r}): no such linear module runs."
    )
