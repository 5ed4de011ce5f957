"""Bypass, restore and remove sublayers.

- A bypassed sublayer keeps its weights and costs no compute; :func:`restore` brings back the very same model.
- A removed sublayer has no weights left.

Both give the same logits: those of the model whose branch contributes zero. A norm used by this branch alone goes too.
With the action ``linear``, a linear map of the norm's output runs in place of the branch, and the norm stays.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from layershed.discovery.anatomy import Anatomy
from layershed.discovery.branches import Branch
from layershed.discovery.find import check_module, dissect, find_transformer, transformers_in
from layershed.discovery.model_record import check_plan, keep_model_record, kept_model_record, take_model_record
from layershed.dropped_config import mark_dropped, note_dropped, note_owner, noted_maps, noted_sublayers, resolved
from layershed.errors import PlanError, RevivedSublayerError
from layershed.map_checks import checked_maps
from layershed.planning.arguments import sublayer_set
from layershed.planning.plan import Sublayer
from layershed.stand_ins.carried import maps_of, stand_ins_of
from layershed.stand_ins.contexts import lifted
from layershed.stand_ins.install import install, keep_out, uninstall
from layershed.stand_ins.linear_map import LinearMap
from layershed.stand_ins.record import check_records, forget_foreign, overridden, write_record
from layershed.stand_ins.stand_in import RemovedModule, StandIn, removed_in
from layershed.stand_ins.watching import watch
from layershed.stand_ins.wrappers import override_of


def bypass(
    model: nn.Module,
    sublayers: Iterable[Sublayer],
    *,
    maps: Mapping[Sublayer, LinearMap] | None = None,
    name: str | None = None,
    strict: bool = True,
) -> None:
    """Take sublayers out of the forward pass and keep their weights; state-dict keys do not change.

    A sublayer with a linear map is replaced by the map: ``Y = X + W norm(X) + c``. The map becomes a part of the model,
    with trainable parameters below the sublayer's own module (``linear_stand_in``).

    Their parameters are frozen and their gradients cleared, so that no optimizer moves them. Sublayers that are already
    bypassed stay so. Extra outputs (attention weights, router logits) stay in place, with None for what does not run; a
    model's own router loss is that of the routers that run.

    Args:
        model: A transformer, or a module that holds one.
        sublayers: A drop plan, or any sublayers that :func:`find_sublayers` returned.
        maps: Linear maps by sublayer, such as of :func:`fit_linear_maps`. Sublayers without one contribute nothing;
            those that were replaced before keep their map. The model takes the maps themselves, not copies, on its
            device and in its dtype.
        name: Path of the transformer inside ``model``, needed where it holds more than one.
        strict: Whether to refuse a plan that is recorded for another model; else there is a warning.

    Raises:
        PlanError: If no sublayer is given, one is not in the model, the plan is for another model, its action is
            ``linear`` and there is no map, or a map does not fit.
    """
    transformer = find_transformer(model, name=name)
    anatomy = dissect(transformer)
    wanted = _check("bypass", transformer, sublayers, anatomy, strict)
    all_maps = {**maps_of(transformer), **checked_maps(maps or {}, sublayers, anatomy.branches, transformer)}
    if lost := _lost(transformer) - wanted:
        _refuse_lost_maps(transformer, lost - all_maps.keys())
        _warn_of(lost)
    _bypass(transformer, anatomy.branches, {*wanted, *lost, *_carried(transformer)}, all_maps)
    _note(model)


def _bypass(
    transformer: nn.Module, branches: tuple[Branch, ...], dropped: set[Sublayer], maps: Mapping[Sublayer, LinearMap]
) -> None:
    for path, stand_in in stopped_by(branches, dropped, maps):
        module = transformer.get_submodule(path)
        uninstall(module)
        install(module, stand_in)
        if not isinstance(transformer, PreTrainedModel):
            keep_out(module)


def restore(model: nn.Module, sublayers: Iterable[Sublayer] | None = None, *, name: str | None = None) -> None:
    """Undo :func:`bypass`: the model is bit for bit what it was.

    Args:
        model: A transformer, or a module that holds some.
        sublayers: The sublayers to restore; None for all that are bypassed.
        name: Path of the transformer inside ``model``, needed to restore some where it holds more than one.

    Raises:
        PlanError: If a sublayer is not bypassed; then nothing is restored.
    """
    check_module(model)
    forget_foreign(model)
    if sublayers is None and name is None:
        for module, _ in list(overridden(model)):
            uninstall(module)
        _note(model)
        return
    transformer = find_transformer(model, name=name)
    before = bypassed_sublayers(transformer)
    wanted = sublayer_set(before if sublayers is None else sublayers, "restore")
    maps = maps_of(transformer)
    for sublayer in sorted(wanted.difference(before)):
        raise PlanError(f"restore: {sublayer.name} is not bypassed. Bypassed are: {_names(before)}.")
    for module, _ in list(overridden(transformer)):
        uninstall(module)
    _note(model)
    # a norm shared by two sublayers must run again for the restored one: bypass the others again
    remaining = [sublayer for sublayer in before if sublayer not in wanted]
    if remaining:
        bypass(transformer, remaining, maps={s: maps[s] for s in remaining if s in maps})


@contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Within the context the model is dense: bypassed sublayers run, and no maps. Afterwards it is as before.

    Use it for evaluation and for a teacher: parameters stay frozen. Removed sublayers cannot run again.

    Raises:
        PlanError: If a sublayer was removed.
    """
    gone = removed_sublayers(model)
    if gone:
        raise PlanError(
            f"dense: {_names(gone)} were removed and have no weights. Only bypassed sublayers can run again. Load the "
            "dense model."
        )
    with lifted(model):
        yield


def remove(
    model: nn.Module,
    sublayers: Iterable[Sublayer] | None = None,
    *,
    name: str | None = None,
    strict: bool = True,
) -> None:
    """Delete sublayers with their weights and note it in the config (:func:`mark_dropped`). Linear maps stay.

    Args:
        model: A transformer, or a module that holds one.
        sublayers: A drop plan or sublayers; None for all that are bypassed.
        name: Path of the transformer inside ``model``, needed where it holds more than one.
        strict: Whether to refuse a plan that is recorded for another model; else there is a warning.

    Raises:
        PlanError: If no sublayer is given, one is not in the model, or the plan is for another model.
    """
    transformer = find_transformer(model, name=name)
    kept_bypassed = bypassed_sublayers(transformer)
    anatomy = dissect(transformer)
    branches = anatomy.branches
    wanted = _check("remove", transformer, kept_bypassed if sublayers is None else sublayers, anatomy, strict)
    checked_maps({}, () if sublayers is None else sublayers, branches, transformer)
    gone = wanted | set(removed_sublayers(transformer))
    record = kept_model_record(transformer)
    maps = maps_of(transformer)
    restore(transformer)
    for path, stand_in in stopped_by(branches, gone, maps):
        removed = RemovedModule(stand_in, transformer.get_submodule(path))
        transformer.set_submodule(path, removed)
        if not isinstance(transformer, PreTrainedModel):
            keep_out(removed)
    stand_ins = stand_ins_of(transformer)
    watch(transformer, stand_ins)
    if isinstance(transformer, PreTrainedModel):
        mark_dropped(transformer.config, stand_ins, transformer)
    keep_model_record(transformer, record)
    still_bypassed = [sublayer for sublayer in kept_bypassed if sublayer not in wanted]
    if still_bypassed:
        bypass(transformer, still_bypassed, maps={s: maps[s] for s in still_bypassed if s in maps})


def bypassed_sublayers(model: nn.Module) -> tuple[Sublayer, ...]:
    """The sublayers that are bypassed now, in forward order.

    Sublayers that the model's config records as dropped, and that would run because others replaced a block or loaded
    the model, are bypassed again first, with a warning.

    Raises:
        RevivedSublayerError: If that is impossible, because the model is another one now.
    """
    check_module(model)
    for _, transformer in transformers_in(model):
        if lost := _lost(transformer):
            _put_back(transformer, lost)
        elif not isinstance(transformer, PreTrainedModel):
            check_records(transformer)
    return tuple(sorted(_carried(model)))


def _carried(model: nn.Module) -> set[Sublayer]:
    return {stand_in.sublayer for _, stand_in in overridden(model) if stand_in.core}


def _lost(transformer: nn.Module) -> set[Sublayer]:
    """The sublayers that the config records as dropped, and that carry no stand-in."""
    if not isinstance(transformer, PreTrainedModel):
        return set()
    owner, noted = note_owner(transformer.config), noted_sublayers(transformer.config)
    if owner not in (None, transformer):  # they share a config object
        return set()
    missing = {path: sublayer for path, sublayer in noted.items() if not _stands_at(transformer, path)}
    return {
        replace(sublayer, path=resolved(transformer, sublayer.path))
        for path, sublayer in missing.items()
        if not _stands_at(transformer, resolved(transformer, path))
    }


def _stands_at(transformer: nn.Module, path: str) -> bool:
    try:
        module = transformer.get_submodule(path)
    except AttributeError:
        return False
    return isinstance(module, RemovedModule) or override_of(module) is not None


def _put_back(transformer: nn.Module, lost: set[Sublayer]) -> None:
    branches = dissect(transformer).branches
    unknown = lost - {branch.sublayer for branch in branches}
    if unknown:
        raise RevivedSublayerError(
            f"{_names(sorted(unknown))}: recorded as dropped in the config of {type(transformer).__name__}, but the "
            "model has no such sublayer now. Call layershed.restore(model) if the record is out of date."
        )
    maps = maps_of(transformer)
    _refuse_lost_maps(transformer, lost - maps.keys())
    _warn_of(lost)
    _bypass(transformer, branches, {*lost, *_carried(transformer)}, maps)
    _note(transformer)


def _warn_of(lost: set[Sublayer]) -> None:
    warnings.warn(
        f"{_names(sorted(lost))}: recorded as dropped in the model's config, but would have run. They are bypassed "
        "again. Call layershed.restore(model) for the dense model.",
        stacklevel=4,
    )


def _refuse_lost_maps(transformer: nn.Module, lost: set[Sublayer]) -> None:
    """Refuse to put back sublayers whose linear maps are gone: deleting them would be another model."""
    noted = noted_maps(getattr(transformer, "config", None))
    if without := sorted(sublayer for sublayer in lost if sublayer.name in noted):
        raise RevivedSublayerError(
            f"{_names(without)}: replaced by a linear map in the config of {type(transformer).__name__}, but the "
            "module that held the map is gone. Load the model anew, or call layershed.restore(model) for the dense one."
        )


def linear_maps(model: nn.Module) -> dict[Sublayer, LinearMap]:
    """The linear maps that run in place of sublayers, by sublayer. They are modules of the model, not copies."""
    check_module(model)
    return {sublayer: maps[sublayer] for maps in [maps_of(model)] for sublayer in sorted(maps)}


def removed_sublayers(model: nn.Module) -> tuple[Sublayer, ...]:
    """The sublayers that were removed, in forward order."""
    check_module(model)
    return tuple(sorted(removed_in(model)))


def dropped_sublayers(model: nn.Module) -> tuple[Sublayer, ...]:
    """The sublayers that do not run: bypassed or removed, in forward order."""
    return tuple(sorted({*bypassed_sublayers(model), *removed_sublayers(model)}))


def _note(model: nn.Module) -> None:
    """Bring all records up to date: those in the parents of dropped modules, and those in configs."""
    for _, transformer in transformers_in(model):
        write_record(transformer)
        stand_ins = stand_ins_of(transformer)
        watch(transformer, stand_ins)
        if not stand_ins:
            keep_model_record(transformer, None)
        if isinstance(transformer, PreTrainedModel):
            owner = note_owner(transformer.config)
            if isinstance(owner, PreTrainedModel) and any(module is transformer for module in owner.modules()):
                note_dropped(owner.config, stand_ins_of(owner), owner)  # this is a part of it
            else:
                note_dropped(transformer.config, stand_ins, transformer)


def stopped_by(
    branches: tuple[Branch, ...], dropped: Collection[Sublayer], maps: Mapping[Sublayer, LinearMap] | None = None
) -> Iterator[tuple[str, StandIn]]:
    """Path and stand-in of every module that stops running once ``dropped`` are dropped, some for a linear map."""
    maps = maps or {}
    deleted = {sublayer for sublayer in dropped if sublayer not in maps}
    kept = {path for branch in branches if branch.sublayer not in deleted for path, _ in branch.support}
    for branch in branches:
        if branch.sublayer in maps and branch.sublayer in dropped and branch.linear is not None:
            for path, stand_in in branch.linear.stand_ins:
                yield path, replace(stand_in, own={}, map=maps[branch.sublayer] if stand_in.core else None)
        elif branch.sublayer in dropped:
            shared = [(path, stand_in) for path, stand_in in branch.support if path not in kept]
            for path, stand_in in (*branch.stand_ins, *shared):
                yield path, replace(stand_in, own={})


def _check(
    what: str, transformer: nn.Module, sublayers: Iterable[Sublayer], anatomy: Anatomy, strict: bool
) -> set[Sublayer]:
    """The sublayers as a set, all of them present in the model, whose record is kept on it."""
    record = take_model_record(transformer, anatomy)
    wanted = sublayer_set(sublayers, what)
    check_plan(what, sublayers, transformer, record, strict=strict)
    if not wanted:
        raise PlanError("No sublayer was given: an empty drop plan changes nothing. Give at least one.")
    present = {branch.sublayer for branch in anatomy.branches} | set(removed_sublayers(transformer))
    for sublayer in sorted(wanted - present):
        raise PlanError(
            f"{type(transformer).__name__} has no sublayer {sublayer.name} at {sublayer.path!r}. It has {len(present)} "
            f"sublayers, such as {min(present).path!r}. Check whether the plan was made for another model."
        )
    keep_model_record(transformer, record)
    return wanted - set(removed_sublayers(transformer))


def _names(sublayers: Iterable[Sublayer]) -> str:
    return ", ".join(sublayer.name for sublayer in sublayers) or "none"
