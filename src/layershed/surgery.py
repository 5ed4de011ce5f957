"""Bypass, restore and remove: what happens to the model once a plan says what goes. Nothing here scores.

A bypassed sublayer keeps its weights and costs no compute; :func:`restore` brings back the very same model. A removed
one has no weights left. Both give the same logits: those of the model with that branch contributing zero, without the
norm that only it used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from layershed.discovery import Branch, find_branches, find_transformer
from layershed.errors import PlanError
from layershed.overrides import Override, PassThrough, RemovedModule, ZeroBranch, install, lifted, overridden, uninstall
from layershed.plan import Sublayer


def bypass(model: nn.Module, sublayers: Iterable[Sublayer], *, name: str | None = None) -> None:
    """Take sublayers out of the forward pass, keeping their weights; state-dict keys do not change.

    Their parameters are frozen, and their gradients forgotten, so that no optimizer moves them. What is bypassed
    already stays so.

    Args:
        model: A transformer, or a module that holds one.
        sublayers: A drop plan, or any sublayers that :func:`find_sublayers` returned.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Raises:
        PlanError: If nothing is given, or a sublayer is not in the model.
    """
    transformer = find_transformer(model, name=name)
    branches = find_branches(transformer)
    wanted = _check(transformer, sublayers, branches)
    for path, override in _overrides(transformer, branches, {*wanted, *bypassed_sublayers(transformer)}):
        module = transformer.get_submodule(path)
        uninstall(module)
        install(module, override)


def restore(model: nn.Module, sublayers: Iterable[Sublayer] | None = None) -> None:
    """Undo :func:`bypass`: the model is bit for bit what it was.

    Args:
        model: A transformer, or a module that holds some.
        sublayers: What to restore; None restores everything that is bypassed.

    Raises:
        PlanError: If a sublayer is not bypassed.
    """
    before = bypassed_sublayers(model)
    wanted = set(before if sublayers is None else sublayers)
    for sublayer in sorted(wanted.difference(before)):
        raise PlanError(f"restore: {sublayer.name} is not bypassed; bypassed are: {_names(before)}.")
    for module, _ in list(overridden(model)):
        uninstall(module)
    # a norm that two sublayers share must run again for the one that came back: bypass the others anew
    remaining = [sublayer for sublayer in before if sublayer not in wanted]
    if remaining:
        bypass(model, remaining)


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Within the context the model is dense: bypassed sublayers run again, then are bypassed as before.

    For evaluation and for a teacher: parameters stay frozen. Removed sublayers cannot come back.

    Raises:
        PlanError: If a sublayer was removed.
    """
    gone = removed_sublayers(model)
    if gone:
        raise PlanError(f"dense: {_names(gone)} were removed and have no weights; only a bypass can be lifted.")
    with lifted(model):
        yield


def remove(model: nn.Module, sublayers: Iterable[Sublayer] | None = None, *, name: str | None = None) -> None:
    """Delete sublayers with their weights and note it in upstream's field ``config.per_layer_config[i].skip``.

    Args:
        model: A transformer, or a module that holds one.
        sublayers: A drop plan or sublayers; None removes everything that is bypassed.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Raises:
        PlanError: If nothing is given, or a sublayer is not in the model.
    """
    transformer = find_transformer(model, name=name)
    kept_bypassed = bypassed_sublayers(transformer)
    branches = find_branches(transformer)
    wanted = _check(transformer, kept_bypassed if sublayers is None else sublayers, branches)
    gone = wanted | set(removed_sublayers(transformer))
    restore(transformer)
    for path, override in _overrides(transformer, branches, gone):
        transformer.set_submodule(path, RemovedModule(override))
    mark_skipped(transformer.config, gone)
    still_bypassed = [sublayer for sublayer in kept_bypassed if sublayer not in wanted]
    if still_bypassed:
        bypass(transformer, still_bypassed)


def bypassed_sublayers(model: nn.Module) -> tuple[Sublayer, ...]:
    """The sublayers that are bypassed now, in forward order."""
    return tuple(sorted({o.sublayer for _, o in overridden(model) if isinstance(o, ZeroBranch)}))


def removed_sublayers(model: nn.Module) -> tuple[Sublayer, ...]:
    """The sublayers that were removed, in forward order."""
    removed = (module.override for module in model.modules() if isinstance(module, RemovedModule))
    return tuple(sorted({override.sublayer for override in removed if isinstance(override, ZeroBranch)}))


def dropped_sublayers(model: nn.Module) -> tuple[Sublayer, ...]:
    """The sublayers that do not run: bypassed or removed, in forward order."""
    return tuple(sorted({*bypassed_sublayers(model), *removed_sublayers(model)}))


def dropped_parameter_names(transformer: PreTrainedModel) -> set[str]:
    """Names of the parameters and buffers that bypassed sublayers, and the norms only they use, hold."""
    carriers = {id(module) for module, _ in overridden(transformer)}
    return {
        f"{path}.{name}"
        for path, module in transformer.named_modules()
        if id(module) in carriers
        for name in module.state_dict()
    }


def mark_skipped(config: Any, sublayers: Iterable[Sublayer]) -> None:
    """Write sublayers into ``config.per_layer_config``, keeping whatever else stands there."""
    text_config = config.get_text_config()
    spec = getattr(text_config, "_heterogeneity_spec", None)
    layers: dict[int, dict[str, Any]] = {i: dict(own) for i, own in (spec.per_layer_overrides if spec else {}).items()}
    for sublayer in sublayers:
        own = layers.setdefault(sublayer.block, {})
        own["skip"] = sorted({*own.get("skip", ()), sublayer.kind})
    if layers:
        text_config.per_layer_config = layers


def _overrides(
    transformer: PreTrainedModel, branches: tuple[Branch, ...], dropped: set[Sublayer]
) -> Iterator[tuple[str, Override]]:
    """Path and override of every module that stops running once ``dropped`` are dropped."""
    kept = {path for b in branches if b.sublayer not in dropped for path in (b.norm, *b.tail)}
    for branch in branches:
        if branch.sublayer not in dropped:
            continue
        module = transformer.get_submodule(branch.sublayer.path)
        in_place = branch.topology == "parallel"
        layer_idx = getattr(module, "layer_idx", None) if branch.sublayer.kind == "attention" else None
        yield branch.sublayer.path, ZeroBranch(branch.sublayer, branch.outputs, layer_idx, in_place)
        for path in (branch.norm, *branch.tail):
            if path is not None and path not in kept:
                yield path, PassThrough(branch.sublayer)


def _check(transformer: PreTrainedModel, sublayers: Iterable[Sublayer], branches: tuple[Branch, ...]) -> set[Sublayer]:
    """The sublayers as a set, all of them present in the model."""
    wanted = set(sublayers)
    if not wanted:
        raise PlanError("No sublayer was given: an empty drop plan changes nothing.")
    present = {branch.sublayer for branch in branches} | set(removed_sublayers(transformer))
    for sublayer in sorted(wanted - present):
        raise PlanError(
            f"{type(transformer).__name__} has no sublayer {sublayer.name} at {sublayer.path!r}; it has "
            f"{len(present)} sublayers, such as {min(present).path!r}. Was the plan made for another model?"
        )
    return wanted - set(removed_sublayers(transformer))


def _names(sublayers: Iterable[Sublayer]) -> str:
    return ", ".join(sublayer.name for sublayer in sublayers) or "none"
