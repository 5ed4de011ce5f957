"""Drops until a measured speedup is reached: how much goes is decided by the clock, what goes by the ranking."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, get_args

from torch import nn

from layershed.discovery.find import find_transformer
from layershed.errors import SelectionError, SpeedupError, UnknownNameError
from layershed.performance.latency import Latency, measure_latency
from layershed.performance.roofline import measure_ceilings
from layershed.performance.speed import PhaseSpeed, SpeedReport, measure_speed
from layershed.performance.stopwatch import Phase, SpeedSettings, check_phase
from layershed.planning.plan import Drop, DropPlan, Scope, Sublayer
from layershed.planning.selection import Objective, check_scope, check_selection, plan_of_groups, rank_sublayers
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
    """Bypass as few sublayers as give a measured speedup, in the order of their importance.

    The first number to try comes from the measured latencies of the sublayers; what is measured there corrects it,
    until that many reach the target and one fewer do not. A number must reach it twice, as of several that are tried
    one might by chance; what is returned is the second measurement. What is bypassed already stays so, and counts as
    well: where that is enough, nothing more goes. Where everything that may go leaves it in doubt, everything goes,
    with a warning.

    Args:
        model: A causal language model, or a module that holds one.
        scores: Importance by sublayer, as of :func:`~layershed.planning.selection.select_sublayers`.
        target_speedup: Dropped over dense, such as 1.3: the median of the paired runs.
        scope: What is ranked; scope, protect and objective are those of
            :func:`~layershed.planning.selection.select_sublayers`.
        phase: Whose speedup counts, ``"decode"`` or ``"prefill"``.
        protect: What stays.
        objective: In which order they go.
        settings: How speed is measured.
        name: Path of the transformer inside ``model``, needed where it holds more than one.
        agree: Hands on what rank 0 measured; for distributed runs, in which no two clocks agree.

    Returns:
        What was dropped, and the speed that was measured with it.

    Raises:
        SpeedupError: If with everything that may go the whole 95 % interval lies below the target; nothing is bypassed
            then that was not before.
        SelectionError: If nothing may go.
        LayershedError: As the functions that it calls.
    """
    check_choice(scope, count=None, ratio=None, target_speedup=target_speedup, phase=phase, objective=objective)
    transformer: Any = settings.check_structure(find_transformer(model, name=name))
    protect = tuple(protect)
    gone = bypassed_sublayers(transformer)
    if not _without(rank_sublayers(scores, scope, protect=protect), gone) and not gone:
        raise SelectionError(
            f"scope={scope!r}: no sublayer may be dropped, as there is none of that scope, or all are protected."
        )
    latency: Latency = agree(measure_latency(transformer, phase=phase, **asdict(settings)))
    ranked = rank_sublayers(scores, scope, protect=protect, objective=objective, latency=latency.sublayers)
    ranked = _without(ranked, gone)
    search = _Search(latency, gone, ranked, target_speedup)
    reports: dict[int, SpeedReport] = {}
    ceilings = measure_ceilings(transformer.device, transformer.dtype)
    try:
        while (number := search.next_number()) is not None:
            _bypass_first(transformer, ranked, number)
            reports[number] = agree(measure_speed(transformer, ceilings=ceilings, **asdict(settings)))
            search.learn(number, phase_of(reports[number], phase).speedup.median)
    except BaseException:
        _bypass_first(transformer, ranked, 0)
        raise
    number = min(search.enough, len(ranked))
    reached = phase_of(reports[number], phase)
    if reached.speedup.high < target_speedup:
        _bypass_first(transformer, ranked, 0)
        raise _out_of_reach(target_speedup, phase, number, reached)
    if reached.speedup.median < target_speedup:
        text = f"target_speedup={target_speedup}: with all {number} candidates dropped it is in doubt ({reached})."
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
    """Refuse a target that is out of reach even without all these sublayers, beyond the doubt of the measurement.

    Args:
        model: As of :func:`drop_to_speedup`, and so are the others but:
        sublayers: Everything that may be dropped.
        target_speedup: Dropped over dense.
        phase: Whose speedup counts.
        settings: How speed is measured.
        name: Path of the transformer.
        agree: Hands on what rank 0 measured.

    Raises:
        SpeedupError: If the whole 95 % interval lies below the target.
    """
    check_target(target_speedup)
    check_phase(phase)
    transformer = settings.check_structure(find_transformer(model, name=name))
    ranked = _without([(Drop(sublayer),) for sublayer in sublayers], bypassed_sublayers(transformer))
    try:
        _bypass_first(transformer, ranked, len(ranked))
        reached = phase_of(agree(measure_speed(transformer, **asdict(settings))), phase)
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
    """Refuse what can be refused without a model, where a number, a share or a speedup may be asked for.

    Raises:
        SelectionError: If they are not exactly one, or out of range.
        SpeedupError: If the target is no speedup.
        UnknownNameError: If there is no such phase or objective.
    """
    if sum(given is not None for given in (count, ratio, target_speedup)) != 1:
        raise SelectionError(
            f"count={count}, ratio={ratio}, target_speedup={target_speedup}: give exactly one of count and ratio, or "
            "target_speedup alone."
        )
    check_phase(phase)
    if objective not in get_args(Objective):
        raise UnknownNameError("objective", objective, get_args(Objective))
    if target_speedup is None:
        check_selection(scope, count=count, ratio=ratio)
    else:
        check_scope(scope)
        check_target(target_speedup)


def check_target(target_speedup: float) -> None:
    """Refuse what is no speedup.

    Raises:
        SpeedupError: If it is not above 1.
    """
    if not 1 < target_speedup < math.inf:
        raise SpeedupError(f"target_speedup={target_speedup}: it must be above 1, such as 1.3 for 30 % faster.")


def phase_of(report: SpeedReport, phase: Phase) -> PhaseSpeed:
    """The prefill or the decode part of a report."""
    return report.prefill if phase == "prefill" else report.decode


class _Search:
    """For the least number that reaches the target twice: a prediction that measurements correct, between bounds."""

    def __init__(
        self, latency: Latency, gone: Sequence[Sublayer], ranked: Sequence[tuple[Drop, ...]], target: float
    ) -> None:
        self.target, self.count = target, len(ranked)
        # none are too few, unless what is gone may do alone; the latter stands for more than there are
        self.too_few, self.enough = -1 if gone else 0, len(ranked) + 1
        left = latency.total - sum(latency.sublayers.get(sublayer, 0.0) for sublayer in gone)
        self._gained = []  # predicted speedup - 1 without the first 0, 1, 2, ... groups
        for group in ((), *ranked):
            left -= sum(latency.sublayers.get(drop.sublayer, 0.0) for drop in group)
            self._gained.append(latency.total / max(left, 1e-3 * latency.total) - 1)
        self._factor, self._measured = 1.0, 0
        self._confirmed = False

    def next_number(self) -> int | None:
        """How many to try next; None once it is settled."""
        if self.enough - self.too_few <= 1:
            return None if self._confirmed or self.enough > self.count else self.enough
        if self._measured >= _GUESSES:
            return self.count if self.enough > self.count else (self.too_few + self.enough) // 2
        wanted = self.target - 1
        guess = next((i for i, gain in enumerate(self._gained) if gain * self._factor >= wanted), self.count)
        return min(max(guess, self.too_few + 1), self.enough - 1)

    def learn(self, number: int, speedup: float) -> None:
        """Take up what was measured."""
        if speedup >= self.target:
            self._confirmed = number == self.enough
            self.enough = number
        elif number == self.enough:  # the first time it was chance
            self.too_few, self.enough = number, number + 1
        else:
            self.too_few = number
        self._measured += 1
        if speedup > 1 and self._gained[number] > 0:
            self._factor = (speedup - 1) / self._gained[number]


def _without(ranked: Sequence[tuple[Drop, ...]], gone: Collection[Sublayer]) -> list[tuple[Drop, ...]]:
    """The groups less what is bypassed already, which no search may restore."""
    left = (tuple(drop for drop in group if drop.sublayer not in gone) for group in ranked)
    return [group for group in left if group]


def _bypass_first(transformer: nn.Module, ranked: Sequence[tuple[Drop, ...]], number: int) -> None:
    """Of the ranked ones, exactly the first ``number`` are bypassed."""
    before = set(bypassed_sublayers(transformer))
    back = [drop.sublayer for group in ranked[number:] for drop in group if drop.sublayer in before]
    if back:
        restore(transformer, back)
    if number:
        bypass(transformer, [drop.sublayer for group in ranked[:number] for drop in group])


def _out_of_reach(target: float, phase: Phase, count: int, reached: PhaseSpeed) -> SpeedupError:
    speedup = reached.speedup
    return SpeedupError(
        f"target_speedup={target} of {phase} is out of reach: with all {count} candidates dropped it is "
        f"x{speedup.median:.2f} [{speedup.low:.2f}, {speedup.high:.2f}]; lower it, protect less, or widen the scope."
    )
