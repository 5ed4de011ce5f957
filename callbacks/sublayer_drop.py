"""Drops sublayers by importance while a model trains, one-shot or iteratively."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from layershed.discovery.find import find_transformer
from layershed.errors import SelectionError, UnknownNameError
from layershed.importance.metrics import get_metric
from layershed.importance.tracker import ImportanceTracker
from layershed.integration.drop_rule import DropRule, resolve_protected
from layershed.integration.fsdp_checkpoints import give_back_strategy, reshard
from layershed.integration.measurements import (
    check_batches,
    drop_metrics,
    importance_in_a_pass,
    quality_metrics,
    validation_quality,
)
from layershed.integration.module_hooks import carry_structure, leave_structure
from layershed.integration.preflight import check_averaging, check_monitors, check_order
from layershed.integration.rng import of_every_rank
from layershed.integration.run import (
    StepCounter,
    Sums,
    current_drop,
    own_share,
    publish,
    rewrap,
    run_directory,
    show,
    write_text,
)
from layershed.integration.strategies import fit_strategy, refuse_sharded_speed
from layershed.performance.speedup_target import DEFAULT_SETTINGS
from layershed.performance.stopwatch import Phase, SpeedSettings
from layershed.planning.plan import DropPlan, ImportanceScores, Scope, Sublayer
from layershed.planning.schedule import DropSchedule
from layershed.planning.selection import Objective
from layershed.quality import Quality
from layershed.recovery.optimizer_groups import forget_parameters
from layershed.saving.lora_folder import PLAN_FILE
from layershed.surgery import bypass

CalibrateOn = Literal["running", "train", "val"]


class SublayerDrop(Callback):
    """Bypasses the least important sublayers at configured optimizer steps, and training goes on without them.

    How many go is a number, a share, or what a measured speedup takes: then it drops, measures, and stops as soon as
    the target is reached. One per Trainer: a second one would write the same files and names.

    Hooks: decides in ``on_train_batch_end``, once the configured optimizer step is done; the optimizer forgets the
    dropped parameters in place, so that its schedule goes on.
    Logs: ``drop/loss_before``, ``drop/loss_after`` and ``drop/loss_end`` (and ``accuracy``) on validation batches;
    ``drop/attention`` and ``drop/mlp``, the numbers dropped; with a target, ``drop/speedup``, what was reached.
    Writes: ``drop_plan.json`` in the run directory.
    Checkpoint: the plan and the running sums of every rank. What is bypassed is noted by the module's own hooks, which
    this callback extends, so that also a checkpoint of the weights alone is the dropped model when it is resumed,
    validated, tested or used to predict, with this callback in the Trainer; without it, loading stops with a sentence,
    unless it is not strict.

    Args:
        start: Optimizer steps before the first drop.
        scope: ``attention``, ``mlp``, ``block`` or ``joint`` (attention and MLP ranked in one array).
        count: How many to drop at each drop step: blocks with scope ``block``, else sublayers. Give this, ratio or
            target_speedup.
        ratio: Share of the candidates to drop, in (0, 1); one-shot only. Give this, count or target_speedup.
        every_n_steps: Steps between the rounds of an iterative schedule; None for one-shot.
        rounds: Number of rounds of an iterative schedule; importance is measured anew for each.
        metric: ``cosine``, ``relative_magnitude`` or ``angular``.
        protect: Indices of blocks that stay whole; negative ones count from the end.
        calibrate_on: Where importance is measured: ``running``, on the training batches of the last steps before the
            drop, without an extra forward pass; ``train`` or ``val``, in a pass over that loader's batches.
        calibration_batches: How many batches (optimizer steps, if ``running``) are scored; a batch in which several
            optimizers step by hand is scored as a whole.
        quality_batches: Validation batches on which loss and accuracy are measured around the drop; 0 for none.
        transformer: Path of the transformer in the LightningModule; needed only where it holds more than one.
        target_speedup: Dropped over dense, such as 1.3: as few go as give it, and each round of an iterative schedule
            goes an equal part of the way. Give this, count or ratio.
        phase: Whose time counts, for the target and for objective ``speed``: ``decode`` or ``prefill``.
        objective: What goes first: ``importance``, the least important; ``speed``, what costs least importance per
            millisecond saved.
        speed: How speed is measured for target and objective: prompt_tokens, new_tokens, batch_size, runs, warmup.

    Raises:
        CalibrationError: At the drop, if an importance was NaN or infinite in every pass that was to count; if in some,
            they are left out with a warning.
        SelectionError: If not exactly one of count, ratio and target_speedup is given, or it is out of range; before
            training also if there are too few sublayers.
        SpeedupError: If the target is out of reach: before training, if dropping every candidate does not give it; else
            at the drop.
        MeasurementError: Before training, if speed is needed and cannot be measured.
        ScheduleError: If the schedule has no meaning; before training also if its last drop comes too late, a callback
            monitors a metric of the drop before it, or weights are averaged after this callback.
        UnknownNameError: If there is no such metric, phase or objective, or nothing like that to calibrate on.
        StrategyError: Before training, if the Trainer's strategy does not let the model change.
    """

    place = 1  # in the order drop, quantize, LoRA, export

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
    ) -> None:
        self.schedule = DropSchedule(start, every_n_steps, rounds)
        self.rule = DropRule(
            self.schedule, scope, count, ratio, target_speedup, phase, objective, speed, transformer=transformer
        )
        if calibration_batches < 1 or quality_batches < 0:
            raise SelectionError(
                f"calibration_batches={calibration_batches}, quality_batches={quality_batches}: at least one batch is "
                "needed to calibrate, and not fewer than none for quality."
            )
        if calibrate_on not in get_args(CalibrateOn):
            raise UnknownNameError("source of calibration batches", calibrate_on, get_args(CalibrateOn))
        get_metric(metric)
        self.metric = metric
        self.protect = tuple(protect)
        self._protected: tuple[Sublayer, ...] = ()  # what that means on the model of this run
        self.calibrate_on = calibrate_on
        self.calibration_batches, self.quality_batches = calibration_batches, quality_batches
        self.transformer = transformer
        self.plan: DropPlan | None = None
        self.quality: dict[str, Quality] = {}
        self.speedup: float | None = None
        self._steps = StepCounter()
        self._trainer: Trainer | None = None
        self._tracker: ImportanceTracker | None = None
        self._sums: list[Sums] | None = None
        self._stride: int | None = None

    @property
    def first_step(self) -> int:
        """The step of the first drop."""
        return self.schedule.steps[0]

    def should_drop(self, step: int) -> bool:
        """Whether to drop after ``step`` optimizer steps; override it for another schedule."""
        return self.schedule.should_drop(step)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the module's own checkpoint hooks carry the drop, and begin anew unless the module is still dropped."""
        fit_strategy(trainer, self, pl_module, self.transformer)
        carry_structure(pl_module, self.transformer)
        if stage == "fit":  # of a resumed run the checkpoint's state comes later
            self._sums, self._stride = None, None
            held = set() if self.plan is None else set(self.plan)
            if not held or not held <= set(current_drop(pl_module)):
                self.plan, self.quality, self.speedup = None, {}, None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the strategy its methods back, and a dense module its hooks; a dropped one may still be saved."""
        give_back_strategy(trainer)
        leave_structure(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what this model cannot do, and prepare the optimizers of a resumed run."""
        self._trainer = trainer
        check_order(trainer)
        check_averaging(trainer, self)
        if self.rule.measures_speed:
            refuse_sharded_speed(trainer, "SublayerDrop(target_speedup=..., objective='speed')")
        self._protected = resolve_protected(pl_module, self.protect, self.transformer)
        self.rule.check(pl_module, self._protected)
        forget_parameters(trainer.optimizers, find_transformer(pl_module, name=self.transformer))
        if self.calibrate_on == "running":
            self._tracker = ImportanceTracker(pl_module, self.metric, name=self.transformer)
            self._tracker.attach()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what this run cannot do, and take up the plan and the running sums of a resumed one."""
        # not sooner: both set up the train loader, which then would never be told where a resumed run stood
        limit = trainer.estimated_stepping_batches
        self.schedule.check_against(int(limit) if limit != float("inf") else -1)
        check_batches(trainer, pl_module, self.calibrate_on, self.quality_batches, self.transformer)
        # a guess before the first batch: in manual optimization every optimizer may step
        several = 1 if pl_module.automatic_optimization else len(trainer.optimizers)
        self._steps.start(trainer, self._stride or several)
        if self._sums is not None and self._tracker is not None:
            self._tracker.load_state_dict(own_share(trainer, self._sums))
        self._sums = None
        if self.plan is None:
            check_monitors(trainer, self.first_step)
            self.rule.check_reachable(trainer, pl_module, self._protected)
        else:
            show(trainer, {**drop_metrics(pl_module, self.speedup), **quality_metrics(self.quality)})
        self._save_plan(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch this batch if it falls into the last steps before a drop."""
        if self._tracker is not None:
            coming = self._steps.coming(trainer)
            ahead = range(coming.start, coming.stop - 1 + self.calibration_batches)
            if any(self.should_drop(step) for step in ahead):
                self._tracker.start()
            else:
                self._tracker.stop()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Stop watching: the passes that other callbacks make at the end of a batch are not the training step's."""
        if self._tracker is not None and pl_module.automatic_optimization:
            self._tracker.stop()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Drop, if the optimizer step that just ended is a drop step."""
        if self._tracker is not None:
            self._tracker.stop()
        if any(self.should_drop(step) for step in self._steps.taken(trainer)):
            self._drop(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what the recovery was worth; say so if the run ended before a drop."""
        missed = [step for step in self.schedule.steps if step > trainer.global_step and self.should_drop(step)]
        if missed:  # stopped early: what was known before training was checked then
            rank_zero_warn(
                f"SublayerDrop: the run ended at step {trainer.global_step}, so that the drop at step {missed[0]} "
                "never happened."
            )
        if self.plan is not None:
            self._measure(trainer, pl_module, "end")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the hooks off the model."""
        if self._tracker is not None:
            self._tracker.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """After an error, too, take the hooks off the model and give the strategy its methods back."""
        self.on_fit_end(trainer, pl_module)
        give_back_strategy(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Plan, qualities and running sums, as primitives."""
        tracker, trainer = self._tracker, self._trainer
        return {
            "plan": None if self.plan is None else self.plan.to_dict(),
            "quality": {when: [q.loss, q.accuracy, q.tokens] for when, q in self.quality.items()},
            "speedup": self.speedup,
            "stride": self._steps.stride,
            "sums": None if tracker is None or trainer is None else of_every_rank(tracker.state_dict(), trainer),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.plan = None if state_dict["plan"] is None else DropPlan.from_dict(state_dict["plan"])
        self.quality = {when: Quality(*values) for when, values in state_dict["quality"].items()}
        self.speedup = state_dict["speedup"]
        self._sums, self._stride = state_dict["sums"], state_dict["stride"]

    def _drop(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.plan is None:
            self._measure(trainer, pl_module, "before")
        scores = self._scores(trainer, pl_module)
        chosen, self.speedup = self.rule.choose(trainer, pl_module, scores, self._protected)
        round_plan = chosen.at_step(trainer.global_step)
        reshard(pl_module)
        if round_plan.drops:
            bypass(pl_module, round_plan, name=self.transformer)
        self.plan = round_plan if self.plan is None else self.plan + round_plan
        forget_parameters(trainer.optimizers, find_transformer(pl_module, name=self.transformer))
        rewrap(trainer, pl_module)
        self._save_plan(trainer)
        publish(trainer, drop_metrics(pl_module, self.speedup))
        if round_plan.drops:  # else an earlier round made it as fast as this one asks
            self._measure(trainer, pl_module, "after")

    def _scores(self, trainer: Trainer, pl_module: LightningModule) -> ImportanceScores:
        if self._tracker is not None:
            scores = self._tracker.compute()
            if self._tracker.skipped:
                rank_zero_warn(f"SublayerDrop, step {trainer.global_step}: {self._tracker.skipped}.")
            self._tracker.reset()
            return scores
        return importance_in_a_pass(
            trainer, pl_module, self.calibrate_on, self.metric, self.calibration_batches, self.transformer
        )

    def _measure(self, trainer: Trainer, pl_module: LightningModule, when: str) -> None:
        quality = validation_quality(trainer, pl_module, self.quality_batches, self.transformer)
        if quality is not None:
            self.quality[when] = quality
            publish(trainer, quality_metrics({when: quality}))

    def _save_plan(self, trainer: Trainer) -> None:
        folder = run_directory(trainer)
        if self.plan is not None and trainer.is_global_zero:
            write_text(folder / PLAN_FILE, self.plan.to_json())
