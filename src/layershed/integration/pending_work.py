"""Does in a resumed run the work that was still due at the checkpoint's step; ExactResume is built on it.

A checkpoint at the end of a batch is written before three parts of that batch:

- the row of this step's metrics,
- the validation that is due there,
- after the last batch, the end of the epoch and of training.

Lightning treats all of them as done, but a run that is killed right after the checkpoint has not done them. Lightning
also does not save the states of the random number generators, which dropout uses.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from layershed.integration import lightning_private as private
from layershed.integration.namespaces import Trainer, TrainerFn, convert_tensors_to_scalars, rank_zero_warn
from layershed.integration.rng import (
    loader_states,
    of_every_rank,
    random_states,
    set_loader_states,
    set_random_states,
)

PROGRESS_KEY, RANDOM_KEY = "layershed_progress", "layershed_random"
_FIT_LOOP, _EPOCH_LOOP = ("run", "on_advance_start", "advance"), ("reset",)


def note_progress(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Save in a checkpoint the work that is still due; call it on every rank of a fit."""
    own = {**random_states(), "loaders": loader_states(private.train_loaders(trainer))}
    checkpoint[RANDOM_KEY] = of_every_rank(own, trainer)
    if not trainer.training or private.batch_has_ended(trainer):
        return
    checkpoint[PROGRESS_KEY] = {
        "metrics": convert_tensors_to_scalars(dict(private.row_to_come(trainer))),
        "step": private.logged_step(trainer),
        "epoch": trainer.current_epoch,
        "validates": private.validation_is_due(trainer),
    }


def take_up_progress(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Log the row that was due, and let the fit loop do the rest; call it before Lightning loads the loops' state."""
    noted = checkpoint.get(PROGRESS_KEY) or {}
    if noted.get("metrics"):
        metrics = dict(noted["metrics"])
        step = int(metrics.pop("step", noted["step"]))  # a metric called "step" replaces the step, as in Lightning
        for logger in trainer.loggers:
            logger.log_metrics({"epoch": noted["epoch"], **metrics}, step=step)
            logger.save()
    if noted.get("validates"):
        private.announce_validation(checkpoint)
        private.forget_validation(trainer)
    _Resumption(trainer, noted, checkpoint.get(RANDOM_KEY, ())).install()


def give_back_loops(trainer: Trainer) -> None:
    """Restore the own methods of a Trainer's loops."""
    for loop, names in zip(private.fit_loops(trainer), (_FIT_LOOP, _EPOCH_LOOP), strict=True):
        private.give_back_loop_methods(loop, names)


class _Resumption:
    """Replaces the fit loop's ``run`` once: after the loops' state is loaded, before Lightning finds nothing to do.

    Args:
        trainer: The Trainer.
        noted: The work that was still due.
        random: The random states of every rank.
    """

    def __init__(self, trainer: Trainer, noted: dict[str, Any], random: Sequence[dict[str, Any]]) -> None:
        self.trainer, self.noted, self.random = trainer, noted, random
        self.loop, self.batches = private.fit_loops(trainer)

    def install(self) -> None:
        """Replace the loop's methods; each one restores the original when it is called."""
        private.replace_loop_method(self.loop, "run", self.run)
        private.replace_loop_method(self.loop, "on_advance_start", self.start_epoch)

    def run(self) -> None:
        """``fit_loop.run``."""
        trainer, loop = self.trainer, self.loop
        private.give_back_loop_methods(loop, ["run"])
        private.set_up_resumed_train_loader(trainer)
        private.load_loader_states(trainer)
        if private.resumes_training(trainer):
            self._warn_of_an_open_epoch()
        validates = bool(self.noted.get("validates"))
        only_ends = bool(self.noted) and not validates and private.last_batch_reached(trainer)
        if only_ends:  # Lightning skips the hooks, and takes the loader's end for the next epoch's end
            private.complete_batch(trainer)
            private.replace_loop_method(loop, "advance", self.end_batches)
        if private.nothing_left_to_train(trainer):
            loop.reset()
            loop.on_run_start()
            self._draw_on()
            private.end_fit(trainer, advances=validates or only_ends)
            return
        if private.between_epochs(trainer):  # the first iterators drew a seed before the random states were set
            private.begin_epoch_anew(trainer)
        loop.run()

    def start_epoch(self) -> None:
        """``fit_loop.on_advance_start``, with the random states of the checkpoint."""
        self._draw_on()
        self.loop.on_advance_start()

    def end_batches(self) -> None:
        """``fit_loop.advance`` in an epoch whose batches are all done."""
        private.give_back_loop_methods(self.loop, ["advance"])
        private.end_batches(self.trainer)

    def _draw_on(self) -> None:
        private.give_back_loop_methods(self.loop, ["on_advance_start"])
        if len(self.random) == self.trainer.world_size:  # else the saved states are of other ranks
            own = self.random[self.trainer.global_rank]
            set_random_states(own)
            set_loader_states(own.get("loaders", []), private.train_loaders(self.trainer))

    def _warn_of_an_open_epoch(self) -> None:
        trainer, done = self.trainer, private.batches_done(self.trainer)
        if done is None or private.between_epochs(trainer):
            return
        if done % trainer.accumulate_grad_batches:
            rank_zero_warn(
                "The checkpoint was written between two optimizer steps "
                f"(accumulate_grad_batches={trainer.accumulate_grad_batches}). The gradients accumulated until then "
                "are not in it. Save at a step instead, as ModelCheckpoint(every_n_train_steps=...) does."
            )
        if done and not all(private.is_stateful(loader) for loader in private.train_loaders(trainer)):
            rank_zero_warn(
                f"The run is resumed after {done} batches of an epoch, but the train loader has no state: it starts "
                "from its first batch again. Use a loader with state_dict and load_state_dict, such as "
                "torchdata.stateful_dataloader.StatefulDataLoader."
            )
            private.replace_loop_method(self.batches, "reset", self.reset_quietly)

    def reset_quietly(self) -> None:
        """``epoch_loop.reset``, without Lightning's own warning about the same loader."""
        private.give_back_loop_methods(self.batches, ["reset"])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
            self.batches.reset()


def fits(trainer: Trainer) -> bool:
    """Whether the Trainer is fitting."""
    return trainer.state.fn == TrainerFn.FITTING
