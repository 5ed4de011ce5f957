"""Measuring importance: hooks that feed a metric during forward passes. Nothing here changes a weight."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layershed.batches import as_inputs, describe, select
from layershed.discovery import Branch, find_branches, find_transformer
from layershed.errors import CalibrationError
from layershed.metrics import get_metric
from layershed.overrides import first_tensor
from layershed.plan import ImportanceScores
from layershed.probe import evaluating, probing
from layershed.surgery import bypassed_sublayers


def estimate_importance(
    model: nn.Module,
    batches: Iterable[Any],
    metric: str = "cosine",
    *,
    max_batches: int | None = None,
    name: str | None = None,
) -> ImportanceScores:
    """Importance of every sublayer and every block that still runs, from one forward pass over the batches.

    Runs in eval mode without gradients, and without the language-model head. Keeps running sums, never activations,
    so that memory does not depend on the number of tokens. In a distributed run every rank gets the scores over the
    batches of all ranks.

    Args:
        model: A transformer, or a module that holds one.
        batches: Mappings with ``input_ids`` of shape (batch, tokens), and ``attention_mask`` where there is padding; or
            the token ids alone.
        metric: ``"cosine"`` (the paper's), ``"relative_magnitude"``, ``"angular"`` or one of your own in ``METRICS``.
        max_batches: Stop after that many batches; None takes all.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Returns:
        Importance by sublayer, and by block in ``.blocks``; low means redundant.

    Raises:
        UnknownNameError: If there is no such metric.
        CalibrationError: If there is no batch, a batch has no ``input_ids``, or every token is padding.
    """
    transformer = find_transformer(model, name=name)
    tracker = ImportanceTracker(transformer, metric)
    body = transformer.base_model
    with tracker, evaluating(transformer), torch.no_grad():
        tracker.active = True
        for batch in islice(batches, max_batches):
            body(**_model_inputs(batch, body), use_cache=False)
    return tracker.compute()


class ImportanceTracker:
    """Hooks on a model that measure importance during whatever forward passes happen while it is active.

    Register them before ``torch.compile`` sees the model: later hooks are ignored there without a word.

    Args:
        model: A transformer, or a module that holds one.
        metric: Name of the importance metric.
        name: Path of the transformer inside ``model``, needed where it holds more than one.
    """

    def __init__(self, model: nn.Module, metric: str = "cosine", *, name: str | None = None) -> None:
        self.metric = metric
        metric_class = get_metric(metric)
        self._transformer = find_transformer(model, name=name)
        self._branches = find_branches(self._transformer)
        self._last_of_block = {branch.sublayer.block: index for index, branch in enumerate(self._branches)}
        self._blocks = list(self._last_of_block)
        self._sums = metric_class(len(self._branches) + len(self._blocks))
        self._handles: list[RemovableHandle] = []
        self._x: dict[int, Tensor] = {}
        self._block_sum: tuple[Tensor, Tensor] | None = None
        self._seen: set[int] = set()
        self._mask: Tensor | None = None
        self.active = False

    def __enter__(self) -> ImportanceTracker:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Register the hooks; they do nothing until ``active`` is set."""
        body = self._transformer.base_model
        self._handles = [body.register_forward_pre_hook(self._start_pass, with_kwargs=True)]
        for index, branch in enumerate(self._branches):
            entry, leave = (self._transformer.get_submodule(path) for path in (branch.entry, branch.exit))
            self._handles += [
                entry.register_forward_pre_hook(partial(self._enter_branch, index), with_kwargs=True),
                leave.register_forward_hook(partial(self._leave_branch, index, branch)),
            ]

    def detach(self) -> None:
        """Remove the hooks; what was measured stays, and no activation does."""
        self.active = False
        self._forget_pass()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def reset(self) -> None:
        """Forget what was measured."""
        self._sums.reset()

    def compute(self) -> ImportanceScores:
        """The importances over everything seen since the last reset, over all ranks.

        Raises:
            CalibrationError: If no token was seen.
        """
        bypassed = set(bypassed_sublayers(self._transformer))
        running = [(i, b.sublayer) for i, b in enumerate(self._branches) if b.sublayer not in bypassed]
        values, tokens = self._synced()
        if not running or min(tokens[i] for i, _ in running) == 0:
            raise CalibrationError("No token was seen: the batches are empty, or every token in them is padding.")
        alive = {sublayer.block for _, sublayer in running}
        offset = len(self._branches)
        return ImportanceScores(
            {sublayer: values[i] for i, sublayer in running},
            blocks={block: values[offset + k] for k, block in enumerate(self._blocks) if block in alive},
            metric=self.metric,
            tokens=int(max(tokens)),
        )

    def state_dict(self) -> dict[str, list[float]]:
        """The running sums as plain numbers, exact, for a checkpoint."""
        return {"total": self._sums.total.tolist(), "tokens": self._sums.tokens.tolist()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """The inverse of :meth:`state_dict`."""
        for name in ("total", "tokens"):
            own = getattr(self._sums, name)
            setattr(self._sums, name, torch.tensor(state[name], dtype=own.dtype, device=own.device))
        self._sums._update_count = 1  # as torchmetrics does on loading: an update has happened

    def _synced(self) -> tuple[list[float], list[float]]:
        with self._sums.sync_context():
            return (self._sums.total / self._sums.tokens).tolist(), self._sums.tokens.tolist()

    def _forget_pass(self) -> None:
        """Let go of every tensor of the last forward pass, which an error may have cut short."""
        self._seen.clear()
        self._x.clear()
        self._block_sum = self._mask = None

    def _start_pass(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A new forward pass of the model: take its padding mask, and let every branch count once again."""
        self._forget_pass()
        if not self.active or probing():
            return
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        mask = {**bound, **bound.get("kwargs", {})}.get("attention_mask")
        self._mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def _enter_branch(self, index: int, _module: nn.Module, args: Any, kwargs: Any) -> None:
        # gradient checkpointing runs every block twice: only the first time counts
        if self.active and index not in self._seen and not probing():
            self._x[index] = first_tensor(args, kwargs).detach()

    def _leave_branch(self, index: int, branch: Branch, _module: nn.Module, _args: Any, output: Any) -> None:
        if not self.active or index in self._seen or probing():
            return
        self._seen.add(index)
        x = self._x.pop(index)
        if self._mask is not None and x.ndim == 3:
            # decoding from a cache: the mask covers the past, too
            self._mask = self._mask[:, -x.shape[1] :]
        b = (output[0] if isinstance(output, tuple) else output).detach()
        # Apple's GPUs know no float64: their sums stay on the CPU
        home = torch.device("cpu") if x.device.type == "mps" else x.device
        if self._sums.device != home:
            self._sums.to(home)
        with torch.no_grad():
            self._sums.update(x, b, self._mask, index)
            self._add_to_block(index, branch.sublayer.block, x, b)

    def _add_to_block(self, index: int, block: int, x: Tensor, b: Tensor) -> None:
        """A block's branch is the sum of its sublayers': Y - X of the block, without the rounding of Y."""
        start, total = (x, b) if self._block_sum is None else (self._block_sum[0], self._block_sum[1] + b)
        done = index == self._last_of_block[block]
        self._block_sum = None if done else (start, total)
        if done:
            self._sums.update(start, total, self._mask, len(self._branches) + self._blocks.index(block))


def _model_inputs(batch: Any, body: nn.Module) -> dict[str, Any]:
    """What the model without its head takes from a batch, on the model's device."""
    inputs = as_inputs(batch)
    if inputs is None:
        raise CalibrationError(
            f"A batch must be a mapping with input_ids, or token ids of shape (batch, tokens); got {describe(batch)}."
        )
    names = set(inspect.signature(body.forward).parameters) - {"use_cache"}
    return select(inputs, names, next(body.parameters()).device)
