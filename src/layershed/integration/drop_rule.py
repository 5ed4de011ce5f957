"""The rule by which SublayerDrop chooses: a count, a ratio, as many as a measured speedup needs, or a given plan."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from layershed.discovery.find import find_sublayers, find_transformer
from layershed.discovery.model_record import check_plan, model_record
from layershed.discovery.uneven import explaining_empty_scope, warn_left_alone
from layershed.errors import PlanError, SelectionError
from layershed.integration.namespaces import LightningModule, Trainer
from layershed.performance.latency import measure_latency
from layershed.performance.speedup_target import DEFAULT_SETTINGS, check_choice, check_reachable, drop_to_speedup
from layershed.performance.stopwatch import Phase, SpeedSettings
from layershed.planning.plan import DropPlan, ImportanceScores, Scope, Sublayer
from layershed.planning.schedule import DropSchedule
from layershed.planning.selection import Objective, equal_scores, protected_sublayers, rank_sublayers, select_sublayers
from layershed.surgery import bypassed_sublayers

DEFAULT_SCOPE: Scope = "joint"
DEFAULT_METRIC = "cosine"
_UNUSED_BESIDE_A_PLAN = {
    "objective": "importance",
    "phase": "decode",
    "speed": DEFAULT_SETTINGS,
    "calibrate_on": "running",
    "calibration_batches": 16,
}


def refuse_beside_plan(plan: str | Path | None, **options: object) -> None:
    """Refuse options of SublayerDrop that have no effect beside a given plan, unless they are at their defaults.

    Raises:
        SelectionError: If there is one.
    """
    given = [f"{name}={value!r}" for name, value in options.items() if value != _UNUSED_BESIDE_A_PLAN[name]]
    if plan is not None and given:
        raise SelectionError(
            f"{', '.join(given)}, plan={str(plan)!r}: a given plan is dropped as it is, and nothing is measured to "
            f"choose. Leave {given[0].partition('=')[0]} out, or leave plan out."
        )


@dataclass(frozen=True)
class DropRule:
    """How many sublayers to drop, and in which order. The arguments are those of SublayerDrop.

    Raises:
        LayershedError: If the arguments are invalid.
    """

    schedule: DropSchedule
    scope: Scope
    count: int | None
    ratio: float | None
    target_speedup: float | None
    phase: Phase
    objective: Objective
    speed: SpeedSettings
    transformer: str | None
    plan: str | Path | None = None

    def __post_init__(self) -> None:
        if self.plan is not None:
            self._check_plan_alone()
            return
        check_choice(
            self.scope,
            count=self.count,
            ratio=self.ratio,
            target_speedup=self.target_speedup,
            phase=self.phase,
            objective=self.objective,
        )
        if self.ratio is not None and self.schedule.rounds > 1:
            raise SelectionError(
                f"ratio={self.ratio}, rounds={self.schedule.rounds}: an iterative schedule takes count (per round) or "
                "target_speedup. Set one of these instead of ratio, or leave rounds out."
            )

    def _check_plan_alone(self) -> None:
        others = {"count": self.count, "ratio": self.ratio, "target_speedup": self.target_speedup}
        if given := [f"{name}={value}" for name, value in others.items() if value is not None]:
            raise SelectionError(
                f"{', '.join(given)}, plan={str(self.plan)!r}: give exactly one of count, ratio, target_speedup and "
                "plan."
            )
        if self.schedule.rounds > 1:
            raise SelectionError(
                f"plan={str(self.plan)!r}, rounds={self.schedule.rounds}: a plan is dropped at once. Leave rounds out."
            )
        refuse_beside_plan(self.plan, objective=self.objective, phase=self.phase, speed=self.speed)

    def _check_origin(self, what: str, plan: DropPlan, metric: str) -> None:
        within = plan.scope == self.scope or {sublayer.kind for sublayer in plan} == {self.scope}
        if self.scope != DEFAULT_SCOPE and not within:
            kinds = ", ".join(sorted({sublayer.kind for sublayer in plan}))
            raise SelectionError(
                f"{what}, scope={self.scope!r}: the plan was made with scope {plan.scope!r} and drops {kinds}. Leave "
                "scope out, or give another plan."
            )
        if metric not in (DEFAULT_METRIC, plan.metric):
            raise SelectionError(
                f"{what}, metric={metric!r}: the plan was made with metric {plan.metric!r}, and no importance is "
                "measured beside a plan. Leave metric out."
            )

    @property
    def measures_speed(self) -> bool:
        """Whether the rule depends on measured time."""
        return self.plan is None and (self.target_speedup is not None or self.objective == "speed")

    def given_plan(self, pl_module: LightningModule, protect: Collection[Sublayer], metric: str) -> DropPlan | None:
        """Read the given plan and refuse one that does not fit the model; None without a given plan.

        Raises:
            PlanError: If the file holds no plan, or one for another model, or nothing of it is left to drop.
            SelectionError: If it drops a protected sublayer, or was made by another scope or metric than are set.
        """
        if self.plan is None:
            return None
        plan, what = DropPlan.load(self.plan), f"SublayerDrop(plan={str(self.plan)!r})"
        self._check_origin(what, plan, metric)
        transformer = find_transformer(pl_module, name=self.transformer)
        present = set(find_sublayers(transformer))
        check_plan(what, plan, transformer, model_record(transformer))
        if unknown := [sublayer for sublayer in plan if sublayer not in present]:
            raise PlanError(
                f"{what}: {type(transformer).__name__} has no sublayer {unknown[0].name} at {unknown[0].path!r}. Give "
                "a plan for this model."
            )
        if not set(plan) - set(bypassed_sublayers(transformer)):
            raise PlanError(f"{what}: it holds nothing that is not dropped already. Give another plan.")
        if kept := [sublayer for sublayer in plan if sublayer in protect]:
            raise SelectionError(f"{what}: it drops {kept[0].name}, which is protected. Protect other blocks.")
        return plan

    def check(self, pl_module: LightningModule, protect: Collection[Sublayer | int]) -> None:
        """Refuse what this model cannot do, without running it.

        Raises:
            SelectionError: If it has too few sublayers.
            MeasurementError: If its speed is needed and cannot be measured.
        """
        equal = equal_scores(find_sublayers(pl_module, name=self.transformer))
        warn_left_alone(pl_module, name=self.transformer)
        if self.plan is not None:
            return
        with explaining_empty_scope(pl_module, self.scope, name=self.transformer):
            if self.target_speedup is None:
                total = None if self.count is None else self.count * self.schedule.rounds
                select_sublayers(equal, self.scope, count=total, ratio=self.ratio, protect=protect)
            elif not rank_sublayers(equal, self.scope, protect=protect):
                raise SelectionError(
                    f"target_speedup={self.target_speedup}, scope={self.scope!r}: the model has no sublayers of "
                    "this scope, or all are protected. Set another scope, or protect fewer blocks."
                )
        if self.measures_speed:
            self.speed.check(find_transformer(pl_module, name=self.transformer))

    def check_reachable(
        self, trainer: Trainer, pl_module: LightningModule, protect: Collection[Sublayer | int]
    ) -> None:
        """Refuse, before training, a target that dropping all candidates does not reach; rank 0's clock decides.

        Raises:
            SpeedupError: If it is out of reach.
        """
        if self.target_speedup is None:
            return
        equal = equal_scores(find_sublayers(pl_module, name=self.transformer))
        groups = rank_sublayers(equal, self.scope, protect=protect)
        with trainer.precision_plugin.forward_context():
            check_reachable(
                pl_module,
                [drop.sublayer for group in groups for drop in group],
                self.target_speedup,
                phase=self.phase,
                settings=self.speed,
                name=self.transformer,
                agree=trainer.strategy.broadcast,
            )

    def choose(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        scores: ImportanceScores | None,
        protect: Collection[Sublayer | int],
        given: DropPlan | None = None,
    ) -> tuple[DropPlan, float | None]:
        """The drop of this step, the same on every rank; with a target, also its measured speedup, else None.

        Every round of an iterative schedule covers an equal part of the way to the target.

        Raises:
            SpeedupError: If dropping every candidate does not reach the target.
        """
        if given is not None:
            agreed: DropPlan = trainer.strategy.broadcast(given)
            gone = set(bypassed_sublayers(pl_module))
            return replace(agreed, drops=tuple(drop for drop in agreed.drops if drop.sublayer not in gone)), None
        assert scores is not None, "only a given plan needs no scores"
        # all ranks have the same scores, but a last bit may differ between machines: use rank 0's
        scores = trainer.strategy.broadcast(scores)
        if self.target_speedup is None:
            latency = self._latency(trainer, pl_module) if self.objective == "speed" else None
            plan = select_sublayers(
                scores,
                self.scope,
                count=self.count,
                ratio=self.ratio,
                protect=protect,
                objective=self.objective,
                latency=latency,
            )
            return plan, None
        share = self.schedule.share_due(trainer.global_step)
        with trainer.precision_plugin.forward_context():
            plan, report = drop_to_speedup(
                pl_module,
                scores,
                share * self.target_speedup + (1 - share),
                self.scope,
                phase=self.phase,
                protect=protect,
                objective=self.objective,
                settings=self.speed,
                name=self.transformer,
                agree=trainer.strategy.broadcast,
            )
        return plan, report.phases[self.phase].speedup.median

    def _latency(self, trainer: Trainer, pl_module: LightningModule) -> dict[Sublayer, float]:
        with trainer.precision_plugin.forward_context():
            latency = measure_latency(pl_module, phase=self.phase, name=self.transformer, **asdict(self.speed))
        agreed: dict[Sublayer, float] = trainer.strategy.broadcast(latency.sublayers)
        return agreed


def resolve_protected(
    pl_module: LightningModule, protect: Collection[Sublayer | int], transformer: str | None
) -> tuple[Sublayer, ...]:
    """The sublayers of ``protect`` in the whole model: a negative index must not shift when blocks are dropped."""
    return tuple(protected_sublayers(find_sublayers(pl_module, name=transformer), protect))
