"""Drops sublayers by importance during training, one-shot or iteratively."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from layershed.discovery.find import find_transformer
from layershed.discovery.model_record import kept_model_record
from layershed.drop import MethodName, Replacement, Search, method_of
from layershed.importance.tracker import ImportanceTracker
from layershed.integration.drop_action import DropAction
from layershed.integration.drop_rule import DropRule, resolve_protected
from layershed.integration.fsdp_checkpoints import give_back_strategy, reshard
from layershed.integration.measurements import (
    CalibrateOn,
    check_batches,
    check_calibration,
    drop_metrics,
    qualities_from,
    qualities_state,
    quality_metrics,
    validation_quality,
)
from layershed.integration.module_hooks import carry_structure, follow_training, leave_structure
from layershed.integration.namespaces import Callback, LightningModule, Trainer
from layershed.integration.preflight import (
    check_averaging,
    check_monitors,
    check_optimizers,
    check_order,
    check_schedule,
    warn_of_missed,
)
from layershed.integration.rng import of_every_rank
from layershed.integration.run import StepCounter, Sums, current_drop, own_share, publish, rewrap, save_plan, show
from layershed.integration.strategies import fit_strategy, refuse_sharded_speed
from layershed.integration.telling import drop_line, say
from layershed.integration.watching import Watcher
from layershed.performance.speedup_target import DEFAULT_SETTINGS
from layershed.performance.stopwatch import Phase, SpeedSettings
from layershed.planning.arguments import as_protected
from layershed.planning.plan import DropPlan, Scope, Sublayer
from layershed.planning.schedule import DropSchedule
from layershed.planning.selection import Objective
from layershed.quality import AnyQuality, RoundQuality
from layershed.recovery.frozen import StaysFrozen
from layershed.stand_ins.carried import dropped_parameters


class SublayerDrop(Callback):
    """Bypasses the least important sublayers at configured optimizer steps. Training continues without them.

    A count, a ratio, a target speedup or a given plan sets what it drops. For a target speedup it drops and measures
    until the target is reached. Use one per Trainer: a second one would write the same files and metrics.

    Hooks: decides in ``on_train_batch_end``, after the configured optimizer step. The optimizer removes the dropped
    parameters in place, so the learning-rate schedule continues. Dropped parameters that others unfreeze are frozen and
    removed again before the next step and before a checkpoint.
    Logs: ``drop/loss_before`` and ``drop/loss_after`` of every round, and ``drop/loss_end``, on validation batches (and
    ``accuracy`` or ``quality``); ``drop/attention`` and ``drop/mlp``, the numbers dropped; with a target,
    ``drop/speedup``.
    Prints: one line for each round, with the sublayers and the quality before and after.
    Writes: ``drop_plan.json`` in the run directory.
    Checkpoint: the plan, the qualities of every round and the running sums of every rank. The module's own hooks, which
    this callback extends, save which sublayers are bypassed, also in a checkpoint of the weights alone. A Trainer with
    this callback resumes, validates, tests and predicts with the dropped model. Without it, strict loading fails with
    an error that names ``ls.load_checkpoint``.

    Args:
        start: Optimizer steps before the first drop.
        scope: ``attention``, ``mlp``, ``block`` or ``joint`` (attention and MLP ranked in one array).
        count: Number to drop at each drop step: blocks with scope ``block``, else sublayers. Give exactly one of
            count, ratio, target_speedup and plan.
        ratio: Share of the candidates to drop, in (0, 1); one-shot only.
        every_n_steps: Steps between the rounds of an iterative schedule; None for one-shot.
        rounds: Number of rounds of an iterative schedule; importance is measured anew for each.
        metric: ``cosine``, ``relative_magnitude`` or ``angular``; or ``kl`` or ``loss``, the damage without a sublayer,
            in passes over the first batches of the train loader, or of the val loader, at the drop.
        protect: Indices of blocks that stay whole; negative ones count from the end.
        calibrate_on: Batches on which importance is measured: ``running``, the training batches of the last steps
            before the drop, without an extra forward pass; ``train`` or ``val``, a pass over that loader's batches.
        calibration_batches: Number of scored and fitted batches, or of optimizer steps scored if ``running``.
        quality_batches: Validation batches on which the quality is measured around the drop; 0 for none. It is the
            next-token loss and accuracy of a causal language model that can read the batches. Of any other model it is
            the loss of the module's ``validation_step``, in a pass of its own that logs nothing.
        transformer: Path of the transformer in the LightningModule; needed only if it holds several.
        target_speedup: Target of dropped speed over dense speed, such as 1.3. It is reached with as few drops as
            possible. Each round of an iterative schedule covers an equal part of the way.
        phase: The phase whose time counts, for the target and for objective ``speed``: ``decode`` or ``prefill``.
        objective: The order of the drops: ``importance`` drops the least important first; ``speed`` drops those first
            that cost least importance per millisecond saved.
        speed: Settings of the speed measurement: prompt_tokens, new_tokens, batch_size, runs, warmup.
        quality: A metric that the module logs in validation, such as ``val_f1``, to measure beside its loss.
        plan: Path of a drop plan, such as the ``drop_plan.json`` of another run. It is dropped at ``start``, and no
            importance is measured. Options that would choose otherwise are refused.
        search: ``one-shot``, or ``greedy``: one after the other, by the damage of the set.
        replace: ``linear``: a linear map of its norm's output, fitted at the drop, runs in place of a sublayer and
            trains on; ``fold``: the weights of the sublayers behind it change to make up for it; None: neither.
        rank: Rank of the maps; None for full matrices.
        method: ``paper`` or ``best``, which set metric, search and replace; see docs/quality.md.

    Raises:
        PlanError: Before training, if the given plan cannot be read, or is for another model.
        CalibrationError: At the drop, if every pass had a NaN or infinite importance; some are left out with a warning.
        SelectionError: If not exactly one of count, ratio, target_speedup and plan is given, it is out of range, or an
            option contradicts the plan; before training, if there are too few sublayers.
        SpeedupError: If the target is out of reach; before training, if dropping every candidate does not reach it.
        MeasurementError: Before training, if speed is needed and cannot be measured.
        ScheduleError: If the schedule is invalid; before training, if its last drop comes too late, a callback monitors
            a metric of the drop before the drop, or a weight average is listed after this callback.
        UnknownNameError: If metric, phase, objective or calibrate_on is unknown.
        StrategyError: Before training, if the model cannot change under the Trainer's strategy.
        OptimizerError: Before training, if parameters cannot be removed from an optimizer.
    """

    layershed_place = 1  # in the order drop, quantize, LoRA, export

    def __init__(
        self,
        start: int,
        scope: Scope = "joint",
        count: int | None = None,
        ratio: float | None = None,
        every_n_steps: int | None = None,
        rounds: int = 1,
        metric: str = "cosine",
        protect: Sequence[int] = (),
        calibrate_on: CalibrateOn = "running",
        calibration_batches: int = 16,
        quality_batches: int = 16,
        transformer: str | None = None,
        target_speedup: float | None = None,
        phase: Phase = "decode",
        objective: Objective = "importance",
        speed: SpeedSettings = DEFAULT_SETTINGS,
        quality: str | None = None,
        plan: str | Path | None = None,
        search: Search = "one-shot",
        replace: Replacement | None = None,
        rank: int | None = None,
        method: MethodName | None = None,
    ) -> None:
        self.schedule = DropSchedule(start, every_n_steps, rounds)
        self.rule = DropRule(
            self.schedule, scope, count, ratio, target_speedup, phase, objective, speed, transformer, plan
        )
        check_calibration(calibrate_on, calibration_batches, quality_batches, plan)
        self.method = method_of(method, metric, search, replace, rank)
        self.action = DropAction(self.method, self.rule, calibrate_on, calibration_batches, transformer)
        self.metric, self.protect = self.method.metric, as_protected(protect)
        self._protected: tuple[Sublayer, ...] = ()  # the sublayers of ``protect`` in this run's model
        self.calibrate_on, self.transformer = calibrate_on, transformer
        self.calibration_batches, self.quality_batches = calibration_batches, quality_batches
        self.plan: DropPlan | None = None
        self._given: DropPlan | None = None  # read from the file of ``plan``
        self.quality_metric = quality
        self.quality: dict[str, AnyQuality] = {}  # around the last round, and at the end
        self.rounds: list[RoundQuality] = []
        self.scored: list[tuple[int, str, float]] = []  # block, kind and importance at the last round
        self.speedup: float | None = None
        self._watcher, self._steps, self._frozen = Watcher("SublayerDrop"), StepCounter(), StaysFrozen()
        self._trainer: Trainer | None = None
        self._tracker: ImportanceTracker | None = None
        self._sums: list[Sums] | None = None
        self._stride: int | None = None

    @property
    def first_step(self) -> int:
        """The step of the first drop."""
        return self.schedule.steps[0]

    @property
    def places_maps(self) -> bool:
        """Whether linear maps run in place of what it drops."""
        return self.method.replace == "linear"

    def should_drop(self, step: int) -> bool:
        """Whether to drop after ``step`` optimizer steps; override it for another schedule."""
        return self.schedule.should_drop(step)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the module's checkpoint hooks save the drop; begin anew unless the module is still dropped."""
        fit_strategy(trainer, self, pl_module, self.transformer)
        carry_structure(pl_module, self.transformer)
        if stage == "fit":  # a resumed run loads the checkpoint's state later
            self._watcher.forget()
            self._sums, self._stride = None, None
            held = set() if self.plan is None else set(self.plan)
            if not held or not held <= set(current_drop(pl_module)):
                self.plan, self.quality, self.rounds, self.scored, self.speedup = None, {}, [], [], None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the strategy's methods, and the hooks of a dense module; a dropped one may still be saved."""
        give_back_strategy(trainer)
        leave_structure(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what this model cannot do, and prepare the optimizers of a resumed run."""
        self._trainer = trainer
        check_order(trainer)
        check_averaging(trainer, self)
        check_optimizers(trainer, self)
        if self.rule.measures_speed:
            refuse_sharded_speed(trainer, "SublayerDrop(target_speedup=..., objective='speed')")
        self.action.check(trainer, pl_module)
        self._protected = resolve_protected(pl_module, self.protect, self.transformer)
        self.rule.check(pl_module, self._protected)
        if self.plan is None:
            self._given = self.rule.given_plan(pl_module, self._protected, self.metric)
        follow_training(trainer, pl_module)
        self._hold(pl_module)
        if self.action.runs_along:
            self._tracker = ImportanceTracker(pl_module, self.metric, name=self.transformer, strict=False)
            self._tracker.attach()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what this run cannot do, and restore the plan and the running sums of a resumed run."""
        # not sooner: both set up the train loader, which then would not get its position in a resumed run
        tried_out = check_schedule(trainer, self, self.schedule)
        check_batches(trainer, pl_module, self.action.reads, self.transformer)
        # a guess before the first batch: in manual optimization every optimizer may step
        several = 1 if pl_module.automatic_optimization else len(trainer.optimizers)
        self._steps.start(trainer, self._stride or several)
        if self._sums is not None and self._tracker is not None:
            self._tracker.load_state_dict(own_share(trainer, self._sums))
        self._sums = None
        if self.plan is None and not tried_out:
            check_monitors(trainer, self.first_step)
            self.rule.check_reachable(trainer, pl_module, self._protected)
        if self.plan is not None:
            show(trainer, {**drop_metrics(pl_module, self.speedup), **quality_metrics(self.quality)})
        save_plan(trainer, self.plan)
        self._hold(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Score this batch if it is within the last steps before a drop."""
        self.refreeze()
        if self._tracker is not None:
            coming = self._steps.coming(trainer)
            ahead = range(coming.start, coming.stop - 1 + self.calibration_batches)
            if any(self.should_drop(step) for step in ahead):
                self._tracker.start()
            else:
                self._tracker.stop()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Stop scoring: forward passes of other callbacks at the end of a batch must not count."""
        if self._tracker is not None and pl_module.automatic_optimization:
            self._tracker.stop()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Keep dropped parameters out of the optimizers, whatever has unfrozen them."""
        self.refreeze()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Drop if the optimizer step that just ended is a drop step."""
        if self._tracker is not None:
            self._tracker.stop()
        if any(self.should_drop(step) for step in self._steps.taken(trainer)):
            self._drop(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the quality at the end; warn if the run ended before a drop."""
        warn_of_missed(trainer, self, filter(self.should_drop, self.schedule.steps))
        if self.plan is not None:
            self._note(trainer, "end", self._quality_now(trainer, pl_module))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the hooks off the model."""
        if self._tracker is not None:
            self._tracker.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks off the model and restore the strategy's methods, after an error too."""
        self.on_fit_end(trainer, pl_module)
        self.teardown(trainer, pl_module, "")

    def state_dict(self) -> dict[str, Any]:
        """The plan, the qualities and the running sums, as primitives."""
        tracker, trainer = self._tracker, self._trainer
        self.refreeze()
        return {
            "plan": None if self.plan is None else self.plan.to_dict(),
            **qualities_state(self.quality, self.rounds),
            "scored": [list(row) for row in self.scored],
            "speedup": self.speedup,
            "stride": self._steps.stride,
            "sums": None if tracker is None or trainer is None else of_every_rank(tracker.state_dict(), trainer),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.plan = None if state_dict["plan"] is None else DropPlan.from_dict(state_dict["plan"])
        self.quality, self.rounds = qualities_from(state_dict)
        self.scored = [(block, kind, score) for block, kind, score in state_dict.get("scored", [])]
        self.speedup = state_dict["speedup"]
        self._sums, self._stride = state_dict["sums"], state_dict["stride"]

    def _drop(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = self._quality_now(trainer, pl_module)
        chosen = self.action.choose(trainer, pl_module, self._tracker, self._protected, self._given)
        self.scored = [] if chosen.scores is None else list(chosen.scores.rows())
        self.speedup, round_plan = chosen.speedup, chosen.plan.at_step(trainer.global_step)
        reshard(pl_module)
        self.action.carry_out(trainer, pl_module, chosen)
        record = kept_model_record(find_transformer(pl_module, name=self.transformer)) or round_plan.model
        earlier = () if self.plan is None else self.plan.drops
        self.plan = dataclasses.replace(round_plan, drops=(*earlier, *round_plan.drops), model=record)
        self._hold(pl_module)
        rewrap(trainer, pl_module)
        save_plan(trainer, self.plan)
        publish(trainer, drop_metrics(pl_module, self.speedup))
        after = None
        if round_plan.drops:  # else an earlier round already reached this round's target
            self._note(trainer, "before", before)
            after = self._note(trainer, "after", self._quality_now(trainer, pl_module))
            self.rounds.append(RoundQuality(trainer.global_step, before, after))
        say(trainer, drop_line(trainer.global_step, round_plan, before, after))

    def _quality_now(self, trainer: Trainer, pl_module: LightningModule) -> AnyQuality | None:
        wanted = self.quality_batches, self.quality_metric, self.transformer
        quality = validation_quality(trainer, pl_module, *wanted, self._watcher)
        reshard(pl_module)
        return quality

    def _note(self, trainer: Trainer, when: str, quality: AnyQuality | None) -> AnyQuality | None:
        if quality is not None:
            self.quality[when] = quality
            publish(trainer, quality_metrics({when: quality}))
        return quality

    def _hold(self, pl_module: LightningModule) -> None:
        """Keep the parameters that are dropped now frozen and out of the optimizers."""
        reshard(pl_module)
        self._frozen.hold(find_transformer(pl_module, name=self.transformer), dropped_parameters)
        self.refreeze()

    def refreeze(self) -> None:
        """Freeze again what others unfroze, and keep it out of the optimizers."""
        if self._trainer is not None:
            self._frozen.enforce(self._trainer.optimizers)
