"""Quality: mean loss and next-token accuracy of a causal language model, or what a module's own validation says."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import Metric

from layershed.arguments import check_most
from layershed.batches import (
    TokenIdRange,
    as_inputs,
    device_of,
    iterate,
    refuse_skeleton,
    same_shape,
    select,
    text_inputs,
)
from layershed.discovery.find import find_transformer, predicts_next_token
from layershed.discovery.probe import evaluating
from layershed.errors import BatchError, MeasurementError
from layershed.progress import least, track


@dataclass(frozen=True)
class Quality:
    """Result of :func:`evaluate_quality`.

    Args:
        loss: Mean cross-entropy per predicted token, in nats.
        accuracy: Share of tokens whose most likely prediction is right, in [0, 1].
        tokens: Number of predicted tokens of all ranks.
    """

    loss: float
    accuracy: float
    tokens: int

    @property
    def values(self) -> dict[str, float]:
        """Loss and accuracy by name."""
        return {"loss": self.loss, "accuracy": self.accuracy}


@dataclass(frozen=True)
class OwnQuality:
    """What the validation of a user's own module says.

    Args:
        values: Means over the rows of the batches, by name: ``loss``, and the metric that was asked for.
    """

    values: dict[str, float]


AnyQuality = Quality | OwnQuality


@dataclass(frozen=True)
class RoundQuality:
    """The quality around one round of drops.

    Args:
        step: The optimizer step.
        before: The quality before the round; None if it was not measured.
        after: The quality right after it.
    """

    step: int
    before: AnyQuality | None = None
    after: AnyQuality | None = None


def evaluate_quality(
    model: nn.Module, batches: Iterable[Any], *, max_batches: int | None = None, name: str | None = None
) -> Quality:
    """Measure the next-token loss and accuracy of the model in its current state, in eval mode, without gradients.

    In a distributed run every rank gets the means over the batches of all ranks.

    Args:
        model: A causal language model, or a module that holds one.
        batches: Mappings with ``input_ids`` of shape (batch, tokens), or the token ids alone. Optional entries of the
            same shape are ``labels`` (-100 is ignored), ``attention_mask`` (0 is ignored) and ``position_ids``.
        max_batches: Maximum number of batches; None takes all.
        name: Path of the transformer inside ``model``; needed if the model holds several.

    Returns:
        Means over tokens, not over batches.

    Raises:
        BatchError: If a batch does not fit the model, such as labels of another shape.
        MeasurementError: If ``max_batches`` is below 1, the model does not predict the next token, or the batches hold
            no token to predict.
    """
    check_most(max_batches, "max_batches", MeasurementError)
    transformer = find_transformer(model, name=name)
    check_head(transformer)
    refuse_skeleton(transformer)
    ids, sums = TokenIdRange(transformer), _Sums(device_of(transformer))
    with evaluating(transformer), torch.no_grad():
        for batch in track(iterate(batches, max_batches), "Measuring quality", least(batches, max_batches)):
            sums.update(*predictions_of(transformer, *read_batch(transformer, batch, ids)))
    loss, hits, tokens = sums.read(ids)
    if tokens == 0:
        raise MeasurementError(
            "evaluate_quality: there is no token to predict, as the batches are empty (a generator can be read only "
            "once) or every label is ignored. Check the data."
        )
    return Quality(loss / tokens, hits / tokens, tokens)


def check_head(transformer: nn.Module) -> None:
    """Refuse a model whose quality cannot be measured, without running it.

    Raises:
        MeasurementError: If the model does not predict the next token.
    """
    if not predicts_next_token(transformer):
        raise MeasurementError(
            f"{type(transformer).__name__} does not predict the next token, so this quality cannot be measured. "
            "Use a causal language model. SublayerDrop measures other models by the module's own validation."
        )


def reads_as_text(batch: Any, transformer: nn.Module) -> bool:
    """Whether :func:`evaluate_quality` can read a batch for this model, judged by its form, without running it."""
    if not predicts_next_token(transformer):
        return False
    inputs = as_inputs(batch)
    if inputs is None or not isinstance(inputs["input_ids"], Tensor):
        return False
    shapes = {value.shape for key in ("labels", "attention_mask") if isinstance(value := inputs.get(key), Tensor)}
    return shapes <= {inputs["input_ids"].shape}


def read_batch(transformer: nn.Module, batch: Any, ids: TokenIdRange) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs of a batch that a causal language model reads, and its labels if it has some, on its device.

    Raises:
        BatchError: If the batch does not fit the model.
    """
    inputs = text_inputs(batch, transformer, ids=ids)
    for name in ("labels", "attention_mask"):
        same_shape(inputs, name)
    device = device_of(transformer)
    labels = select(inputs, ["labels"], device)
    # packed sequences say by their positions where one ends
    known = {"position_ids"} & set(inspect.signature(transformer.forward).parameters)
    return select(inputs, ["input_ids", "attention_mask", *known], device), labels


def predictions_of(
    transformer: nn.Module, inputs: dict[str, Any], labels: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, targets and which of them count, all of shape (batch, tokens - 1, ...)."""
    output = transformer(**inputs, use_cache=False)
    targets = labels.get("labels", inputs["input_ids"])[:, 1:].long()
    counted = targets != -100
    if "attention_mask" in inputs:
        # a token counts if neither it nor the token before it is padding
        counted &= inputs["attention_mask"][:, 1:].bool() & inputs["attention_mask"][:, :-1].bool()
    return output.logits[:, :-1], targets, counted


class _Sums(Metric):
    """Loss, hits and tokens of all batches and ranks, summed on their device. The host waits once, in :meth:`read`.

    Args:
        device: The device of the logits.
    """

    full_state_update = False
    sums: Tensor
    ends: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._dtype_of_sums = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        self.add_state("sums", torch.zeros(3, dtype=self._dtype_of_sums, device=device), dist_reduce_fx="sum")
        # the highest of: labels, negative; labels; token ids, negative; token ids
        unseen = torch.full((4,), -torch.inf, dtype=self._dtype_of_sums, device=device)
        self.add_state("ends", unseen, dist_reduce_fx="max")
        self._labels = 0

    def update(self, logits: Tensor, targets: Tensor, counted: Tensor) -> None:
        """Add a batch; shapes as of :func:`predictions_of`."""
        if not targets.numel():
            return
        self._labels, far = logits.shape[-1], torch.iinfo(torch.int32).max
        lowest = torch.where(counted, targets, far).min()
        highest = torch.where(counted, targets, -far).max()
        self._note(torch.stack([-lowest, highest]), 0)
        targets = torch.where(counted, targets, 0).clamp(0, self._labels - 1)  # a GPU's process survives no others
        logits = logits.flatten(0, 1).float()
        losses = cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)
        hits = logits.argmax(-1).view_as(targets) == targets
        # where, not multiplication or selection: padding may hold a NaN, and the host would wait for a number of tokens
        columns = (torch.where(counted, values, 0).to(self._dtype_of_sums).sum() for values in (losses, hits, counted))
        self.sums = self.sums + torch.stack(list(columns))

    def compute(self) -> Tensor:
        """Loss, hits and tokens, shape (3)."""
        return self.sums

    def _note(self, ends: Tensor, place: int) -> None:
        own = self.ends[place : place + 2]
        torch.maximum(own, ends.to(own), out=own)

    def read(self, ids: TokenIdRange) -> tuple[float, float, int]:
        """Wait for the device, and return loss, hits and number of tokens, summed over all ranks.

        Args:
            ids: The range of all token ids that the model read.

        Raises:
            BatchError: If a label or a token id is out of range, on every rank.
        """
        if ids.ends is not None:
            self._note(ids.ends, 2)
        with self.sync_context():
            loss, hits, tokens, lowest, highest, *of_ids = torch.cat([self.sums, self.ends]).tolist()
        if all(map(math.isfinite, of_ids)):
            ids.check(-int(of_ids[0]), int(of_ids[1]))
        if tokens and self._labels and not 0 <= -lowest <= highest < self._labels:
            raise BatchError(
                f"labels of a batch must be -100 or in [0, {self._labels}); got {-lowest:.0f} to {highest:.0f}."
            )
        return loss, hits, int(tokens)
