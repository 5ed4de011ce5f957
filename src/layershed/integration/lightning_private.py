"""Every private name of Lightning that layershed uses, and every undocumented state of its loops.

One small function each. Its docstring says what Lightning keeps there and why nothing public gives it.
``tests/integration/test_lightning_private.py`` holds a contract test for each, and a test that no other file reaches
such a name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from layershed.integration.namespaces import (
    EarlyStopping,
    ExperimentWriter,
    LightningModule,
    ModelCheckpoint,
    ModelPruning,
    TorchCheckpointIO,
    Trainer,
    function,
    kind,
)

_extract_batch_size = function("pytorch.utilities.data", "_extract_batch_size")
_set_sampler_epoch = function("fabric.utilities.data", "_set_sampler_epoch")
_Stateful = function("fabric.utilities.types", "_Stateful")  # a protocol, by attributes alone
_FitLoop = function("pytorch.loops.fit_loop", "_FitLoop")
_WrappingCheckpointIO = kind("pytorch.plugins.io.wrapper", "_WrappingCheckpointIO")

# ---- plugins, strategies, callbacks ----


def wraps_checkpoint_io(plugin: object) -> bool:
    """Whether a CheckpointIO wraps another one, as AsyncCheckpointIO does; the base class is private."""
    return isinstance(plugin, _WrappingCheckpointIO)


def replace_wrapped_checkpoint_io(wrapper: Any, inner: TorchCheckpointIO) -> None:
    """Put another CheckpointIO into a wrapper: its public setter accepts none in place of another."""
    wrapper._checkpoint_io = inner


def saves_shards(strategy: Any) -> bool:
    """``ModelParallelStrategy(save_distributed_checkpoint=...)``, which it keeps under a private name."""
    return bool(strategy._save_distributed_checkpoint)


def tensor_parallel_size(strategy: Any) -> int | str:
    """``ModelParallelStrategy(tensor_parallel_size=...)``, which it keeps under a private name."""
    return cast("int | str", strategy._tensor_parallel_size)


def raw_optimizer(optimizer: Any) -> Any:
    """The torch optimizer inside a LightningOptimizer, or the optimizer itself."""
    return getattr(optimizer, "_optimizer", optimizer)


def wrapped_sampler(sampler: object) -> object:
    """The user's sampler inside the distributed one that Lightning puts around it; None if there is no wrapper."""
    return getattr(getattr(sampler, "dataset", None), "_sampler", None)


def checkpoint_interval(callback: ModelCheckpoint) -> tuple[int, int]:
    """``every_n_train_steps`` and ``every_n_epochs`` of a ModelCheckpoint, with its defaults resolved."""
    return int(callback._every_n_train_steps), int(callback._every_n_epochs)


def saves_after_train_epoch(callback: Any, trainer: Trainer) -> bool:
    """Whether a ModelCheckpoint saves at the end of the training epoch rather than of validation."""
    return bool(callback._should_save_on_train_epoch_end(trainer))


def checks_after_train_epoch(callback: EarlyStopping) -> bool:
    """Whether an EarlyStopping checks at the end of the training epoch rather than of validation."""
    return bool(callback._check_on_train_epoch_end)


def finetuning_groups(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """The optimizer groups that a BaseFinetuning saved, with names of parameters; only its state holds them."""
    states = [state for state in checkpoint.get("callbacks", {}).values() if isinstance(state, dict)]
    saved = [state.get("internal_optimizer_metadata") for state in states]
    return [group for each in saved if isinstance(each, dict) for groups in each.values() for group in groups]


def lasting_masks(callback: ModelPruning) -> list[tuple[Any, str]]:
    """The modules and names of what a ModelPruning leaves masked after training; it keeps its arguments privately."""
    if callback._make_pruning_permanent or not callback._apply_pruning or not callback.amount:
        return []
    return list(callback._parameters_to_prune)


def replace_header_rewrite(writer: ExperimentWriter, rewrite: Callable[[Sequence[str]], None]) -> None:
    """Replace how CSVLogger adds a column to metrics.csv: its own way empties the file first."""
    vars(writer)["_rewrite_with_new_header"] = rewrite


def give_back_header_rewrite(writer: ExperimentWriter) -> None:
    """Undo :func:`replace_header_rewrite`."""
    vars(writer).pop("_rewrite_with_new_header", None)


# ---- train loaders ----


def set_up_train_loader(trainer: Trainer) -> None:
    """Make the fit loop build its train loader; Lightning builds it only when training starts."""
    trainer.fit_loop.setup_data()


def set_up_val_loaders(trainer: Trainer) -> None:
    """Make the validation loop of a fit build its loaders; Lightning builds them only when validation starts."""
    trainer.fit_loop.epoch_loop.val_loop.setup_data()


def on_device(trainer: Trainer, batch: Any) -> Any:
    """A batch of the first validation loader as a step gets it, with the transfer hooks of module or datamodule."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def rows_of(batch: Any) -> int:
    """The batch size by which Lightning weighs what a step logs, or 1; its public function warns or raises, too."""
    return next((int(rows) for rows in _extract_batch_size(batch) if rows is not None), 1)


def train_loaders(trainer: Trainer) -> list[Any]:
    """The train loaders as one flat list; empty before they are set up."""
    loader = trainer.fit_loop._combined_loader
    return [] if loader is None else list(loader.flattened)


def is_stateful(loader: object) -> bool:
    """Whether Lightning saves and restores a loader's position: it has state_dict and load_state_dict."""
    return isinstance(loader, _Stateful)


def saved_fit_loop(checkpoint: dict[str, Any]) -> Any:
    """The state of the fit loop in a checkpoint; ``combined_loader`` in it holds the loaders' positions of rank 0."""
    return checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})


def set_up_resumed_train_loader(trainer: Trainer) -> None:
    """Build the train loader if it is not there yet, but leave its position to :func:`load_loader_states`.

    Lightning would move it at once, in the order of a sampler's first epoch.
    """
    loop: Any = trainer.fit_loop
    states, loop._combined_loader_states_to_load = loop._combined_loader_states_to_load, []
    loop.setup_data()
    loop._combined_loader_states_to_load = states


def load_loader_states(trainer: Trainer) -> None:
    """Give the train loaders the positions that the checkpoint holds, in the order of the epoch that is open.

    Lightning omits this between two epochs, and if the loaders were set up before the checkpoint was read (to count
    the steps). A sampler such as DistributedSampler must know the epoch before the loader moves to its position.
    """
    loop: Any = trainer.fit_loop
    states, loader = loop._combined_loader_states_to_load, loop._combined_loader
    if not states or loader is None:
        return
    if between_epochs(trainer) and len(states) != sum(is_stateful(each) for each in loader.flattened):
        return  # a new epoch may have other loaders
    for each in loader.flattened:
        _set_sampler_epoch(each, loop.epoch_progress.current.processed)
    loader._load_state_dicts(states)
    loop._combined_loader_states_to_load = []
    iter(loop._data_fetcher)


# ---- progress of the loops ----


def epoch_in_progress(trainer: Trainer) -> int:
    """The epoch, from 0, that is under way or comes next, as the fit loop counts them."""
    return int(_epochs(trainer).processed)


def between_epochs(trainer: Trainer) -> bool:
    """Whether the last epoch has ended and the next one has not begun."""
    epochs = _epochs(trainer)
    return bool(epochs.ready == epochs.started == epochs.processed > 0)


def epoch_is_open(trainer: Trainer) -> bool:
    """Whether the run was resumed within an epoch."""
    epochs = _epochs(trainer)
    return bool(trainer.fit_loop.restarted_mid_epoch and epochs.processed < epochs.started)


def batches_done(trainer: Trainer) -> int | None:
    """Batches of the epoch that were trained on; None between two epochs."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    return None if progress.is_last_batch or not progress.current.ready else int(progress.current.processed)


def batch_has_ended(trainer: Trainer) -> bool:
    """Whether the last batch is counted as completed, so that its row and its validation are done."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return bool(batches.processed == batches.completed)


def last_batch_reached(trainer: Trainer) -> bool:
    """Whether the last batch of the epoch is the current one."""
    return bool(trainer.fit_loop.epoch_loop._num_ready_batches_reached())


def validation_is_due(trainer: Trainer) -> bool:
    """Whether Lightning validates at the end of the current batch."""
    loop: Any = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def _epochs(trainer: Trainer) -> Any:
    return trainer.fit_loop.epoch_progress.current


# ---- what is logged ----


def logged_step(trainer: Trainer) -> int:
    """The step under which Lightning logs: batches that took an optimizer step, not ``global_step``."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def row_to_come(trainer: Trainer) -> Mapping[str, Any]:
    """The metrics that Lightning logs at the end of the current batch; empty if it logs none."""
    connector, settings = trainer._logger_connector, vars(trainer)
    steps = not trainer.fit_loop.epoch_loop._should_accumulate() or not trainer.lightning_module.automatic_optimization
    logs = steps and (connector.should_update_logs or settings["fast_dev_run"])
    return connector.metrics["log"] if logs else {}


def end_epoch_for_loggers(trainer: Trainer) -> None:
    """Mark the epoch as over for Lightning's metrics, so that its means are computed."""
    trainer._logger_connector.epoch_end_reached()


# ---- steering a resumed fit ----


def announce_validation(checkpoint: dict[str, Any]) -> None:
    """In the loops' state of a checkpoint, say that the batch is done and validation has begun.

    Lightning then resumes with that validation. It takes a checkpoint of ``on_train_batch_end`` for one after it.
    """
    loops = checkpoint["loops"]["fit_loop"]
    for counts in (loops["epoch_loop.batch_progress"][which] for which in ("total", "current")):
        counts["completed"] = counts["processed"]
    validation = loops["epoch_loop.val_loop.batch_progress"]
    done = validation["total"]["completed"]
    validation["total"].update(ready=done + 1, started=done + 1, processed=done)
    validation["current"].update(ready=1, started=1, processed=0, completed=0)
    validation["is_last_batch"] = False


def forget_validation(trainer: Trainer) -> None:
    """Mark the validation loop as not run: after an earlier fit of the same Trainer, it would never end."""
    trainer.fit_loop.epoch_loop.val_loop._has_run = False


def begin_epoch_anew(trainer: Trainer) -> None:
    """Make Lightning ask the loaders for new iterators, which it omits in the first epoch of a resumed fit.

    The loop's own setter cannot do it: it sets True whenever there are max_steps.
    """
    loop: Any = trainer.fit_loop
    loop._restarting = loop.epoch_loop.restarting = loop._resuming_from_checkpoint = False


def complete_batch(trainer: Trainer) -> None:
    """Count the current batch as completed."""
    trainer.fit_loop.epoch_loop.batch_progress.increment_completed()


def end_batches(trainer: Trainer) -> None:
    """What the epoch loop does after its last batch, if no validation is due there."""
    loop: Any = trainer.fit_loop.epoch_loop
    loop._batches_that_stepped += not loop._should_accumulate()
    loop.restarting = False
    _end_iteration(loop)


def _end_iteration(loop: Any) -> None:
    """What a loop does after each of its steps; Lightning has a method for it from 2.6 on."""
    if hasattr(loop, "on_iteration_done"):
        loop.on_iteration_done()
    else:
        loop._restarting = False


def supports_exact_resume(trainer: Trainer | None = None) -> bool:
    """Whether Lightning's loops know that they resume, and where: from 2.5.3 on. Else no resume can be exact."""
    loop = _FitLoop if trainer is None else type(trainer.fit_loop)  # the two namespaces may be of two versions
    return hasattr(loop, "restarted_mid_epoch") and hasattr(loop, "is_resuming")


def nothing_left_to_train(trainer: Trainer) -> bool:
    """Whether a resumed fit has reached its limit: Lightning would then end neither the epoch nor the run."""
    return bool(trainer.fit_loop.restarting and trainer.fit_loop.max_batches and trainer.fit_loop.done)


def resumes_training(trainer: Trainer) -> bool:
    """Whether a resumed fit has batches left to train on."""
    return bool(trainer.fit_loop.restarting and not trainer.fit_loop.skip)


def end_fit(trainer: Trainer, *, advances: bool) -> None:
    """The end of the epoch and of training, with their hooks, for a fit that has nothing left to train.

    Call it after ``fit_loop.on_run_start``. The epoch loop ``advances`` if a validation is left, for example.
    """
    loop: Any = trainer.fit_loop
    if advances:
        loop.on_advance_start()
        loop.advance()
        loop.on_advance_end()
    elif epoch_is_open(trainer):
        loop.epoch_loop.reset()
        end_epoch_for_loggers(trainer)
        loop.on_advance_end()
    _end_iteration(loop)
    loop._restarting = False
    loop.on_run_end()


def fit_loops(trainer: Trainer) -> tuple[Any, Any]:
    """The loop over the epochs of a fit, and the one over the batches of an epoch: both undocumented."""
    return trainer.fit_loop, trainer.fit_loop.epoch_loop


def replace_loop_method(loop: object, name: str, replacement: Callable[..., None]) -> None:
    """Put a function in place of a method on one loop: Lightning calls no hook at these moments."""
    assert callable(getattr(type(loop), name))
    vars(loop)[name] = replacement


def give_back_loop_methods(loop: object, names: Sequence[str]) -> None:
    """Undo :func:`replace_loop_method`."""
    for name in names:
        vars(loop).pop(name, None)


def trainer_of(pl_module: LightningModule) -> Trainer | None:
    """The module's Trainer, or None; its public name raises an error where there is none."""
    return pl_module._trainer
