"""What the callbacks that change a model agree on: their order, and that every checkpoint says what they did."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn

from layershed.discovery.find import find_transformer
from layershed.errors import LayershedError, ScheduleError, StrategyError
from layershed.integration.metrics_csv import note_rows, take_up_rows
from layershed.integration.pending_work import note_progress, prepare_resumption, take_up_progress
from layershed.integration.strategies import is_sharded
from layershed.planning.schedule import DropSchedule
from layershed.saving.checkpoint import CHECKPOINT_KEY, apply_structure, has_structure, write_structure
from layershed.surgery import dropped_sublayers

ORDER = "drop, quantize, LoRA, recover, export"
_DROP, _LORA = 1, 3
_BY_HAND_KEY = "layershed_by_hand"
_AVERAGES = (WeightAveraging, StochasticWeightAveraging)


def carry_structure(pl_module: LightningModule, transformer: str | None) -> None:
    """Have the module's own checkpoint hooks carry what is dropped, quantized and adapted.

    The hooks of callbacks would not do: Lightning asks none of them for a checkpoint of the weights alone.
    """
    before = _hook_of(pl_module)
    named = None if before is None else before.transformer
    _install(pl_module, transformer or named, changes=True)


def carry_progress(pl_module: LightningModule, transformer: str | None = None) -> None:
    """Have them carry how far the run has come, for a callback that only watches.

    A structure that somebody gave the model by hand goes into the checkpoint and comes back from it; any other
    checkpoint leaves the model as it is, and the mark in that of a drop stops a run without SublayerDrop, whose
    optimizers would not fit. Beside a callback that changes the model it adds nothing.
    """
    before = _hook_of(pl_module)
    named = None if before is None else before.transformer
    _install(pl_module, named or transformer, changes=before is not None and before.changes)


def refuse_shards_changed_by_hand(trainer: Trainer, pl_module: LightningModule, callback: Callback) -> None:
    """Refuse, before training, that a structure given by hand goes into shards where every callback only watches.

    Only those that change a model have FSDP2 write the weights of dropped sublayers under names of their own.

    Raises:
        StrategyError: If whoever loads the shards would evaluate the dense model, and not be told.
    """
    hook = _hook_of(pl_module)
    if hook is None or hook.changes or not is_sharded(trainer):
        return
    transformer = hook.watched()
    if transformer is not None and has_structure(transformer):
        raise StrategyError(
            f"{_name(callback)}: the model was bypassed, quantized or adapted by hand, and a Trainer would take its "
            "checkpoints under ModelParallelStrategy for those of the dense model; list SublayerDrop instead of "
            "bypassing by hand, or use another strategy, such as DDPStrategy."
        )


def leave_structure(pl_module: LightningModule) -> None:
    """Give a module in its original state its hooks back; a changed one may still be saved."""
    hook = _hook_of(pl_module)
    if hook is not None and not has_structure(pl_module, name=hook.transformer):
        _release(pl_module)


def check_order(trainer: Trainer) -> None:
    """Refuse, before training, callbacks of this package in an order that loses more than it need.

    A drop decided on the model as it is, then the quantization, then adapters that learn to make up for both; whatever
    is saved comes last.

    Raises:
        ScheduleError: If one is listed before, or acts before, one that must come first.
    """
    ours = [(callback, callback.place) for callback in callbacks_of(trainer) if hasattr(callback, "place")]
    for (first, place), (second, later) in pairwise(ours):
        if place > later:
            raise ScheduleError(
                f"The order is {ORDER}: list {_name(second)} before {_name(first)} among the callbacks."
            )
    steps = [(callback, getattr(callback, "first_step", None)) for callback, place in ours if place <= _LORA]
    # none of their own: at the drop, or at once if that has happened before
    drop = next((step for _, step in steps[:1] if step is not None and ours[0][1] == _DROP), 0)
    acting = [(callback, drop if step is None else step) for callback, step in steps]
    for (first, step), (second, then) in pairwise(acting):
        if step > then:
            raise ScheduleError(
                f"The order is {ORDER}: {_name(second)} acts at step {then}, before {_name(first)} at step {step}; "
                "give it the same step or a later one."
            )


def check_start(trainer: Trainer, callback: Callback, start: int | None) -> None:
    """Refuse a step that this run does not reach, or that a resumed run has passed.

    Raises:
        ScheduleError: If what is to happen then would never happen.
    """
    if start is None:
        return
    limit = trainer.estimated_stepping_batches  # sets the train loader up
    if limit != float("inf") and start >= limit:
        raise ScheduleError(
            f"{_name(callback)}(start={start}): the run ends after {int(limit)} steps, so that it would never happen; "
            "let it start before."
        )
    if start < trainer.global_step:
        raise ScheduleError(
            f"{_name(callback)}(start={start}): the checkpoint stands at step {trainer.global_step} and has passed it "
            "without; let it start later."
        )


def refuse_averaging(trainer: Trainer, callback: Callback) -> None:
    """Refuse to change the modules of a model of which somebody else holds a copy.

    Raises:
        ScheduleError: If weights are averaged.
    """
    if any(isinstance(other, _AVERAGES) for other in callbacks_of(trainer)):
        raise ScheduleError(
            f"{_name(callback)}: a weight average (WeightAveraging, EMA) holds a copy of the model, which would not "
            "get its adapters or quantized weights; leave one of the two out."
        )


def check_averaging(trainer: Trainer, callback: Callback) -> None:
    """Refuse a weight average behind a callback that measures the model when training is over.

    Raises:
        ScheduleError: If the weights would be replaced right after.
    """
    ours = callbacks_of(trainer)
    for other in ours[ours.index(callback) :]:
        if isinstance(other, _AVERAGES):
            raise ScheduleError(
                f"{_name(callback)}: {_name(other)} puts the averaged weights in when training is over, and behind it "
                "in the list drop/loss_end would be that of others; list it before."
            )


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The callbacks of a trainer, which sets them in a way that type checkers do not see."""
    found: list[Callback] = getattr(trainer, "callbacks", [])
    return found


def waits_for_nothing(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether nothing is dropped, and no SublayerDrop is there to drop anything."""
    schedules = (getattr(callback, "schedule", None) for callback in callbacks_of(trainer))
    return not any(isinstance(schedule, DropSchedule) for schedule in schedules) and not dropped_sublayers(pl_module)


def _name(callback: Callback) -> str:
    return type(callback).__name__


class _Hook:
    """One of a module's own checkpoint hooks, and the structure with it."""

    NAMES = ("on_save_checkpoint", "on_load_checkpoint")

    def __init__(self, pl_module: LightningModule, name: str, transformer: str | None, changes: bool) -> None:
        self.pl_module, self.name, self.transformer, self.changes = pl_module, name, transformer, changes
        self.own, self.owned = getattr(pl_module, name), name in vars(pl_module)

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        self.own(checkpoint)
        if self.name == "on_save_checkpoint":
            self._write(checkpoint)
        elif self.changes or _BY_HAND_KEY in checkpoint:
            apply_structure(checkpoint, self.pl_module, name=self.transformer)
        trainer = self.pl_module._trainer
        if trainer is None:
            return
        if self.name == "on_save_checkpoint":
            note_progress(checkpoint, trainer)
            note_rows(checkpoint, trainer)
        else:
            take_up_rows(checkpoint, trainer)
            take_up_progress(checkpoint, trainer)

    def watched(self) -> nn.Module | None:
        """The transformer; None if there is none, or several and no name: nobody could tell whose structure it is."""
        try:
            return find_transformer(self.pl_module, name=self.transformer)
        except LayershedError:
            return None

    def _write(self, checkpoint: dict[str, Any]) -> None:
        if self.changes:
            write_structure(checkpoint, self.pl_module, name=self.transformer)
            return
        transformer = self.watched()
        if transformer is None:
            return
        # the optimizers have all the parameters, which SublayerDrop would take out of them
        write_structure(checkpoint, transformer, callback="RedundancyMonitor, SpeedMonitor or Report")
        if CHECKPOINT_KEY in checkpoint:
            checkpoint[_BY_HAND_KEY] = True


def _hook_of(pl_module: LightningModule) -> _Hook | None:
    hook = pl_module.__dict__.get(_Hook.NAMES[0])
    return hook if isinstance(hook, _Hook) else None


def _install(pl_module: LightningModule, transformer: str | None, *, changes: bool) -> None:
    if pl_module._trainer is not None:
        prepare_resumption(pl_module.trainer)
    _release(pl_module)
    pl_module.__dict__.update({name: _Hook(pl_module, name, transformer, changes) for name in _Hook.NAMES})


def _release(pl_module: LightningModule) -> None:
    for name in _Hook.NAMES:
        hook = pl_module.__dict__.get(name)
        if isinstance(hook, _Hook):
            del pl_module.__dict__[name]
            if hook.owned:  # somebody had set it on this one module
                pl_module.__dict__[name] = hook.own
