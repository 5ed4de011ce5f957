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
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchmetrics import Metric

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
    record = _Record()
    failure: Exception | None = None
    with _without_trace(trainer, pl_module, record), trainer.precision_plugin.forward_context():
        try:
            _run(trainer, pl_module, islice(batches, max_batches), record)
        except Exception as error:  # the user's own code may raise anything; other ranks must hear of it
            failure = error
        failed = torch.tensor(float(failure is not None), device=trainer.strategy.root_device)
        failed = trainer.strategy.reduce(failed, reduce_op="sum")
        if failure is not None:
            raise failure
        if float(failed):
            raise MeasurementError("validation_step failed on another rank.")
        values = record.values(trainer)
    return OwnQuality(_chosen(values, metric))


def _chosen(values: dict[str, float], metric: str | None) -> dict[str, float]:
    """The loss, and the metric of that name."""
    loss = {LOSS: values[LOSS]} if LOSS in values else {}
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
    if metric not in values:
        raise UnknownNameError("metric of the validation", metric, set(values) - {LOSS})
    return {**loss, metric: values[metric]}


def _run(trainer: Trainer, pl_module: LightningModule, batches: Iterable[Any], record: _Record) -> None:
    several = [0] if isinstance(trainer.val_dataloaders, list | tuple) and len(trainer.val_dataloaders) > 1 else []
    # as Lightning decides it: a step may take the batch alone
    numbered = is_param_in_hook_signature(pl_module.validation_step, "batch_idx", min_args=2)
    pl_module.on_validation_start()
    pl_module.on_validation_epoch_start()
    for index, given in enumerate(batches):
        batch = on_device(trainer, given)
        record.rows = _rows(batch)
        pl_module.on_validation_batch_start(batch, index, *several)
        output: Any = pl_module.validation_step(batch, *([index] if numbered else []), *several)
        loss = output.get(LOSS, output.get("val_loss")) if isinstance(output, Mapping) else output
        if isinstance(loss, Tensor) and loss.numel() == 1:
            record(LOSS, loss)
        pl_module.on_validation_batch_end(output, batch, index, *several)
    record.rows = 1
    pl_module.on_validation_epoch_end()
    pl_module.on_validation_end()


def _rows(batch: Any) -> int:
    """Number of rows of a batch, by its first tensor."""
    return next((leaf.shape[0] for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 1)


class _Record:
    """Takes the place of ``LightningModule.log``, and keeps what would be logged, on its device until the end."""

    def __init__(self) -> None:
        self.rows = 1
        self._sums: dict[str, tuple[Any, float]] = {}
        self._metrics: dict[str, Metric] = {}

    def __call__(self, name: str, value: Any, *_: Any, batch_size: int | None = None, **options: Any) -> None:
        if isinstance(value, Metric):
            self._metrics[name] = value
            return
        number = value.detach().float() if isinstance(value, Tensor) else float(value)
        how = options.get("reduce_fx", "mean")
        how = getattr(how, "__name__", how)
        if how == "mean":
            weight = batch_size or self.rows
            total, weights = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (total + weight * number, weights + weight)
            return
        before: Any = self._sums.get(name, (number, 1.0))[0]
        reduced: dict[str, Any] = {
            "sum": before + number if name in self._sums else number,
            "min": min(before, number),
            "max": max(before, number),
        }
        self._sums[name] = (reduced.get(how, number), 1.0)

    def values(self, trainer: Trainer) -> dict[str, float]:
        """The values over all batches of all ranks."""
        # rank 0 says which: a module may log some on one rank only
        device, names = trainer.strategy.root_device, trainer.strategy.broadcast(sorted(self._sums))
        pairs = [self._sums.get(name, (0.0, 0.0)) for name in names]
        flat = [
            torch.as_tensor(number, dtype=torch.float32).reshape(()).to(device) for pair in pairs for number in pair
        ]
        totals = torch.stack(flat).reshape(-1, 2) if flat else torch.zeros(0, 2, device=device)
        totals = trainer.strategy.reduce(totals, reduce_op="sum")
        found = dict(zip(names, (totals[:, 0] / totals[:, 1]).tolist(), strict=True))
        return {**found, **{name: float(metric.compute()) for name, metric in sorted(self._metrics.items())}}


@contextmanager
def _without_trace(trainer: Trainer, pl_module: LightningModule, record: _Record) -> Iterator[None]:
    """A validation of its own within the context: in eval mode, without gradients, loggers and consequences."""
    loggers, stage = trainer.loggers, trainer.state.stage
    with ExitStack() as contexts:
        contexts.enter_context(evaluating(pl_module))
        contexts.enter_context(torch.no_grad())
        contexts.enter_context(isolate_rng())
        contexts.enter_context(_attributes_kept(pl_module))
        contexts.enter_context(_metrics_kept(pl_module))
        contexts.callback(setattr, trainer.state, "stage", stage)
        contexts.callback(setattr, trainer, "loggers", loggers)
        contexts.callback(pl_module.__dict__.pop, "log", None)
        trainer.loggers = [DummyLogger()] if loggers else []
        trainer.validating = True
        pl_module.__dict__["log"] = record
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(0)
        yield


@contextmanager
def _metrics_kept(pl_module: LightningModule) -> Iterator[None]:
    """Fresh torchmetrics within the context; afterwards they hold what they held."""
    metrics = [module for module in pl_module.modules() if isinstance(module, Metric)]
    states = [{k: list(v) if isinstance(v, list) else v for k, v in vars(metric).items()} for metric in metrics]
    for metric in metrics:
        metric.reset()
    try:
        yield
    finally:
        for metric, state in zip(metrics, states, strict=True):
            vars(metric).update(state)


@contextmanager
def _attributes_kept(pl_module: LightningModule) -> Iterator[None]:
    """Afterwards the module's numbers, and what its lists, dicts and sets hold, are as before."""
    attributes = dict(vars(pl_module))
    for name in vars(nn.Module()):
        attributes.pop(name, None)
    held = {name: value.copy() for name, value in attributes.items() if isinstance(value, list | dict | set)}
    try:
        yield
    finally:
        for name, value in attributes.items():
            if name in held:
                vars(pl_module)[name] = value
                _refill(value, held[name])
            elif value is None or isinstance(value, int | float | str | Tensor):
                vars(pl_module)[name] = value


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)
