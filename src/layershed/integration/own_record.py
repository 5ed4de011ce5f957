"""What a module logs in a validation of its own, reduced as Lightning does it, over the batches of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from layershed.integration.lightning_private import rows_of
from layershed.integration.namespaces import Trainer

RETURNED = "returned by validation_step"
# the arguments of LightningModule.log after name and value, in order
_ARGUMENTS = (
    "prog_bar",
    "logger",
    "on_step",
    "on_epoch",
    "reduce_fx",
    "enable_graph",
    "sync_dist",
    "sync_dist_group",
    "add_dataloader_idx",
    "batch_size",
)
_REDUCED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": torch.add,
    "sum": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
}
_NOTHING = {"mean": 0.0, "sum": 0.0, "min": torch.inf, "max": -torch.inf}


class Record:
    """Takes the place of ``LightningModule.log``. It keeps what would be logged, on its device until the end.

    Args:
        trainer: The Trainer.

    Attributes:
        batch: The batch of the current step; None outside the steps.
        several: Whether the run has several validation loaders, and the current step knows its number.
        aliases: The other names under which Lightning logs a value, and the module's name for each.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.batch: Any = None
        self.several = False
        self.aliases: dict[str, str] = {}
        self._trainer = trainer
        self._device: torch.device = trainer.strategy.root_device
        self._sums: dict[str, tuple[str, Tensor, float]] = {}  # by name: how it is reduced, reduced so far, weight
        self._metrics: dict[str, Metric] = {}
        self._computed: dict[str, Tensor] = {}

    def __call__(self, name: str, value: Any, *positional: Any, **named: Any) -> None:
        """Note a value; the arguments are those of ``LightningModule.log``."""
        options = {**dict(zip(_ARGUMENTS, positional, strict=False)), **named}
        both = options.get("on_step") and options.get("on_epoch") is not False
        loader = "/dataloader_idx_0" if self.several and options.get("add_dataloader_idx", True) else ""
        self.aliases |= {f"{name}{end}{loader}": name for end in ("", *(["_epoch"] if both else []))}
        if isinstance(value, Metric):
            self._metrics[name] = value
        else:
            self._add(name, value, options.get("reduce_fx", "mean"), options.get("batch_size"))

    def returned(self, loss: Tensor) -> None:
        """Note the loss that a step returned."""
        self._add(RETURNED, loss, "mean", None)

    def _add(self, name: str, value: Any, reduce_fx: Any, batch_size: int | None) -> None:
        how = str(getattr(reduce_fx, "__name__", reduce_fx)).lower().replace("avg", "mean")
        weight = 1.0
        number = self._here(value)
        if how == "mean":
            weight = float(batch_size or (1 if self.batch is None else rows_of(self.batch)))
            number = number * weight
        if name in self._sums:
            _, before, weights = self._sums[name]
            number, weight = _REDUCED[how](before, number), weights + weight
        self._sums[name] = how, number, weight

    def _here(self, value: Any) -> Tensor:
        """A number as a tensor of no dimension on the device, without a wait if it is there or a number of the host."""
        if isinstance(value, Tensor) and value.device == self._device:
            return value.detach().reshape(()).float()
        return torch.full((), float(value), device=self._device)

    def _reduced(self) -> dict[str, Tensor]:
        """The values so far over the batches of all ranks; in a single process without a wait."""
        strategy = self._trainer.strategy
        # rank 0 says which: a module may log some on one rank only
        names: list[tuple[str, str]] = strategy.broadcast(sorted((name, how) for name, (how, *_) in self._sums.items()))
        found: dict[str, Tensor] = {}
        if names:
            own = [self._sums.get(name, (how, self._here(_NOTHING[how]), 0.0)) for name, how in names]
            table = torch.stack([each for _, number, weight in own for each in (number, self._here(weight))])
            every = strategy.all_gather(table).reshape(-1, len(names), 2)  # ranks, names, value and weight
            for index, (name, how) in enumerate(names):
                numbers, weights = every[:, index].unbind(-1)
                found[name] = {
                    "mean": numbers.sum() / weights.sum(),
                    "sum": numbers.sum(),
                    "min": numbers.min(),
                    "max": numbers.max(),
                }[how]
        for name, metric in sorted(self._metrics.items()):
            if name not in self._computed:  # the module may reset it afterwards
                self._computed[name] = self._here(metric.compute())
        return {**found, **self._computed}

    def values(self) -> dict[str, float]:
        """The values over the batches of all ranks, by the module's names; the one wait for the device."""
        found = self._reduced()
        numbers: list[float] = torch.stack(list(found.values())).tolist() if found else []
        return dict(zip(found, numbers, strict=True))

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Afterwards the Trainer shows the metrics that it shows now."""
        before = [dict(metrics) for metrics in shown_metrics(self._trainer)]
        try:
            yield
        finally:
            for metrics, kept in zip(shown_metrics(self._trainer), before, strict=True):
                metrics.clear()
                metrics.update(kept)

    def show(self) -> None:
        """Let the Trainer show what the module has logged so far, for its hooks."""
        found = self._reduced()
        found.pop(RETURNED, None)
        named = {**found, **{alias: found[name] for alias, name in self.aliases.items() if name in found}}
        for metrics in shown_metrics(self._trainer):
            metrics.update(named)


def shown_metrics(trainer: Trainer) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the Trainer shows; a change of these dicts changes it, as ``test_shown_metrics_are_live`` checks."""
    callback, logged = trainer.callback_metrics, trainer.logged_metrics
    assert isinstance(callback, dict)
    assert isinstance(logged, dict)
    return callback, logged
