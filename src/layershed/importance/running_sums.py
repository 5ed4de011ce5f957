"""Sums over forward passes, each of which counts as a whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from layershed.errors import CheckpointError
from layershed.importance.metrics import ImportanceMetric

_STATES = ("total", "tokens", "passes")


class PassSums(Metric):
    """The sums of an :class:`ImportanceMetric` over forward passes, each of which counts as a whole or not at all.

    A pass in which any importance is not finite is counted and left out, so that all branches are averaged over the
    same tokens. No number is read from the device, so nothing waits for it.

    Args:
        num_branches: Number of branches that are measured side by side.
    """

    full_state_update = False
    total: Tensor
    tokens: Tensor
    passes: Tensor

    def __init__(self, num_branches: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(num_branches, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros(num_branches, dtype=torch.float64), dist_reduce_fx="sum")
        # passes left out, by the first branch that was not finite; the last entry counts passes averaged in
        self.add_state("passes", torch.zeros(num_branches + 1, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, one: ImportanceMetric) -> None:
        """Add one forward pass, or count it as left out.

        Args:
            one: The sums of that pass alone.
        """
        broken = torch.cat([~one.total.isfinite(), one.total.new_ones(1, dtype=torch.bool)])
        first = broken & (broken.cumsum(0) == 1)
        self.total += torch.where(first[-1], one.total, 0.0)
        self.tokens += torch.where(first[-1], one.tokens, 0.0)
        self.passes += first

    def compute(self) -> Tensor:
        """Mean importance per branch over the passes that count; NaN where no token was seen."""
        return self.total / self.tokens


@dataclass(frozen=True)
class Skipped:
    """Forward passes that are not averaged in.

    Args:
        count: Number of passes left out.
        passes: Number of all passes.
        first: The first sublayer whose importance was not finite.
    """

    count: int
    passes: int
    first: str

    def __str__(self) -> str:
        return (
            f"{self.count} of {self.passes} forward passes left out of the importances: one was NaN or infinite, "
            f"first that of {self.first}"
        )


@dataclass(frozen=True)
class LeftOut:
    """What has no importance although it is there, and why.

    Args:
        names: Names of the sublayers and blocks, such as ``attention.3``.
        reason: Why it could not be measured; None if it did not run, or only on padding.
    """

    names: Sequence[str]
    reason: str | None = None

    def __str__(self) -> str:
        names = ", ".join(self.names) or "some forward passes"
        return f"{names} left out of the importances: {self.reason or 'it did not run, or only on padding'}"


@dataclass(frozen=True)
class Means:
    """The running sums of all ranks, read.

    Args:
        values: Mean importance by place; NaN where no token was seen.
        tokens: Number of tokens by place.
        passes: Number of forward passes.
        skipped: The passes that were left out; None if all count.
    """

    values: Sequence[float]
    tokens: Sequence[float]
    passes: int
    skipped: Skipped | None


class RunningSums:
    """Updates a metric with each forward pass, and keeps sums over the passes.

    Args:
        metric_class: The importance metric.
        names: Name of every place that is measured, in forward order.
    """

    def __init__(self, metric_class: type[ImportanceMetric], names: Sequence[str]) -> None:
        self._names = names
        self._pass, self._sums = metric_class(len(names)), PassSums(len(names))
        self._pending = False

    def add(self, place: int, x: Tensor, branch: Tensor, mask: Tensor | None) -> None:
        """Add one branch of the running pass.

        Args:
            place: Index of the branch.
            x: Its input X, shape (batch, tokens, hidden).
            branch: b in Y = X + b, of the same shape.
            mask: True where a token counts, shape (batch, tokens); None counts all.
        """
        self.move(x.device)
        self._pending = True
        with torch.no_grad():
            self._pass.update(x, branch, mask, place)

    def end_pass(self) -> None:
        """Add the last forward pass to the sums, if there is one."""
        if not self._pending:
            return
        self._pending = False
        with torch.no_grad():
            self._sums.update(self._pass)
        self._pass.total.zero_()  # in place: under inference mode new tensors would never be written to again
        self._pass.tokens.zero_()

    def reset(self) -> None:
        """Forget every pass."""
        self._pass.reset()
        self._sums.reset()
        self._pending = False

    def means(self) -> Means:
        """The means over all passes of all ranks."""
        self.end_pass()
        sums = self._sums
        with sums.sync_context():
            read = torch.cat([sums.total / sums.tokens, sums.tokens, sums.passes]).tolist()  # the host waits once
        places = len(self._names)
        values, tokens, passes = read[:places], read[places : 2 * places], read[2 * places :]
        return Means(values, tokens, int(sum(passes)), self._skipped(passes))

    def move(self, device: torch.device) -> None:
        """Keep the sums on the device of the activations, so that no measured pass waits for a transfer."""
        # Apple's GPUs know no float64: their sums stay on the CPU
        home = torch.device("cpu") if device.type == "mps" else device
        for metric in (self._pass, self._sums):
            if metric.device != home:
                metric.to(home)

    def state_dict(self) -> dict[str, list[float]]:
        """The sums of this rank as plain numbers, exact."""
        self.end_pass()
        return {name: getattr(self._sums, name).tolist() for name in _STATES}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """The inverse of :meth:`state_dict`.

        Raises:
            CheckpointError: If the sums are those of another number of branches.
        """
        self.reset()
        if any(len(state.get(name, ())) != len(getattr(self._sums, name)) for name in _STATES):
            raise CheckpointError(
                f"The saved importances are not of this model: it has {len(self._names)} sublayers and blocks. Resume "
                "with the model that was saved."
            )
        for name in _STATES:
            own = getattr(self._sums, name)
            setattr(self._sums, name, torch.tensor(state[name], dtype=own.dtype, device=own.device))

    def _skipped(self, passes: Sequence[float]) -> Skipped | None:
        """The passes left out, from their numbers by the first place that was not finite."""
        *left_out, _ = passes
        first = next((place for place, count in enumerate(left_out) if count), None)
        return None if first is None else Skipped(int(sum(left_out)), int(sum(passes)), self._names[first])
