"""The record of a model: taken where it is dissected, kept on it while something is dropped, compared with a plan's."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace

from torch import nn
from torch.distributed.fsdp import FSDPModule

from layershed.discovery.anatomy import Anatomy
from layershed.discovery.find import dissect
from layershed.errors import PlanError
from layershed.planning.model_record import ModelRecord, compact
from layershed.planning.plan import DropPlan, ImportanceScores, Sublayer
from layershed.stand_ins.stand_in import removed_in

_KEPT = "_model_record"  # on the model itself, so that copies have it


def take_model_record(transformer: nn.Module, anatomy: Anatomy) -> ModelRecord:
    """Record a model. Its dropped sublayers count, also removed ones."""
    sublayers = {branch.sublayer for branch in anatomy.branches} | removed_in(transformer)
    blocks = max([len(anatomy.blocks), *(sublayer.block + 1 for sublayer in sublayers)])
    places = compact((sublayer.kind, sublayer.block) for sublayer in sublayers)
    return ModelRecord(_classes(transformer)[0], blocks, places)


def model_record(transformer: nn.Module) -> ModelRecord:
    """The record of any model; it may take a forward pass."""
    return take_model_record(transformer, dissect(transformer))


def keep_model_record(transformer: nn.Module, record: ModelRecord | None) -> None:
    """Keep the record on a model from which something is dropped; None takes it off."""
    transformer.__dict__.pop(_KEPT, None)
    if record is not None:
        transformer.__dict__[_KEPT] = record


def kept_model_record(transformer: nn.Module) -> ModelRecord | None:
    """The record of a model from which something is dropped; no forward pass is needed."""
    record: ModelRecord | None = transformer.__dict__.get(_KEPT)
    return record


def recorded(plan: DropPlan, transformer: nn.Module) -> DropPlan:
    """The plan, with the kept record of its model if it has none."""
    return plan if plan.model is not None else replace(plan, model=kept_model_record(transformer))


def check_plan(
    what: str,
    sublayers: Iterable[Sublayer],
    transformer: nn.Module,
    record: ModelRecord | None = None,
    *,
    strict: bool | None = None,
) -> None:
    """Refuse a plan that is recorded for another model. Nothing is compared without a record.

    Args:
        what: The name of the caller, for the message.
        sublayers: The plan, the scores, or any sublayers.
        transformer: The model.
        record: Its record; None for the kept one.
        strict: False gives a warning instead; None if the caller has no such argument.

    Raises:
        PlanError: If the plan is for another model; the error names both.
    """
    planned = sublayers.model if isinstance(sublayers, DropPlan | ImportanceScores) else None
    record = kept_model_record(transformer) if record is None else record
    if planned is None or record is None or planned.fits(record, _classes(transformer)):
        return
    sentence = f"{what}: the plan was made for {planned}, but this model is {record}."
    if strict is False:
        warnings.warn(sentence, stacklevel=4)
        return
    lenient = "" if strict is None else " To use it all the same, set strict=False."
    raise PlanError(f"{sentence} Give a plan for this model.{lenient}")


def _classes(transformer: nn.Module) -> list[str]:
    """Names of the model's class and of those that it is derived from; FSDP2 puts a class of its own in front."""
    return [cls.__name__ for cls in type(transformer).__mro__ if not issubclass(cls, FSDPModule)]
