"""Quality by the module's own validation: its loss, or a metric that it logs, over a few batches.

The pass leaves no trace: nothing is logged, no callback is called, and metrics, lists and random states are as before.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layershed.discovery.probe import evaluating
from layershed.errors import MeasurementError, UnknownNameError
from layershed.integration.lightning_private import on_device
from layershed.integration.namespaces import (
    DummyLogger,
    LightningModule,
    Trainer,
    is_param_in_hook_signature,
    isolate_rng,
)
from layershed.integration.own_record import RETURNED, Record
from layershed.integration.own_state import state_kept
from layershed.progress import least, track
from layershed.quality import OwnQuality

LOSS = "loss"


def own_quality(
    trainer: Trainer, pl_module: LightningModule, batches: Iterable[Any], max_batches: int, metric: str | None
) -> OwnQuality:
    """Run ``validation_step`` over the first batches and return its loss, and the metric if one is named.

    The loss is what ``validation_step`` returns, or the logged metric named like a loss. Random numbers are the same in
    every pass, so that passes before and after a drop compare.

    Args:
        trainer: The Trainer, in a hook of ``fit``.
        pl_module: Its module.
        batches: Batches of the first validation loader.
        max_batches: Maximum number of batches.
        metric: Name under which the module logs it in validation; None for the loss alone.

    Raises:
        MeasurementError: If the validation gives no loss and no metric is named, or the step failed on a rank.
        UnknownNameError: If the module does not log the metric.
    """
    record = Record(trainer)
    with _without_trace(trainer, pl_module, record), trainer.precision_plugin.forward_context():
        with _agreed(trainer):
            taken = track(islice(batches, max_batches), "Measuring quality", least(batches, max_batches))
            _run_batches(trainer, pl_module, taken, record)
        record.show()
        with _agreed(trainer):
            pl_module.on_validation_epoch_end()
        record.show()
        with _agreed(trainer):
            pl_module.on_validation_end()
        values = record.values()
    return OwnQuality(_chosen(values, record.aliases, metric))


@contextmanager
def _agreed(trainer: Trainer) -> Iterator[None]:
    """An error on one rank becomes an error on all: else the others would wait for it in their next collective.

    Raises:
        MeasurementError: If another rank failed.
    """
    failure, agreed = None, True
    try:
        yield
    except Exception as error:  # the user's own code may raise anything
        failure = error
    if trainer.world_size > 1:  # it costs a wait for the device
        agreed = trainer.strategy.reduce_boolean_decision(failure is None, all=True)
    if failure is not None:
        raise failure
    if not agreed:
        raise MeasurementError("validation_step failed on another rank.")


def _chosen(values: dict[str, float], aliases: Mapping[str, str], metric: str | None) -> dict[str, float]:
    """The loss, and the metric of that name, or of one under which Lightning logs it."""
    values = dict(values)
    returned = values.pop(RETURNED, values.get(LOSS))
    loss = {} if returned is None else {LOSS: returned}
    if not loss:
        named = [name for name in values if name.lower().endswith(LOSS)]
        wanted = next((name for name in named if name in ("val_loss", "val/loss")), named[0] if len(named) == 1 else "")
        loss = {LOSS: values[wanted]} if wanted else {}
    if metric is None or metric == LOSS:
        if not loss:
            raise MeasurementError(
                "validation_step returns no loss, and logs none under one name that ends in 'loss'. Return the loss, "
                "or name a logged metric: SublayerDrop(quality='val_f1')"
            )
        return loss
    known = {**{name: name for name in values}, **aliases}
    if metric not in known:
        raise UnknownNameError("metric of the validation", metric, set(known) - {LOSS})
    return {**loss, metric: values[known[metric]]}


def _run_batches(trainer: Trainer, pl_module: LightningModule, batches: Iterable[Any], record: Record) -> None:
    loaders = trainer.val_dataloaders
    several = [0] if isinstance(loaders, list | tuple | dict) and len(loaders) > 1 else []
    # as Lightning decides it: a step may take the batch alone
    numbered = is_param_in_hook_signature(pl_module.validation_step, "batch_idx", min_args=2)
    pl_module.on_validation_start()
    pl_module.on_validation_epoch_start()
    for index, given in enumerate(batches):
        batch = on_device(trainer, given)
        record.batch, record.several = batch, bool(several)
        pl_module.on_validation_batch_start(batch, index, *several)
        output: Any = pl_module.validation_step(batch, *([index] if numbered else []), *several)
        loss = output.get(LOSS, output.get("val_loss")) if isinstance(output, Mapping) else output
        if isinstance(loss, Tensor) and loss.numel() == 1:
            record.returned(loss)
        pl_module.on_validation_batch_end(output, batch, index, *several)
    record.batch, record.several = None, False


@contextmanager
def _without_trace(trainer: Trainer, pl_module: LightningModule, record: Record) -> Iterator[None]:
    """A validation of its own within the context: in eval mode, without gradients, loggers and consequences."""
    loggers, stage = trainer.loggers, trainer.state.stage
    with ExitStack() as contexts:
        contexts.enter_context(evaluating(pl_module))
        contexts.enter_context(torch.no_grad())
        contexts.enter_context(isolate_rng())
        contexts.enter_context(state_kept(pl_module))
        contexts.callback(setattr, trainer.state, "stage", stage)
        contexts.callback(setattr, trainer, "loggers", loggers)
        contexts.callback(pl_module.__dict__.pop, "log", None)
        trainer.loggers = [DummyLogger()] if loggers else []
        trainer.validating = True
        contexts.enter_context(record.shown())
        pl_module.__dict__["log"] = record
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(0)
        yield
