"""What a causal language model writes after prompts of the validation text, before the drop and at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from layershed.batches import as_inputs
from layershed.continuation import greedy_continuations, passages_in
from layershed.discovery.find import find_transformer, predicts_next_token
from layershed.integration.loaders import validation_batches
from layershed.integration.namespaces import DDPStrategy, LightningModule, Trainer
from layershed.integration.preflight import callbacks_of
from layershed.integration.protocols import Drops
from layershed.reporting.record import Sample

_BYTES = 512  # a vocabulary this small has a token for a letter or two
_TOKENS = {True: 64, False: 32}  # of a prompt, and of what follows it


class Samples:
    """Prompts and their continuations. Nothing is drawn at random, and the model is as before.

    Args:
        number: How many prompts.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.prompts: list[list[int]] = []
        self.dense: list[str] = []

    def due(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether the next step may drop for the first time; between two steps, no importance is being measured."""
        firsts = [other.schedule.steps[0] for other in callbacks_of(trainer) if isinstance(other, Drops)]
        wanted = self.number > 0 and not self.prompts and pl_module.automatic_optimization
        return wanted and bool(firsts) and trainer.global_step == min(firsts) - 1 and _whole(trainer)

    def write_dense(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the prompts, and write before the drop; call it on every rank."""
        batches = validation_batches(trainer)
        first = None if batches is None else next(batches, None)
        writer = _writer(trainer, pl_module)
        inputs = as_inputs(first)
        ids = None if inputs is None else inputs.get("input_ids")
        if writer is None or inputs is None or not isinstance(ids, Tensor) or ids.ndim != 2:
            return
        model, tokenizer = writer
        self.prompts = _prompts(inputs, model, tokenizer)[: self.number]
        if self.prompts:
            self.dense = _written(trainer, model, tokenizer, self.prompts)

    def samples(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Sample, ...]:
        """Write at the end."""
        writer = _writer(trainer, pl_module) if self.prompts and _whole(trainer) else None
        if writer is None:
            return ()
        model, tokenizer = writer
        dropped = _written(trainer, model, tokenizer, self.prompts)
        prompts = [_text(tokenizer, prompt) for prompt in self.prompts]
        return tuple(Sample(*texts) for texts in zip(prompts, self.dense, dropped, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The prompts and what was written, as primitives."""
        return {"prompts": [list(prompt) for prompt in self.prompts], "dense": list(self.dense)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.prompts, self.dense = state["prompts"], state["dense"]


def _whole(trainer: Trainer) -> bool:
    """Whether a rank holds the whole model, so that it can write alone."""
    return trainer.world_size == 1 or isinstance(trainer.strategy, DDPStrategy)


def _writer(trainer: Trainer, pl_module: LightningModule) -> tuple[Any, Any] | None:
    """The model and its tokenizer, if it is a causal language model that can write."""
    owners = (getattr(trainer, "datamodule", None), pl_module)
    tokenizer = next(filter(None, (getattr(owner, "tokenizer", None) for owner in owners)), None)
    transformer: nn.Module = find_transformer(pl_module)
    able = predicts_next_token(transformer) and hasattr(transformer, "generate") and hasattr(tokenizer, "decode")
    return (transformer, tokenizer) if able else None


def _length(tokenizer: Any) -> int:
    return _TOKENS[len(tokenizer) <= _BYTES] if hasattr(tokenizer, "__len__") else _TOKENS[False]


def _prompts(inputs: Mapping[str, Any], model: Any, tokenizer: Any) -> list[list[int]]:
    """Beginnings of the texts of a batch, or its conversations without their last answers."""
    length, most = _length(tokenizer), _most(model)
    cuts = [(one.ids, one.begin if one.answered else min(length, one.begin)) for one in passages_in(inputs)]
    return [ids[:cut] for ids, cut in cuts if cut < most]


def _most(model: Any) -> float:
    """Number of positions of a model."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def _written(trainer: Trainer, model: Any, tokenizer: Any, prompts: list[list[int]]) -> list[str]:
    """The continuations, by the most likely next token."""
    longest = max(map(len, prompts))
    new = int(min(_length(tokenizer), longest, _most(model) - longest))
    with trainer.precision_plugin.forward_context():
        return [_text(tokenizer, row) for row in greedy_continuations(model, prompts, new)]


def _text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))
