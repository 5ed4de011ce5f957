"""Quality: mean loss and next-token accuracy of a causal language model, or what a module's own validation says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, SumMetric

from layershed.batches import as_inputs, device_of, iterate, refuse_skeleton, same_shape, select, text_inputs
from layershed.discovery.find import find_transformer, predicts_next_token
from layershed.discovery.probe import evaluating
from layershed.errors import BatchError, MeasurementError


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


def evaluate_quality(
    model: nn.Module, batches: Iterable[Any], *, max_batches: int | None = None, name: str | None = None
) -> Quality:
    """Measure the next-token loss and accuracy of the model in its current state, in eval mode, without gradients.

    In a distributed run every rank gets the means over the batches of all ranks.

    Args:
        model: A causal language model, or a module that holds one.
        batches: Mappings with ``input_ids`` of shape (batch, tokens), or the token ids alone. Optional entries of the
            same shape are ``labels`` (-100 is ignored) and ``attention_mask`` (0 is ignored).
        max_batches: Maximum number of batches; None takes all.
        name: Path of the transformer inside ``model``; needed if the model holds several.

    Returns:
        Means over tokens, not over batches.

    Raises:
        BatchError: If a batch does not fit the model, such as labels of another shape.
        MeasurementError: If ``max_batches`` is below 1, the model does not predict the next token, or the batches hold
            no token to predict.
    """
    if max_batches is not None and not (isinstance(max_batches, int) and max_batches >= 1):
        raise MeasurementError(f"max_batches={max_batches!r}: it must be at least 1, or None for all batches.")
    transformer = find_transformer(model, name=name)
    check_head(transformer)
    refuse_skeleton(transformer)
    device = device_of(transformer)
    # by default torchmetrics leaves NaN out of the mean
    loss, accuracy = (MeanMetric(nan_strategy=float("nan")).to(device) for _ in range(2))
    # Apple's GPUs have no float64
    counted = SumMetric().set_dtype(torch.float32 if device.type == "mps" else torch.float64).to(device)
    # a rank without tokens must still update, as other ranks may have some
    loss.update(0.0, 0.0)
    accuracy.update(0.0, 0.0)
    counted.update(0.0)
    with evaluating(transformer), torch.no_grad():
        for batch in iterate(batches, max_batches):
            logits, targets = _predictions(transformer, batch)
            if targets.numel() == 0:
                continue
            counted.update(targets.numel())
            loss.update(cross_entropy(logits, targets, reduction="mean"), targets.numel())
            accuracy.update((logits.argmax(-1) == targets).float().mean(), targets.numel())
    tokens = int(counted.compute())  # summed over all ranks, so that they agree
    if tokens == 0:
        raise MeasurementError(
            "evaluate_quality: there is no token to predict, as the batches are empty (a generator can be read only "
            "once) or every label is ignored. Check the data."
        )
    return Quality(loss.compute().item(), accuracy.compute().item(), tokens)


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


def _predictions(transformer: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Return logits of shape (predicted tokens, vocabulary) and targets of shape (predicted tokens)."""
    inputs = text_inputs(batch, transformer)
    for name in ("labels", "attention_mask"):
        same_shape(inputs, name)
    device = device_of(transformer)
    labels = select(inputs, ["labels"], device)
    inputs = select(inputs, ["input_ids", "attention_mask"], device)
    output = transformer(**inputs, use_cache=False)
    targets = labels.get("labels", inputs["input_ids"])[:, 1:].long()
    counted = targets != -100
    if "attention_mask" in inputs:
        # a token counts if neither it nor the token before it is padding
        counted &= inputs["attention_mask"][:, 1:].bool() & inputs["attention_mask"][:, :-1].bool()
    logits, targets = output.logits[:, :-1][counted].float(), targets[counted]
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[-1]:
        raise BatchError(
            f"labels of a batch must be -100 or in [0, {logits.shape[-1]}); got {int(targets.min())} to "
            f"{int(targets.max())}."
        )
    return logits, targets
