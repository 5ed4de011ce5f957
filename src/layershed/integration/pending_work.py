"""What Lightning leaves out when it resumes a run, so that interrupted equals uninterrupted.

A checkpoint that is written at the end of a batch comes before three things that belong to it: the row of this step's
metrics, the validation that is due there, and, behind the last step, the end of the epoch and of training. Lightning
takes all of them for done. A run that was killed right behind the checkpoint has not done them. Nor does Lightning
keep the state of the random number generators, which dropout draws from.

A loader without a state begins its epoch anew; how it is brought back is in :mod:`layershed.integration.epoch_start`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from layershed.integration.checkpoint_io import keep_checkpoints_whole
from layershed.integration.epoch_start import (
    EPOCH_KEY,
    all_stateful,
    batches_read,
    leave_epochs,
    loaders_of,
    note_epoch_start,
    set_own_generators,
    watch_epochs,
)
from layershed.integration.metrics_csv import keep_rows
from layershed.integration.reading_again import read_again
from layershed.integration.rng import of_every_rank, random_states, set_random_states

PROGRESS_KEY, RANDOM_KEY = "layershed_progress", "layershed_random"


def prepare_resumption(trainer: Trainer) -> None:
    """Have checkpoints and metrics.csv written whole, unless the user has put something of their own in charge."""
    keep_checkpoints_whole(trainer.strategy)
    if trainer.state.fn == TrainerFn.FITTING:
        for logger in trainer.loggers:
            keep_rows(logger)
        watch_epochs(trainer)
        _unwrap_at_the_end(trainer)


def note_progress(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Note what is still to come when the batch has ended, and bring to the disk what was logged until now."""
    for logger in trainer.loggers:
        logger.save()
    if trainer.state.fn == TrainerFn.FITTING:
        checkpoint[RANDOM_KEY] = of_every_rank(random_states(), trainer)
        note_epoch_start(checkpoint, trainer)
    loop: Any = trainer.fit_loop.epoch_loop
    batches = loop.batch_progress.total
    if trainer.state.fn != TrainerFn.FITTING or not trainer.training or batches.processed == batches.completed:
        return
    connector, settings = trainer._logger_connector, vars(trainer)
    steps = not loop._should_accumulate() or not trainer.lightning_module.automatic_optimization
    logs = steps and (connector.should_update_logs or settings["fast_dev_run"])
    metrics = convert_tensors_to_scalars(connector.metrics["log"]) if logs else {}
    checkpoint[PROGRESS_KEY] = {
        "metrics": metrics,
        "step": loop._batches_that_stepped,
        "epoch": trainer.current_epoch,
        "validates": loop._should_check_val_fx(trainer.fit_loop._data_fetcher),
    }


def take_up_progress(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Log the row that was to come, and have Lightning do what else was."""
    if trainer.state.fn != TrainerFn.FITTING:
        return
    noted = checkpoint.get(PROGRESS_KEY) or {}
    if noted.get("metrics"):
        metrics = dict(noted["metrics"])
        step = int(metrics.pop("step", noted["step"]))  # a metric of this name takes its place, as in Lightning
        for logger in trainer.loggers:
            logger.log_metrics({"epoch": noted["epoch"], **metrics}, step=step)
            logger.save()
    if noted.get("validates"):
        _validation_to_come(checkpoint["loops"]["fit_loop"])
        # of a trainer that has fitted before Lightning thinks it done, and never ends
        trainer.fit_loop.epoch_loop.val_loop._has_run = False
    _wrap(trainer, noted, checkpoint.get(RANDOM_KEY, ()), checkpoint.get(EPOCH_KEY, ()))


def _validation_to_come(loops: dict[str, Any]) -> None:
    """Say that the batch is done and validation has begun: this Lightning takes up again."""
    for counts in (loops["epoch_loop.batch_progress"][which] for which in ("total", "current")):
        counts["completed"] = counts["processed"]
    validation = loops["epoch_loop.val_loop.batch_progress"]
    done = validation["total"]["completed"]
    validation["total"].update(ready=done + 1, started=done + 1, processed=done)
    validation["current"].update(ready=1, started=1, processed=0, completed=0)
    validation["is_last_batch"] = False


def _wrap(
    trainer: Trainer, noted: dict[str, Any], random: Sequence[dict[str, Any]], epochs: Sequence[dict[str, Any]]
) -> None:
    """Look at the loop once its state and its loaders are there, and before it decides that there is nothing to do."""
    loop: Any = trainer.fit_loop
    kind, validates = type(loop), bool(noted.get("validates"))

    def draw_on() -> None:
        vars(loop).pop("on_advance_start", None)
        if len(random) == trainer.world_size:  # on another number of ranks there is none to go on with
            set_random_states(random[trainer.global_rank])
        set_own_generators(epochs, trainer)

    def first_start() -> None:
        draw_on()
        kind.on_advance_start(loop)

    def nothing_left() -> None:
        vars(loop).pop("advance", None)
        _end_batches(loop.epoch_loop)

    def resumed() -> None:
        vars(loop).pop("run", None)
        loop.setup_data()
        _load_loaders(loop)
        if loop.restarting and not loop.skip:
            _take_up_epoch(trainer, epochs, random)
        only_ends = bool(noted) and not validates and loop.epoch_loop._num_ready_batches_reached()
        if only_ends:  # of this Lightning leaves out the hooks, and then takes the loader's end for the next epoch's
            loop.epoch_loop.batch_progress.increment_completed()
            loop.advance = nothing_left
        if loop.restarting and loop.max_batches and loop.done:
            loop.reset()
            loop.on_run_start()
            draw_on()
            _end(trainer, loop, validates or only_ends)
        else:
            _begin_next_epoch(loop)
            kind.run(loop)

    loop.run, loop.on_advance_start = resumed, first_start
    _unwrap_at_the_end(trainer)


def _unwrap_at_the_end(trainer: Trainer) -> None:
    def torn_down() -> None:
        _unwrap(trainer)
        trainer._teardown()

    vars(trainer)["_teardown"] = torn_down  # what Lightning calls at the end of every fit, also of one that failed


def _unwrap(trainer: Trainer) -> None:
    vars(trainer).pop("_teardown", None)
    leave_epochs(trainer)
    for name in ("run", "on_advance_start", "advance"):
        vars(trainer.fit_loop).pop(name, None)


def _load_loaders(loop: Any) -> None:
    """What Lightning leaves out between two epochs, and where the loaders were set up before (for their length)."""
    states, loader = loop._combined_loader_states_to_load, loop._combined_loader
    if not states or loader is None:
        return
    if _between_epochs(loop) and len(states) != sum(isinstance(each, _Stateful) for each in loader.flattened):
        return  # a new epoch may have other loaders
    loader._load_state_dicts(states)
    loop._combined_loader_states_to_load = []
    iter(loop._data_fetcher)


def _between_epochs(loop: Any) -> bool:
    epochs = loop.epoch_progress.current
    return bool(epochs.ready == epochs.started == epochs.processed > 0)


def _begin_next_epoch(loop: Any) -> None:
    """Have Lightning ask the loaders anew: their first iterators drew a seed before the random states were set."""
    if _between_epochs(loop):
        # not by the loop's own setter, which says True whenever there are max_steps
        loop._restarting = loop.epoch_loop.restarting = loop._resuming_from_checkpoint = False


def _end_batches(batches: Any) -> None:
    """What the loop over the batches of an epoch does behind the last one, if no validation is due there."""
    batches._batches_that_stepped += not batches._should_accumulate()
    batches.restarting = False
    batches.on_iteration_done()


def _take_up_epoch(trainer: Trainer, epochs: Sequence[dict[str, Any]], random: Sequence[dict[str, Any]]) -> None:
    """Within an epoch, have the loaders go on where they stood, or tell that they do not."""
    loop: Any = trainer.fit_loop
    if batches_read(loop) is None:
        return
    _tell_lost_gradients(loop, trainer.accumulate_grad_batches)
    if all_stateful(loaders_of(loop)):
        return
    if _between_epochs(loop) or not read_again(epochs, random, trainer):
        _tell_repeated_data(loop)


def _tell_lost_gradients(loop: Any, accumulated: int) -> None:
    if not _between_epochs(loop) and (batches_read(loop) or 0) % accumulated:
        rank_zero_warn(
            f"The checkpoint was written between two optimizer steps (accumulate_grad_batches={accumulated}): the "
            "gradients that had been accumulated until then are not in it; save at a step instead, as "
            "ModelCheckpoint(every_n_train_steps=...) does."
        )


def _tell_repeated_data(loop: Any) -> None:
    rank_zero_warn(
        f"The run is resumed after {batches_read(loop)} batches of an epoch, and the train loader cannot say where it "
        "stood: it starts from its first batch again, so that this epoch is not the one that was interrupted; use a "
        "loader with state_dict and load_state_dict, such as torchdata.stateful_dataloader.StatefulDataLoader."
    )


def _end(trainer: Trainer, loop: Any, advances: bool) -> None:
    """What comes after the last step of a run: the end of the epoch and of training."""
    if advances:
        loop.on_advance_start()
        loop.advance()
        loop.on_advance_end()
    elif loop.restarted_mid_epoch and loop.epoch_progress.current.processed < loop.epoch_progress.current.started:
        loop.epoch_loop.reset()
        trainer._logger_connector.epoch_end_reached()
        loop.on_advance_end()
    loop.on_iteration_done()
    loop._restarting = False
    loop.on_run_end()
