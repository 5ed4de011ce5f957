"""``train.py predict``: continues held-out text with a model, or writes its logits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from safetensors.torch import save_file
from torch import nn

from layershed.continuation import greedy_continuations, passages_in
from layershed.errors import DataError
from layershed.files.atomic import write_text
from layershed.training.collate import without_labels

What = Literal["text", "logits"]


class PredictionFile(BasePredictionWriter):
    """Writes what a model predicts for the held-out text.

    Writes: ``predictions.jsonl``, a line for each text or conversation with prompt, generated and true continuation;
    or, for logits, ``logits/BATCH.safetensors`` with ``input_ids`` (rows, tokens), ``logits`` (rows, tokens,
    vocabulary), and the ``position_ids`` or the ``attention_mask`` that keep conversations apart. Of several processes
    each writes its own, with its rank in the name.

    Args:
        what: ``text`` or ``logits``.
        prompt_tokens: Tokens of each text or conversation to continue. None for half of a text, and for what precedes
            the last answer of a conversation.
        new_tokens: Tokens to generate.

    Raises:
        DataError: If a number is below 1, or no text is longer than the prompt.
    """

    def __init__(self, what: What, prompt_tokens: int | None, new_tokens: int) -> None:
        super().__init__("batch")
        for name, number in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens)):
            if number is not None and number < 1:
                raise DataError(f"predict: {name}={number}: it must be at least 1.")
        self.what, self.prompt_tokens, self.new_tokens = what, prompt_tokens, new_tokens
        self._lines: list[str] = []
        self._short = 0
        self._folder = Path()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the run directory."""
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective: call it on all ranks
        self._lines, self._short = [], 0
        size = trainer.datamodule.block_size  # type: ignore[attr-defined]
        if self.what == "text" and self.prompt_tokens is not None and self.prompt_tokens >= size:
            raise DataError(
                f"predict: prompt_tokens={self.prompt_tokens}: the rows have only {size} tokens (data.block_size), and "
                "one must follow the prompt; lower it."
            )

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the logits of a batch, or keep its lines."""
        rank = f".rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        if self.what == "logits":
            self._folder.joinpath("logits").mkdir(parents=True, exist_ok=True)
            tensors = {**without_labels(batch), "logits": prediction}
            tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            save_file(tensors, self._folder / "logits" / f"{batch_idx:05d}{rank}.safetensors")
            return
        tokenizer, pairs = trainer.datamodule.tokenizer, self._pairs(batch)  # type: ignore[attr-defined]
        self._short += len(passages_in(batch)) - len(pairs)
        for (prompt, true), made in zip(pairs, prediction, strict=True):
            parts = {"prompt": prompt, "generated": made, "true": true}
            texts = {name: tokenizer.decode(tokens, skip_special_tokens=True) for name, tokens in parts.items()}
            self._lines.append(json.dumps(texts, ensure_ascii=False))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the lines, and say where they are."""
        rank = f".rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = self._folder / ("logits" if self.what == "logits" else f"predictions{rank}.jsonl")
        if self.what == "text":
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, "".join(f"{line}\n" for line in self._lines))
        if trainer.is_global_zero:
            for name, text in json.loads(self._lines[0]).items() if self._lines else ():
                print(f"{name}: {' '.join(text.split())[:300]}")
            if self._short:
                print(f"left out: {self._short} of at most {self.prompt_tokens} tokens (prompt_tokens)")
            print(f"Predictions: {path}")

    def predict(self, model: nn.Module, batch: Any) -> Any:
        """What ``predict_step`` returns for a batch: the generated tokens of each prompt, or the logits."""
        if self.what == "logits":
            return model(**without_labels(batch), use_cache=False).logits
        return greedy_continuations(model, [prompt for prompt, _ in self._pairs(batch)], self.new_tokens)

    def _pairs(self, batch: Any) -> list[tuple[list[int], list[int]]]:
        """The prompts of a batch, and what follows them; without what is no longer than the prompt."""
        found = []
        for passage in passages_in(batch):
            cut = self.prompt_tokens or passage.begin
            if cut < passage.end:
                found.append((passage.ids[:cut], passage.ids[cut : min(passage.end, cut + self.new_tokens)]))
        return found
