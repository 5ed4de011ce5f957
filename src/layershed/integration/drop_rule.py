"""The rule by which SublayerDrop chooses: a count, a ratio, or as many as a measured speedup needs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass

from layershed.discovery.find import find_sublayers, find_transformer
from layershed.discovery.uneven import warn_left_alone
from layershed.errors import SelectionError
from layershed.integration.namespaces import LightningModule, Trainer
from layershed.performance.latency import measure_latency
from layershed.performance.speedup_target import check_choice, check_reachable, drop_to_speedup, phase_of
from layershed.performance.stopwatch import Phase, SpeedSettings
from layershed.planning.plan import DropPlan, ImportanceScores, Scope, Sublayer
from layershed.planning.schedule import DropSchedule
from layershed.planning.selection import Objective, equal_scores, protected_sublayers, rank_sublayers, select_sublayers


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

    def __post_init__(self) -> None:
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

    @property
    def measures_speed(self) -> bool:
        """Whether the rule depends on measured time."""
        return self.target_speedup is not None or self.objective == "speed"

    def check(self, pl_module: LightningModule, protect: Collection[Sublayer | int]) -> None:
        """Refuse what this model cannot do, without running it.

        Raises:
            SelectionError: If it has too few sublayers.
            MeasurementError: If its speed is needed and cannot be measured.
        """
        equal = equal_scores(find_sublayers(pl_module, name=self.transformer))
        warn_left_alone(pl_module, name=self.transformer)
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
        scores: ImportanceScores,
        protect: Collection[Sublayer | int],
    ) -> tuple[DropPlan, float | None]:
        """The drop of this step, the same on every rank; with a target, also its measured speedup, else None.

        Every round of an iterative schedule covers an equal part of the way to the target.

        Raises:
            SpeedupError: If dropping every candidate does not reach the target.
        """
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
        return plan, phase_of(report, self.phase).speedup.median

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
