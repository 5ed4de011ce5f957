"""Predicts the effect of a drop from shapes alone: sizes, KV cache and the least time on a machine.

A skeleton on the meta device is enough, so the model need not fit on this machine.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from layershed.devices import module_of
from layershed.discovery.find import dissect, find_transformer
from layershed.discovery.model_record import recorded
from layershed.errors import SelectionError, UnknownNameError
from layershed.map_checks import planned_maps
from layershed.performance.costs import CostModel, PassCosts
from layershed.performance.model_size import WeightSizes, weight_sizes
from layershed.performance.roofline import ACCELERATORS, Ceilings, Cost, accelerator, measure_ceilings
from layershed.performance.stopwatch import SpeedSettings
from layershed.planning.plan import Drop, DropPlan, ImportanceScores, Kind, Scope, Sublayer
from layershed.planning.selection import select_sublayers
from layershed.surgery import bypass, bypassed_sublayers, restore

Part = Kind | Literal["rest"]


@dataclass(frozen=True)
class PredictedPhase:
    """Least time of one phase.

    Args:
        seconds: Seconds of the prefill, or of one decoding step.
        tokens_per_s: Tokens per second over all sequences.
        bound: The part that takes most of the time: ``"compute"``, or ``"memory"`` for moving weights and cache.
    """

    seconds: float
    tokens_per_s: float
    bound: Literal["compute", "memory"]


@dataclass(frozen=True)
class PredictedSide:
    """Prediction for one side, the dense or the dropped model.

    Args:
        parameters: Number of weights that the model computes with.
        weight_bytes: Bytes of these weights.
        kv_bytes: Bytes of the KV cache after the prompt and all new tokens of every sequence.
        prefill: The prefill.
        decode: A cached decoding step in the middle of the new tokens.
        work: FLOPs and bytes of that step for one token of one sequence, by kind of sublayer and for the ``"rest"``.
    """

    parameters: int
    weight_bytes: int
    kv_bytes: int
    prefill: PredictedPhase
    decode: PredictedPhase
    work: Mapping[Part, Cost]

    def devices(self, memory: float) -> int:
        """Return the least number of devices whose memory holds weights and cache. Activations are not counted."""
        return math.ceil((self.weight_bytes + self.kv_bytes) / memory)


@dataclass(frozen=True)
class Prediction:
    """Result of :func:`predict`.

    Args:
        dense: The dense model.
        dropped: The model without the sublayers of ``plan``.
        plan: The dropped sublayers.
        dtype: Type of the weights and the cache, such as ``"bfloat16"``.
        batch_size: Number of sequences.
        prompt_tokens: Tokens per prompt.
        new_tokens: Decoded tokens per sequence.
        ceilings: The machine's ceilings. Times are those of one device, even if the model needs several.
        uniform: True if all sublayers of a kind cost the same, so that only their number matters.
    """

    dense: PredictedSide
    dropped: PredictedSide
    plan: DropPlan
    dtype: str
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    ceilings: Ceilings
    uniform: bool

    @property
    def prefill_speedup(self) -> float:
        """Prefill speed, dropped over dense."""
        return self.dense.prefill.seconds / self.dropped.prefill.seconds

    @property
    def decode_speedup(self) -> float:
        """Decode speed, dropped over dense."""
        return self.dense.decode.seconds / self.dropped.decode.seconds

    def to_dict(self) -> dict[str, Any]:
        """Convert the prediction to plain primitives, for JSON."""
        sides = {}
        for name in ("dense", "dropped"):
            side: PredictedSide = getattr(self, name)
            devices = None if self.ceilings.memory is None else side.devices(self.ceilings.memory)
            sides[name] = {**asdict(side), "devices": devices}
        speedups = {"prefill_speedup": self.prefill_speedup, "decode_speedup": self.decode_speedup}
        return {**asdict(self), **sides, **speedups, "plan": self.plan.to_dict()}


def predict(
    model: nn.Module,
    plan: DropPlan | None,
    ceilings: Ceilings,
    settings: SpeedSettings,
    *,
    name: str | None = None,
) -> Prediction:
    """Predict the effect of a drop by the roofline model. The model is not changed.

    Args:
        model: A causal language model, or a module that holds one. On the meta device no weight is needed.
        plan: The sublayers to drop; None for the bypassed ones. Bypassed sublayers count as dropped in either case.
        ceilings: The machine's ceilings.
        settings: Lengths. The numbers of runs are ignored.
        name: Path of the transformer inside ``model``; needed if the model holds several.

    Raises:
        CostError: If the model's costs cannot be derived from its shapes.
        LayershedError: If the plan does not fit the model, or the tokens exceed its positions.
    """
    transformer = settings.check(find_transformer(model, name=name))
    before = bypassed_sublayers(transformer)
    dense = weight_sizes(transformer, lifted=True)
    if plan is None:
        plan = plan_of(before)
    elif plan:
        bypass(transformer, plan, maps=planned_maps(plan, dissect(transformer).branches, transformer))
    plan = recorded(plan, transformer)
    gone = bypassed_sublayers(transformer)
    left = weight_sizes(transformer)
    costs = CostModel(transformer)
    if added := set(gone) - set(before):
        restore(transformer, added)
    return Prediction(
        _side(costs, dense, (), ceilings, settings),
        _side(costs, left, gone, ceilings, settings),
        plan,
        _dtype(transformer),
        settings.batch_size,
        settings.prompt_tokens,
        settings.new_tokens,
        ceilings,
        all(_is_uniform(phase) for phase in costs.passes(settings)),
    )


def deepest_sublayers(
    sublayers: Iterable[Sublayer], scope: Scope, *, count: int | None = None, ratio: float | None = None
) -> DropPlan:
    """Build a plan that drops the deepest sublayers, for a skeleton, which has no importances.

    In most models costs depend only on the number dropped of each kind (:attr:`Prediction.uniform`).

    Args:
        sublayers: The sublayers of the model.
        scope: One kind or ``"block"``. ``"joint"`` is refused, as it needs importances.
        count: Number to drop. Give count or ratio.
        ratio: Share of the candidates to drop.

    Raises:
        SelectionError: With scope ``"joint"``, and as :func:`~layershed.planning.selection.select_sublayers`.
    """
    if scope == "joint":
        raise SelectionError(
            "scope='joint': the number of each kind is decided by importances, and a skeleton has none. Give the "
            "drop_plan.json of a run with --plan, or a scope of one kind."
        )
    by_depth = {sublayer: -float(sublayer.block) for sublayer in sublayers}
    blocks = {sublayer.block: -float(sublayer.block) for sublayer in by_depth}
    chosen = select_sublayers(ImportanceScores(by_depth, blocks=blocks), scope, count=count, ratio=ratio)
    return plan_of(chosen, scope)


def plan_of(sublayers: Iterable[Sublayer], scope: Scope = "joint") -> DropPlan:
    """Build a plan without scores."""
    return DropPlan(tuple(Drop(sublayer) for sublayer in sublayers), scope)


def ceilings_of(name: str, device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Return the published ceilings of an accelerator, or the measured ceilings of this machine.

    Args:
        name: A key of ``ACCELERATORS``, in upper or lower case, or ``"this"`` to measure this machine.
        device: The device to measure.
        dtype: Type of the matrices in the measurement.

    Raises:
        UnknownNameError: If the name is unknown.
    """
    known = name.lower()  # vendors write A100
    if known != "this":
        if known not in ACCELERATORS:
            raise UnknownNameError("device", known, ("this", *ACCELERATORS))
        return accelerator(known)
    module = module_of(device, "get_device_properties")
    if module is not None:
        memory = module.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return replace(measure_ceilings(device, dtype), memory=memory)


def _side(
    costs: CostModel, sizes: WeightSizes, gone: Collection[Sublayer], ceilings: Ceilings, settings: SpeedSettings
) -> PredictedSide:
    prompt, step = costs.passes(settings)
    tokens = settings.prompt_tokens + settings.new_tokens
    return PredictedSide(
        sizes.parameters,
        sizes.bytes,
        costs.kv_bytes(batch_size=settings.batch_size, tokens=tokens, dropped=gone),
        _phase(prompt.without(gone), settings.batch_size * settings.prompt_tokens, ceilings),
        _phase(step.without(gone), settings.batch_size, ceilings),
        _work(step, gone, settings.batch_size),
    )


def _is_uniform(phase: PassCosts) -> bool:
    costs: dict[Kind, set[Cost]] = {}
    for sublayer, cost in phase.sublayers.items():
        costs.setdefault(sublayer.kind, set()).add(cost)
    return all(len(different) == 1 for different in costs.values())


def _phase(pieces: list[Cost], tokens: int, ceilings: Ceilings) -> PredictedPhase:
    seconds = ceilings.seconds(pieces)
    computing = ceilings.seconds(
        piece for piece in pieces if piece.flops / ceilings.flops >= piece.bytes / ceilings.bandwidth
    )
    return PredictedPhase(seconds, tokens / seconds, "compute" if 2 * computing >= seconds else "memory")


def _work(step: PassCosts, gone: Collection[Sublayer], batch_size: int) -> dict[Part, Cost]:
    work: dict[Part, Cost] = dict.fromkeys((sublayer.kind for sublayer in step.sublayers), Cost())
    for sublayer, cost in step.sublayers.items():
        if sublayer not in gone:
            work[sublayer.kind] += cost
    work["rest"] = step.rest
    return {part: Cost(cost.flops / batch_size, cost.bytes / batch_size) for part, cost in work.items()}


def _dtype(transformer: PreTrainedModel) -> str:
    return str(transformer.dtype).removeprefix("torch.")
