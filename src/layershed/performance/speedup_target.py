"""Drops sublayers until a measured speedup is reached. Importance decides their order, the clock their number."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

from torch import nn

from layershed.arguments import check_kind, check_number
from layershed.discovery.find import find_transformer
from layershed.errors import MeasurementError, SelectionError, SpeedupError, UnknownNameError
from layershed.performance.latency import Latency, measure_latency
from layershed.performance.roofline import measure_ceilings
from layershed.performance.speed import PhaseSpeed, SpeedReport, measure_speed
from layershed.performance.speed_report import shown_speedup
from layershed.performance.stopwatch import Phase, SpeedSettings, check_phase
from layershed.planning.arguments import as_protected
from layershed.planning.plan import Drop, DropPlan, Scope, Sublayer
from layershed.planning.selection import Objective, check_scope, check_selection, plan_of_groups, rank_sublayers
from layershed.progress import track
from layershed.surgery import bypass, bypassed_sublayers, restore

DEFAULT_SETTINGS = SpeedSettings()
_GUESSES = 4


def drop_to_speedup(
    model: nn.Module,
    scores: Mapping[Sublayer, float],
    target_speedup: float,
    scope: Scope = "joint",
    *,
    phase: Phase = "decode",
    protect: Iterable[Sublayer | int] = (),
    objective: Objective = "importance",
    settings: SpeedSettings = DEFAULT_SETTINGS,
    name: str | None = None,
    agree: Callable[[Any], Any] = lambda measured: measured,
) -> tuple[DropPlan, SpeedReport]:
    """Bypass the fewest sublayers that reach a measured speedup, the least important first.

    - The latencies of the sublayers give the first number to try. Measurements correct it until that number reaches the
      target and one fewer does not.
    - A number must reach the target twice, as one of several tries may reach it by chance. The returned report is the
      second measurement.
    - Sublayers that are already bypassed stay bypassed and count. If they reach the target, nothing more is dropped.
    - If the target stays in doubt with all candidates dropped, all are dropped, with a warning.

    Args:
        model: A causal language model, or a module that holds one.
        scores: Importance by sublayer, as for :func:`~layershed.planning.selection.select_sublayers`.
        target_speedup: Speed, dropped over dense, such as 1.3. The median of the paired runs must reach it.
        scope: Scope of the ranking. Scope, protect and objective are those of
            :func:`~layershed.planning.selection.select_sublayers`.
        phase: The phase whose speedup counts, ``"decode"`` or ``"prefill"``.
        protect: Sublayers or block indices that stay.
        objective: The order of dropping.
        settings: Settings of the speed measurement.
        name: Path of the transformer inside ``model``; needed if the model holds several.
        agree: Function that returns the measurement of rank 0 on every rank, for distributed runs.

    Returns:
        The plan and the measured speed of the dropped model.

    Raises:
        SpeedupError: If the whole 95 % interval lies below the target with all candidates dropped. The model is then
            as before.
        SelectionError: If no sublayer may be dropped.
        LayershedError: As the functions that it calls.
    """
    check_choice(scope, count=None, ratio=None, target_speedup=target_speedup, phase=phase, objective=objective)
    check_kind(settings, SpeedSettings, "settings", MeasurementError)
    transformer: Any = settings.check_structure(find_transformer(model, name=name))
    protect = as_protected(protect)
    gone = bypassed_sublayers(transformer)
    if not _without(rank_sublayers(scores, scope, protect=protect), gone) and not gone:
        raise SelectionError(
            f"scope={scope!r}: no sublayer may be dropped, as the scope is empty or all are protected. Widen the scope "
            "or protect less."
        )
    latency: Latency = agree(measure_latency(transformer, phase=phase, **asdict(settings)))
    ranked = rank_sublayers(scores, scope, protect=protect, objective=objective, latency=latency.sublayers)
    ranked = _without(ranked, gone)
    search = _Search(latency, gone, ranked, target_speedup)
    reports: dict[int, SpeedReport] = {}
    ceilings = measure_ceilings(transformer.device, transformer.dtype)
    try:
        for number in track(iter(search.next_number, None), f"Searching a speedup of {target_speedup:g}", search.most):
            _bypass_first(transformer, ranked, number)
            reports[number] = agree(measure_speed(transformer, ceilings=ceilings, **asdict(settings)))
            search.learn(number, reports[number].phases[phase].speedup.median)
    except BaseException:
        _bypass_first(transformer, ranked, 0)
        raise
    number = min(search.enough, len(ranked))
    reached = reports[number].phases[phase]
    if reached.speedup.high < target_speedup:
        _bypass_first(transformer, ranked, 0)
        raise _out_of_reach(target_speedup, phase, number, reached)
    if reached.speedup.median < target_speedup:
        text = (
            f"target_speedup={target_speedup} is in doubt with all {number} candidates dropped ({reached}). Lower it, "
            "protect less, or widen the scope."
        )
        warnings.warn(text, stacklevel=2)
    _bypass_first(transformer, ranked, number)
    return plan_of_groups(scores, scope, ranked[:number]), reports[number]


def check_reachable(
    model: nn.Module,
    sublayers: Sequence[Sublayer],
    target_speedup: float,
    *,
    phase: Phase = "decode",
    settings: SpeedSettings = DEFAULT_SETTINGS,
    name: str | None = None,
    agree: Callable[[SpeedReport], SpeedReport] = lambda measured: measured,
) -> None:
    """Refuse a target that is out of reach even with all these sublayers dropped.

    Args:
        model: A causal language model, or a module that holds one.
        sublayers: All sublayers that may be dropped.
        target_speedup: Speed, dropped over dense.
        phase: The phase whose speedup counts.
        settings: Settings of the speed measurement.
        name: Path of the transformer inside ``model``.
        agree: Function that returns the measurement of rank 0 on every rank.

    Raises:
        SpeedupError: If the whole 95 % interval lies below the target.
    """
    check_target(target_speedup)
    check_phase(phase)
    transformer = settings.check_structure(find_transformer(model, name=name))
    ranked = _without([(Drop(sublayer),) for sublayer in sublayers], bypassed_sublayers(transformer))
    try:
        _bypass_first(transformer, ranked, len(ranked))
        reached = agree(measure_speed(transformer, **asdict(settings))).phases[phase]
    finally:
        _bypass_first(transformer, ranked, 0)
    if reached.speedup.high < target_speedup:
        raise _out_of_reach(target_speedup, phase, len(ranked), reached)


def check_choice(
    scope: Scope,
    *,
    count: int | None,
    ratio: float | None,
    target_speedup: float | None,
    phase: Phase = "decode",
    objective: Objective = "importance",
) -> None:
    """Check the arguments of a drop that need no model.

    Raises:
        SelectionError: If not exactly one of count, ratio and target_speedup is given, or it is out of range.
        SpeedupError: If the target is not above 1.
        UnknownNameError: If the phase or the objective is unknown.
    """
    if sum(given is not None for given in (count, ratio, target_speedup)) != 1:
        raise SelectionError(
            f"count={count}, ratio={ratio}, target_speedup={target_speedup}: give exactly one of count and ratio, or "
            "target_speedup alone."
        )
    check_phase(phase)
    if target_speedup is not None:
        check_number(target_speedup, "target_speedup", SpeedupError)
    if objective not in get_args(Objective):
        raise UnknownNameError("objective", objective, get_args(Objective))
    if target_speedup is None:
        check_selection(scope, count=count, ratio=ratio)
    else:
        check_scope(scope)
        check_target(target_speedup)


def check_target(target_speedup: float) -> None:
    """Refuse a target that is not a speedup.

    Raises:
        SpeedupError: If the target is not above 1.
    """
    if not 1 < target_speedup < math.inf:
        raise SpeedupError(f"target_speedup={target_speedup}: it must be above 1, such as 1.3 for 30 % faster.")


class _Search:
    """Searches the least number of groups that reaches the target twice, by a prediction that measurements correct."""

    def __init__(
        self, latency: Latency, gone: Sequence[Sublayer], ranked: Sequence[tuple[Drop, ...]], target: float
    ) -> None:
        self.target, self.count = target, len(ranked)
        # dropping none is too few, unless earlier drops may be enough; one above the count means: no number is enough
        self.too_few, self.enough = -1 if gone else 0, len(ranked) + 1
        left = latency.total - sum(latency.sublayers.get(sublayer, 0.0) for sublayer in gone)
        self._gained = []  # predicted speedup - 1 without the first 0, 1, 2, ... groups
        for group in ((), *ranked):
            left -= sum(latency.sublayers.get(drop.sublayer, 0.0) for drop in group)
            self._gained.append(latency.total / max(left, 1e-3 * latency.total) - 1)
        self._factor, self._measured = 1.0, 0
        self._confirmed = False

    @property
    def most(self) -> int:
        """How many tries it takes at most, unless one succeeds by chance: guesses, halvings, a second try."""
        return min(_GUESSES + math.ceil(math.log2(self.count + 2)) + 1, self.count + 2)

    def next_number(self) -> int | None:
        """Return the next number to try; None at the end of the search."""
        if self.enough - self.too_few <= 1:
            return None if self._confirmed or self.enough > self.count else self.enough
        if self._measured >= _GUESSES:
            return self.count if self.enough > self.count else (self.too_few + self.enough) // 2
        wanted = self.target - 1
        guess = next((i for i, gain in enumerate(self._gained) if gain * self._factor >= wanted), self.count)
        return min(max(guess, self.too_few + 1), self.enough - 1)

    def learn(self, number: int, speedup: float) -> None:
        """Update the bounds and the prediction with a measurement."""
        if speedup >= self.target:
            self._confirmed = number == self.enough
            self.enough = number
        elif number == self.enough:  # it reached the target by chance before
            self.too_few, self.enough = number, number + 1
        else:
            self.too_few = number
        self._measured += 1
        if speedup > 1 and self._gained[number] > 0:
            self._factor = (speedup - 1) / self._gained[number]


def _without(ranked: Sequence[tuple[Drop, ...]], gone: Collection[Sublayer]) -> list[tuple[Drop, ...]]:
    """Remove bypassed sublayers from the groups, as the search must not restore them."""
    left = (tuple(drop for drop in group if drop.sublayer not in gone) for group in ranked)
    return [group for group in left if group]


def _bypass_first(transformer: nn.Module, ranked: Sequence[tuple[Drop, ...]], number: int) -> None:
    """Bypass exactly the first ``number`` of the ranked groups."""
    before = set(bypassed_sublayers(transformer))
    back = [drop.sublayer for group in ranked[number:] for drop in group if drop.sublayer in before]
    if back:
        restore(transformer, back)
    if number:
        bypass(transformer, [drop.sublayer for group in ranked[:number] for drop in group])


def _out_of_reach(target: float, phase: Phase, count: int, reached: PhaseSpeed) -> SpeedupError:
    return SpeedupError(
        f"target_speedup={target} of {phase} is out of reach: all {count} candidates dropped give "
        f"{shown_speedup(reached.speedup)}. Lower it, protect less, or widen the scope."
    )
