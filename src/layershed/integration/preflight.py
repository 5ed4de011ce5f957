"""What the callbacks refuse before training: a wrong order, an unreachable step, a metric that comes too late."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from layershed.errors import OptimizerError, ScheduleError
from layershed.integration.lightning_private import (
    checkpoint_interval,
    checks_after_train_epoch,
    saves_after_train_epoch,
)
from layershed.integration.metric_names import DROP, SPEED
from layershed.integration.namespaces import (
    Callback,
    EarlyStopping,
    LightningModule,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Trainer,
    WeightAveraging,
    rank_zero_warn,
)
from layershed.integration.protocols import ActsAtStep, Drops, Placed
from layershed.planning.schedule import DropSchedule
from layershed.surgery import dropped_sublayers

ORDER = "drop, quantize, LoRA, export"
_DROP, _LORA = 1, 3
_AVERAGES = (StochasticWeightAveraging, WeightAveraging)
_WITH_THE_DROP = (DROP, SPEED)


def check_order(trainer: Trainer) -> None:
    """Refuse, before training, callbacks of this package in a wrong order.

    The drop is decided on the original weights. Then come the quantization, the adapters that recover the loss of both,
    and the export.

    Raises:
        ScheduleError: If a callback is listed or acts before one that must come first.
    """
    ours = [(callback, callback.layershed_place) for callback in callbacks_of(trainer) if isinstance(callback, Placed)]
    for (first, place), (second, later) in pairwise(ours):
        if place > later:
            raise ScheduleError(
                f"{_name(first)} is listed before {_name(second)}, but the order is {ORDER}. List {_name(second)} "
                f"before {_name(first)}."
            )
    acting = [callback for callback, place in ours if place <= _LORA]
    steps = [(callback, callback.first_step if isinstance(callback, ActsAtStep) else None) for callback in acting]
    # a callback without a step acts at the drop, or at once if the drop has happened before
    drop = next((step for _, step in steps[:1] if step is not None and ours[0][1] == _DROP), 0)
    due = [(callback, drop if step is None else step) for callback, step in steps]
    for (first, step), (second, then) in pairwise(due):
        if step > then:
            raise ScheduleError(
                f"{_name(second)} acts at step {then}, before {_name(first)} at step {step}, but the order is {ORDER}. "
                f"Set the start of {_name(second)} to step {step} or later."
            )


def is_trial(trainer: Trainer) -> bool:
    """Whether the run only tries the code out, with ``fast_dev_run``."""
    return bool(vars(trainer).get("fast_dev_run"))


def ends_before(trainer: Trainer, callback: Callback, step: int) -> bool:
    """Whether ``fast_dev_run`` ends the run before a callback's step; it then does nothing, after one warning."""
    limit = trainer.estimated_stepping_batches  # sets the train loader up
    if not is_trial(trainer) or step < limit:
        return False
    rank_zero_warn(
        f"{_name(callback)}: fast_dev_run ends after {int(limit)} steps, before step {step}, so the callback does "
        "nothing in this run."
    )
    return True


def check_schedule(trainer: Trainer, callback: Callback, schedule: DropSchedule) -> bool:
    """Refuse a schedule that leaves no training after its last drop; True if ``fast_dev_run`` ends before that drop.

    Raises:
        ScheduleError: If a drop comes too late.
    """
    limit = trainer.estimated_stepping_batches
    if ends_before(trainer, callback, schedule.steps[-1]):
        return True
    schedule.check_against(int(limit) if limit != float("inf") else -1)
    return False


def warn_of_missed(trainer: Trainer, callback: Callback, steps: Iterable[int]) -> None:
    """Warn of a drop that a run, stopped early, never reached; its schedule was checked before training."""
    missed = [step for step in steps if step > trainer.global_step]
    if missed and not is_trial(trainer):
        rank_zero_warn(
            f"{_name(callback)}: the run ended at step {trainer.global_step}, so the drop at step {missed[0]} never "
            "happened."
        )


def check_start(trainer: Trainer, callback: Callback, start: int | None) -> None:
    """Refuse a start step that this run does not reach, or that a resumed run has passed.

    Raises:
        ScheduleError: If the callback would never start.
    """
    if start is None or ends_before(trainer, callback, start):
        return
    limit = trainer.estimated_stepping_batches
    if limit != float("inf") and start >= limit:
        raise ScheduleError(
            f"{_name(callback)}(start={start}): the run ends after {int(limit)} steps, so it would never start. "
            "Set an earlier start, or train longer."
        )
    if start < trainer.global_step:
        raise ScheduleError(
            f"{_name(callback)}(start={start}): the checkpoint at step {trainer.global_step} is past the start, and "
            "the callback has not acted. Set a later start."
        )


def check_optimizers(trainer: Trainer, callback: Callback) -> None:
    """Refuse an optimizer that keeps a list for its parameters elsewhere, such as ZeroRedundancyOptimizer.

    Raises:
        OptimizerError: If the parameters that leave or join the groups would not leave or join that list.
    """
    for optimizer in trainer.optimizers:
        if (name := _own_list(optimizer)) is not None:
            raise OptimizerError(
                f"{_name(callback)}: {_name(optimizer)}.{name} holds a tensor for each parameter outside the "
                "optimizer's state, so it would not follow when parameters leave or join. Keep such tensors in "
                "optimizer.state[parameter], or use a plain torch optimizer."
            )
        lists = {id(group["params"]) for group in optimizer.param_groups}
        for inner in vars(optimizer).values():
            if isinstance(inner, Optimizer) and any(id(group["params"]) not in lists for group in inner.param_groups):
                raise OptimizerError(
                    f"{_name(callback)}: {_name(optimizer)} holds another optimizer ({_name(inner)}) with its own list "
                    "of parameters, so parameters cannot be removed from it. Use a plain torch optimizer."
                )


def _own_list(optimizer: Optimizer) -> str | None:
    """The attribute that holds copies of a group's parameters, one by one, such as the slow weights of Lookahead.

    A second list of the parameters themselves does no harm where they leave: they have no gradient then.
    """
    held = [[p.shape for p in group["params"]] for group in optimizer.param_groups]
    held.append([shape for own in held for shape in own])
    parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, value in vars(optimizer).items():
        if name in ("state", "param_groups", "defaults") or not isinstance(value, list | tuple):
            continue
        for own in (value, *value):
            if not isinstance(own, list | tuple) or not own or not all(isinstance(each, Tensor) for each in own):
                continue
            if [each.shape for each in own] in held and not any(id(each) in parameters for each in own):
                return name
    return None


def refuse_averaging(trainer: Trainer, callback: Callback) -> None:
    """Refuse to change the modules of a model if a weight average holds a copy of it.

    Raises:
        ScheduleError: If weights are averaged, by a callback or by a module inside the LightningModule.
    """
    by_module = any(isinstance(module, AveragedModel) for module in trainer.lightning_module.modules())
    if by_module or any(isinstance(other, _AVERAGES) for other in callbacks_of(trainer)):
        raise ScheduleError(
            f"{_name(callback)}: a weight average (WeightAveraging, EMA, AveragedModel) holds a copy of the "
            "model. The copy would not get the adapters or quantized weights. Leave one of the two out."
        )


def check_averaging(trainer: Trainer, callback: Callback) -> None:
    """Refuse a weight average that is listed after a callback that measures the model at the end of training.

    Raises:
        ScheduleError: If the weights would be replaced after the measurement.
    """
    ours = callbacks_of(trainer)
    for other in ours[ours.index(callback) :]:
        if isinstance(other, _AVERAGES):
            raise ScheduleError(
                f"{_name(callback)}: {_name(other)} is listed after it and replaces the weights at the end of "
                f"training, so drop/loss_end would be that of other weights. List {_name(other)} before it."
            )


def check_monitors(trainer: Trainer, first_step: int) -> None:
    """Refuse, before training, early stopping and checkpoints by a metric that is missing when they first look.

    Args:
        trainer: The Trainer, once its loaders are set up.
        first_step: The step of the first drop.

    Raises:
        ScheduleError: If the metric comes after the first look, or only at the end of training.
    """
    for watcher in callbacks_of(trainer):
        monitor = str(getattr(watcher, "monitor", None))
        if not monitor.startswith(_WITH_THE_DROP) or not _insists(watcher):
            continue
        named = f"{type(watcher).__name__}(monitor={monitor!r})"
        if monitor.endswith("_end"):
            raise ScheduleError(f"{named}: it is measured when training is over. Monitor {monitor[:-4]}_after instead.")
        look = _first_look(trainer, watcher)
        if look < first_step:
            lenient = ", or set strict=False" if isinstance(watcher, EarlyStopping) else ""
            raise ScheduleError(
                f"{named}: it first looks after {look} steps, but the metric comes with the drop, at step "
                f"{first_step}. Let it look later (val_check_interval, every_n_epochs, every_n_train_steps), drop "
                f"sooner{lenient}."
            )


def _insists(watcher: Any) -> bool:
    """Whether the callback fails without its metric."""
    if isinstance(watcher, EarlyStopping):
        return bool(watcher.strict)
    return isinstance(watcher, ModelCheckpoint) and watcher.save_top_k != 0


def _first_look(trainer: Any, watcher: Any) -> float:
    """The optimizer steps before its first look; infinite if unknown or if it never looks."""
    stops = isinstance(watcher, EarlyStopping)
    steps, nth = (0, 1) if stops else checkpoint_interval(watcher)
    if steps:
        return steps
    if not nth or not trainer.lightning_module.automatic_optimization:  # every_n_epochs=0: by the clock
        return math.inf
    if checks_after_train_epoch(watcher) if stops else saves_after_train_epoch(watcher, trainer):
        return _steps(trainer, nth * trainer.num_training_batches)
    if not trainer.enable_validation or trainer.val_check_batch is None:  # None: by the clock
        return math.inf
    return _steps(trainer, _first_validation(trainer, nth))


def _first_validation(trainer: Any, nth: int) -> float:
    """The batches before the first validation in an epoch whose number, from 1, is a multiple of ``nth``."""
    length, interval = trainer.num_training_batches, trainer.val_check_batch
    if trainer.check_val_every_n_epoch is not None:
        epochs = math.lcm(nth, trainer.check_val_every_n_epoch)
        return (length * (epochs - 1) if epochs > 1 else 0) + interval
    # val_check_interval counts across epochs
    if length == math.inf:
        return interval if nth == 1 else math.inf
    ends = (interval * number for number in range(1, length * nth + 1))
    return next(batches for batches in ends if math.ceil(batches / length) % nth == 0)


def _steps(trainer: Any, batches: float) -> float:
    """The optimizer steps of so many batches; an epoch's last batch always takes one, even if it gathers fewer."""
    length, gathered = trainer.num_training_batches, trainer.accumulate_grad_batches
    if length == math.inf:
        return batches if batches == math.inf else batches // gathered
    epochs, rest = divmod(batches, length)
    return int(epochs * math.ceil(length / gathered) + rest // gathered)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The callbacks of a trainer; type checkers do not see the attribute."""
    found: list[Callback] = getattr(trainer, "callbacks", [])
    return found


def waits_for_nothing(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether nothing is dropped and no SublayerDrop is listed."""
    drops = any(isinstance(callback, Drops) for callback in callbacks_of(trainer))
    return not drops and not dropped_sublayers(pl_module)


def _name(callback: object) -> str:
    return type(callback).__name__
