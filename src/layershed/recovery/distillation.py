"""Self-distillation: a dropped model learns from itself before the drop, with the bypass lifted and LoRA off.

No second model is held. As long as only adapters are trained, the teacher is exactly the model before the drop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from layershed.arguments import check_number
from layershed.batches import as_inputs, describe, device_of, select
from layershed.devices import WallClock, clock_for, has_events
from layershed.discovery.find import find_transformer, predicts_next_token
from layershed.discovery.probe import evaluating
from layershed.errors import RecoveryError, UnknownNameError
from layershed.recovery.lora import adapted_modules, adapters_off
from layershed.surgery import dense, dropped_sublayers

Divergence = Literal["kl", "hidden", "both"]


@dataclass(frozen=True)
class Distillation:
    """How much of the loss comes from the teacher, and how the two are compared.

    Args:
        weight: Weight w of the teacher's part in (1 - w) LM + w KL, in (0, 1].
        temperature: Temperature of both distributions, above 0.
        kind: ``kl``, Kullback-Leibler divergence of the predictions; ``hidden``, relative squared error of the hidden
            states after every block (the last after the final norm); ``both``, their sum.

    Raises:
        RecoveryError: If a number is out of range.
        UnknownNameError: If there is no such kind.
    """

    weight: float = 0.5
    temperature: float = 1.0
    kind: Divergence = "kl"

    def __post_init__(self) -> None:
        check_number(self.weight, "distillation: weight", RecoveryError)
        check_number(self.temperature, "distillation: temperature", RecoveryError)
        if not 0 < self.weight <= 1:
            raise RecoveryError(f"distillation: weight={self.weight} must be in (0, 1]; leave it out for none.")
        if not 0 < self.temperature < math.inf:
            raise RecoveryError(f"distillation: temperature={self.temperature} must be above 0, and finite.")
        if self.kind not in get_args(Divergence):
            raise UnknownNameError("kind of distillation", self.kind, get_args(Divergence))


class SelfDistillation(NamedTuple):
    """A loss and its parts.

    Args:
        loss: (1 - w) LM + w divergence, with gradients.
        lm: The language-model part, next-token cross-entropy in nats; without gradients.
        divergence: The teacher's part; without gradients.
        measure_teacher: Function that returns the seconds of the teacher's forward pass.
    """

    loss: Tensor
    lm: Tensor
    divergence: Tensor
    measure_teacher: Callable[[], float]

    @property
    def teacher_seconds(self) -> float:
        """Time of the teacher's forward pass. On a GPU, reading it waits for that pass."""
        return self.measure_teacher()


def self_distillation_loss(
    model: nn.Module,
    batch: Any,
    *,
    weight: float = 0.5,
    temperature: float = 1.0,
    kind: Divergence = "kl",
    name: str | None = None,
) -> Tensor:
    """Loss of a dropped model against itself before the drop: (1 - w) LM + w KL. For any ``training_step``.

    KL = T^2 sum_v p_v (log p_v - log q_v), the teacher's p = softmax(z_p / T) and the student's q, in the mean over
    the predicted tokens (Hinton et al. 2015, arXiv 1503.02531). The hidden part is the mean over blocks of
    sum (h_q - h_p)^2 / sum h_p^2 over the same tokens, of the last block's output after the final norm.

    Args:
        model: A causal language model, or a module that holds one.
        batch: A mapping with ``input_ids`` of shape (batch, tokens); ``labels`` (-100 ignored) and ``attention_mask``
            (0 ignored) of the same shape are used. Or the token ids alone.
        weight: w, in (0, 1].
        temperature: T, above 0.
        kind: ``"kl"``, ``"hidden"`` or ``"both"``.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Returns:
        A scalar with gradients. If nothing is dropped or adapted, the plain LM loss: the teacher is the student.

    Raises:
        RecoveryError: If an argument is out of range, or the model does not predict the next token.
        PlanError: If a sublayer was removed, so that the teacher cannot come back.
    """
    return self_distillation(model, batch, Distillation(weight, temperature, kind), name=name).loss


def self_distillation(
    model: nn.Module, batch: Any, settings: Distillation, *, name: str | None = None
) -> SelfDistillation:
    """As :func:`self_distillation_loss`, with the parts of the loss and the teacher's cost."""
    transformer = _language_model(model, name)
    inputs, labels = _inputs(batch, transformer)
    wants_hidden = settings.kind != "kl"
    same = not dropped_sublayers(transformer) and not adapted_modules(transformer)
    # without events, waiting for the device would slow training down
    clock = clock_for(labels.device) if has_events(labels.device) else WallClock(torch.device("cpu"))
    start = clock.mark()
    teacher = None if same else _teacher(transformer, inputs, wants_hidden)
    end = clock.mark()
    student = transformer(**inputs, labels=labels, use_cache=False, output_hidden_states=wants_hidden)
    if teacher is None:
        lm = student.loss.detach()
        return SelfDistillation(student.loss, lm, torch.zeros_like(lm), lambda: 0.0)
    counted = _counted(labels)
    divergence = student.logits.new_zeros((), dtype=torch.float32)
    if settings.kind != "hidden":
        divergence = divergence + _kl(student.logits, teacher.logits, counted, settings.temperature)
    if wants_hidden:
        divergence = divergence + _hidden_error(student.hidden_states, teacher.hidden_states, counted)
    loss = (1 - settings.weight) * student.loss + settings.weight * divergence
    return SelfDistillation(loss, student.loss.detach(), divergence.detach(), partial(clock.seconds, start, end))


def check_teacher(model: nn.Module, *, name: str | None = None) -> None:
    """Refuse a model that cannot be its own teacher; call it before training.

    Raises:
        PlanError: If a sublayer was removed.
        RecoveryError: If it does not predict the next token.
    """
    with dense(_language_model(model, name)):
        pass


def _language_model(model: nn.Module, name: str | None) -> nn.Module:
    transformer = find_transformer(model, name=name)
    if not predicts_next_token(transformer):
        raise RecoveryError(f"distillation: {type(transformer).__name__} does not predict the next token.")
    return transformer


def _teacher(transformer: nn.Module, inputs: Mapping[str, Tensor], wants_hidden: bool) -> Any:
    """The output of the model before the drop, without dropout and gradients."""
    with torch.no_grad(), evaluating(transformer), dense(transformer), adapters_off(transformer):
        return transformer(**inputs, use_cache=False, output_hidden_states=wants_hidden)


def _inputs(batch: Any, transformer: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    given = as_inputs(batch)
    if given is None:
        raise RecoveryError(
            f"distillation: a batch must be a mapping with input_ids, or token ids of shape (batch, tokens); got "
            f"{describe(batch)}."
        )
    device = device_of(transformer)
    known = set(signature(transformer.forward).parameters) - {"labels", "use_cache", "output_hidden_states"}
    inputs = select(given, known, device)
    labels = select(given, ["labels"], device).get("labels", inputs["input_ids"])
    if "attention_mask" in inputs:
        labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    return inputs, labels


def _counted(labels: Tensor) -> Tensor:
    """Positions whose next token counts, shape (batch, tokens); the last one has no next token."""
    counted = torch.zeros_like(labels, dtype=torch.bool)
    counted[:, :-1] = labels[:, 1:] != -100
    return counted


def _kl(student: Tensor, teacher: Tensor, counted: Tensor, temperature: float) -> Tensor:
    # summed first, masked afterwards: selecting the counted logits would copy them and scatter their gradients
    scale = 1 / temperature
    log_q, log_p = (log_softmax(z.float() if scale == 1 else z.float() * scale, -1) for z in (student, teacher))
    by_token = kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return temperature**2 * _masked(by_token, counted).sum() / counted.sum()


def _hidden_error(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], counted: Tensor) -> Tensor:
    errors = []
    for own, other in zip(student[1:], teacher[1:], strict=True):
        own, other = (_masked(states.float(), counted.unsqueeze(-1)) for states in (own, other))
        errors.append((own - other).square().sum() / other.square().sum())
    return torch.stack(errors).mean()


def _masked(values: Tensor, counted: Tensor) -> Tensor:
    """The values, zero where they do not count. Selecting them would make the host wait for their number."""
    return torch.where(counted, values, torch.zeros_like(values))
