"""What SublayerDrop does at a drop: it chooses by its method, fits linear maps, and lets the optimizers follow."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from layershed.batches import iterate
from layershed.compensation.fit import LinearMaps, fit_linear_maps, mappable
from layershed.compensation.fold import compensate
from layershed.discovery.find import find_transformer
from layershed.drop import DropMethod, choose
from layershed.errors import SelectionError, StrategyError
from layershed.importance.metrics import DAMAGE_METRICS
from layershed.importance.tracker import ImportanceTracker
from layershed.integration.drop_rule import DropRule
from layershed.integration.loaders import calibration_batches
from layershed.integration.measurements import CalibrateOn, importance_in_a_pass, running_importance
from layershed.integration.namespaces import LightningModule, Trainer
from layershed.integration.strategies import is_sharded
from layershed.planning.plan import DropPlan, ImportanceScores, Sublayer
from layershed.quality import check_head
from layershed.recovery.optimizer_groups import adopt_maps
from layershed.surgery import bypass


@dataclass(frozen=True)
class Chosen:
    """What is to be dropped.

    Args:
        plan: The plan of this round, with its actions.
        maps: The linear maps that it needs.
        scores: The importances that it was chosen by; None for a search or a given plan.
        speedup: The speedup that was measured for a target.
    """

    plan: DropPlan
    maps: LinearMaps
    scores: ImportanceScores | None = None
    speedup: float | None = None


@dataclass(frozen=True)
class DropAction:
    """How SublayerDrop chooses and what runs in place. Arguments are those of SublayerDrop.

    Raises:
        SelectionError: If the method decides without what another argument asks for.
    """

    method: DropMethod
    rule: DropRule
    calibrate_on: CalibrateOn
    batches: int
    transformer: str | None

    def __post_init__(self) -> None:
        searches = self.method.metric in DAMAGE_METRICS
        if searches and (self.rule.target_speedup is not None or self.rule.objective == "speed"):
            raise SelectionError(
                f"metric={self.method.metric!r} with target_speedup or objective='speed': they order importances "
                "that a training pass measures. Give count or ratio, or another metric."
            )

    @property
    def runs_along(self) -> bool:
        """Whether importance is measured in the training passes before the drop."""
        return self.source == "running" and self.rule.plan is None and self.method.metric not in DAMAGE_METRICS

    @property
    def source(self) -> CalibrateOn:
        """The batches that are scored; damage takes passes of its own, over the train loader's first batches."""
        return "train" if self.calibrate_on == "running" and self.method.metric in DAMAGE_METRICS else self.calibrate_on

    @property
    def reads(self) -> CalibrateOn:
        """The loader that is read in passes of its own at the drop; ``running`` if none is."""
        if self.method.replace or self.method.metric in DAMAGE_METRICS:
            return "train" if self.calibrate_on == "running" else self.calibrate_on
        return "running" if self.rule.plan is not None else self.calibrate_on

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse, before training, what this model cannot do.

        Raises:
            StrategyError: If linear maps are wanted under FSDP2.
            SelectionError: If no sublayer can be replaced by a linear map.
            MeasurementError: If damage is to be measured on a model that does not predict the next token.
        """
        transformer = find_transformer(pl_module, name=self.transformer)
        if self.rule.plan is None and self.method.metric in DAMAGE_METRICS:
            check_head(transformer)
        if not self.method.replace:
            return
        if is_sharded(trainer):
            raise StrategyError(f"SublayerDrop(replace={self.method.replace!r}): not under FSDP2. Use DDP.")
        if self.method.replace == "linear" and not mappable(transformer):
            raise SelectionError(
                f"SublayerDrop(replace='linear'): no sublayer of {type(transformer).__name__} can be replaced by a "
                "linear map. Leave replace out."
            )

    def choose(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        tracker: ImportanceTracker | None,
        protect: Collection[Sublayer],
        given: DropPlan | None,
    ) -> Chosen:
        """Choose the sublayers of a round, and fit the maps that run in their place. The model is not changed."""
        if given is None and self.method.metric in DAMAGE_METRICS:
            options: dict[str, Any] = {"count": self.rule.count, "ratio": self.rule.ratio, "protect": protect}
            batches = self._batches(trainer)
            with trainer.precision_plugin.forward_context():
                found = choose(pl_module, batches, self.method, self.rule.scope, name=self.transformer, **options)
            return Chosen(*found)
        scores = None if given is not None else self._scores(trainer, pl_module, tracker)
        plan, speedup = self.rule.choose(trainer, pl_module, scores, protect, given)
        plan = self._with_actions(pl_module, plan)
        maps = LinearMaps()
        if any(drop.action == "linear" for drop in plan.drops):
            with trainer.precision_plugin.forward_context():
                maps = fit_linear_maps(
                    pl_module, self._batches(trainer), plan, rank=self.method.rank, name=self.transformer
                )
        return Chosen(plan, maps, scores, speedup)

    def carry_out(self, trainer: Trainer, pl_module: LightningModule, chosen: Chosen) -> None:
        """Bypass the sublayers, put the maps in their place, and let the optimizers train the maps."""
        if chosen.plan.drops:
            bypass(pl_module, chosen.plan, maps=chosen.maps, name=self.transformer)
            if self.method.replace == "fold":
                with trainer.precision_plugin.forward_context():
                    compensate(pl_module, self._batches(trainer), name=self.transformer)
            adopt_maps(trainer.optimizers, pl_module, find_transformer(pl_module, name=self.transformer))

    def _with_actions(self, pl_module: LightningModule, plan: DropPlan) -> DropPlan:
        if self.method.replace != "linear":
            return plan
        places = set(mappable(pl_module, name=self.transformer))
        return plan.with_action("linear", [s for s in plan if s in places], rank=self.method.rank)

    def _batches(self, trainer: Trainer) -> list[Any]:
        return list(iterate(calibration_batches(trainer, self.reads), self.batches))

    def _scores(
        self, trainer: Trainer, pl_module: LightningModule, tracker: ImportanceTracker | None
    ) -> ImportanceScores:
        if tracker is not None:
            return running_importance(trainer, tracker)
        metric = self.method.metric
        return importance_in_a_pass(trainer, pl_module, self.source, metric, self.batches, self.transformer)
