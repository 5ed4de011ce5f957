"""Where LoRA goes: all linear maps of a dropped model that still run, or only those next to dropped sublayers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from layershed.discovery.find import dissect
from layershed.errors import RecoveryError
from layershed.planning.plan import Sublayer
from layershed.stand_ins.record import overridden
from layershed.surgery import dropped_sublayers

Placement = Literal["all", "neighbours"]


def targets_of(transformer: nn.Module, target_modules: str | Sequence[str], placement: Placement) -> set[str]:
    """Paths of the chosen modules that still run; arguments as of :func:`~layershed.inject_lora`.

    Raises:
        RecoveryError: If a name does not exist, or its weight is tied to another module's.
    """
    linear = set(_linear_modules(transformer))
    if isinstance(target_modules, str):
        head = getattr(transformer, "get_output_embeddings", lambda: None)()
        chosen = {path for path in linear if transformer.get_submodule(path) is not head}
        if not isinstance(transformer, PreTrainedModel):  # nobody says which map is the output embedding
            chosen = {path for path in chosen if not _shared(transformer, path)}
    else:
        ends = tuple(f".{end}" for end in target_modules)
        chosen = {path for path in linear if f".{path}".endswith(ends)}
        unknown = [end for end in target_modules if not any(f".{path}".endswith(f".{end}") for path in linear)]
        if unknown:
            raise RecoveryError(
                f"target_modules: no linear module that runs is named {unknown[0]!r}. Available: "
                f"{', '.join(sorted({path.rpartition('.')[2] for path in linear}))}."
            )
    _refuse_tied(transformer, chosen)
    if placement == "all":
        return chosen
    near = tuple(f"{path}." for path in _neighbours(transformer))
    return {path for path in chosen if f"{path}.".startswith(near)}


def _refuse_tied(transformer: nn.Module, paths: set[str]) -> None:
    """Refuse shared weights: merging an adapter into one module would change the other too."""
    for path in sorted(paths):
        if _shared(transformer, path):
            raise RecoveryError(
                f"target_modules: the weight of {path} is tied to another module's, such as the input embedding. "
                "Merging would change both. Leave it out."
            )


def _shared(transformer: nn.Module, path: str) -> bool:
    """Whether another module holds a parameter of this one, too."""
    own = {id(parameter) for parameter in transformer.get_submodule(path).parameters()}
    held = [id(p) for module in transformer.modules() for p in module.parameters(recurse=False) if id(p) in own]
    return len(held) > len(own)


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


def no_target(transformer: nn.Module, target_modules: str | Sequence[str], placement: str) -> str:
    """The error text for a model without any module to adapt."""
    if placement == "neighbours" and not dropped_sublayers(transformer):
        return "placement='neighbours': nothing is dropped, so there are no neighbours. Drop first, or use 'all'."
    return (
        f"There is nothing to adapt in {type(transformer).__name__} (target_modules={target_modules!r}, "
        f"placement={placement!r}): no such linear module runs."
    )


def refuse_computed(modules: Mapping[str, nn.Module]) -> None:
    """Refuse to merge into weights that torch computes before each forward pass: it would be undone in silence.

    Raises:
        RecoveryError: If a weight is pruned (``torch.nn.utils.prune``), normalised or parametrized.
    """
    for path, module in modules.items():
        base: nn.Module = getattr(module, "base_layer", module)
        if base._parameters.get("weight") is None:
            raise RecoveryError(
                f"The weight of {path} is computed from other parameters (pruning, weight_norm or a parametrization), "
                "so that a merged adapter would be lost. Make the weight permanent first (prune.remove, "
                "parametrize.remove_parametrizations), or keep the adapter (finish='adapter')."
            )
