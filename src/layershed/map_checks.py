"""Checks of the linear maps that are to run in place of sublayers, before the model is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from layershed.arguments import check_kind
from layershed.discovery.branches import Branch
from layershed.dropped_config import is_map_size
from layershed.errors import PlanError
from layershed.planning.plan import DropPlan, Sublayer
from layershed.stand_ins.carried import maps_of, weights_like
from layershed.stand_ins.linear_map import LinearMap


def checked_maps(
    maps: Mapping[Sublayer, LinearMap],
    sublayers: Iterable[Sublayer],
    branches: Iterable[Branch],
    transformer: nn.Module,
) -> dict[Sublayer, LinearMap]:
    """The maps of the sublayers that are to be dropped, on the device and in the dtype of what they replace.

    Args:
        maps: By sublayer; those of other sublayers are left out.
        sublayers: What is to be dropped. If it is a plan, every sublayer with the action ``linear`` needs a map.
        branches: The model's sublayers.
        transformer: The model.

    Raises:
        PlanError: If a map is missing, of another width, or its sublayer cannot be replaced by one.
    """
    check_kind(maps, Mapping, "bypass: maps, linear maps by sublayer,", PlanError)
    given = {**maps_of(transformer), **maps}
    _refuse_missing(sublayers, given)
    wanted = set(sublayers) & maps.keys()
    places = {branch.sublayer: branch for branch in branches}
    found = {}
    for sublayer in sorted(wanted & places.keys()):
        check_kind(maps[sublayer], LinearMap, f"bypass: the map of {sublayer.name}", PlanError)
        _check_place(places[sublayer], maps[sublayer])
        like = weights_like(transformer.get_submodule(sublayer.path), transformer)
        found[sublayer] = maps[sublayer].to(**like)
    return found


def empty_maps(
    sizes: Mapping[str, tuple[int, int | None]], sublayers: Iterable[Sublayer], transformer: nn.Module
) -> dict[Sublayer, LinearMap]:
    """Maps whose weights are loaded later.

    Args:
        sizes: Width and rank by name of the sublayer.
        sublayers: The model's sublayers.
        transformer: The model.
    """
    return {
        sublayer: LinearMap(
            *sizes[sublayer.name], **weights_like(transformer.get_submodule(sublayer.path), transformer)
        )
        for sublayer in sublayers
        if sublayer.name in sizes
    }


def as_it_runs(plan: DropPlan, transformer: nn.Module) -> DropPlan:
    """A plan with the actions that were carried out on a model, for a file beside its weights."""
    maps = maps_of(transformer)
    for sublayer, linear_map in maps.items():
        plan = plan.with_action("linear", [sublayer], rank=linear_map.rank)
    return plan.with_action("bypass", [sublayer for sublayer in plan if sublayer not in maps])


def planned_maps(plan: DropPlan, branches: Iterable[Branch], transformer: nn.Module) -> dict[Sublayer, LinearMap]:
    """Maps of the sizes that a plan asks for, with random weights: for what depends on shapes alone."""
    widths = {branch.sublayer: branch.linear.width for branch in branches if branch.linear is not None}
    linear = [drop for drop in plan.drops if drop.action == "linear" and drop.sublayer in widths]
    sizes = {drop.sublayer.name: (widths[drop.sublayer], drop.rank) for drop in linear}
    return empty_maps(sizes, [drop.sublayer for drop in linear], transformer)


def map_sizes(maps: Mapping[Any, LinearMap]) -> dict[str, tuple[int, int | None]]:
    """Width and rank of maps by name of the sublayer, for files."""
    return {sublayer.name: (each.width, each.rank) for sublayer, each in sorted(maps.items())}


def map_sizes_from(content: Any) -> dict[str, tuple[int, int | None]]:
    """The inverse of :func:`map_sizes`, for untrusted files.

    Raises:
        PlanError: If it is not valid.
    """
    check_kind(content or {}, Mapping, "Linear maps: width and rank by sublayer", PlanError)
    return {str(name): _size_from(size) for name, size in (content or {}).items()}


def _size_from(size: Any) -> tuple[int, int | None]:
    width, rank = size if isinstance(size, list | tuple) and len(size) == 2 else (None, None)
    if not is_map_size(width) or not (rank is None or is_map_size(rank)):
        raise PlanError(f"Linear map: width and rank must be positive integers, got {size!r}.")
    return width, rank


def _refuse_missing(sublayers: Iterable[Sublayer], maps: Mapping[Sublayer, LinearMap]) -> None:
    if not isinstance(sublayers, DropPlan):
        return
    missing = [drop.sublayer.name for drop in sublayers.drops if drop.action == "linear" and drop.sublayer not in maps]
    if missing:
        raise PlanError(
            f"The plan replaces {', '.join(missing)} by linear maps, but no maps are given. Fit them: "
            "layershed.bypass(model, plan, maps=layershed.fit_linear_maps(model, batches, plan))."
        )


def _check_place(branch: Branch, linear_map: LinearMap) -> None:
    name = branch.sublayer.name
    if branch.linear is None:
        raise PlanError(
            f"{name} cannot be replaced by a linear map: no place was proven where a map of its norm's output gives "
            "what it adds to the stream. Drop it without a map."
        )
    if linear_map.width != branch.linear.width:
        raise PlanError(
            f"The map of {name} has width {linear_map.width}, but the sublayer's stream has width "
            f"{branch.linear.width}. Fit the maps on this model."
        )
