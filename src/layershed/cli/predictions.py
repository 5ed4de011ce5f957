"""``train.py predict``: continues held-out text with a model, or writes its logits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from safetensors.torch import save_file
from torch import Tensor, nn

from layershed.errors import DataError
from layershed.files.atomic import write_text

What = Literal["text", "logits"]


def continuations(model: nn.Module, input_ids: Tensor, prompt_tokens: int, new_tokens: int) -> Tensor:
    """The most likely next tokens after the beginning of each row, one at a time, by the model's own ``generate``.

    Args:
        model: A Hugging Face causal language model.
        input_ids: Token ids, shape (rows, tokens).
        prompt_tokens: How many tokens of each row to continue.
        new_tokens: Tokens to add.

    Returns:
        The added tokens, shape (rows, at most ``new_tokens``).
    """
    prompt = input_ids[:, :prompt_tokens]
    end = model.generation_config.eos_token_id  # type: ignore[union-attr]
    pad = end[0] if isinstance(end, Sequence) else end
    made: Tensor = model.generate(  # type: ignore[operator]
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=new_tokens, pad_token_id=pad
    )
    return made[:, prompt.shape[1] :]


class PredictionFile(BasePredictionWriter):
    """Writes what a model predicts for the held-out text.

    Writes: ``predictions.jsonl``, a line for each row with prompt, generated and true continuation; or, for logits,
    ``logits/BATCH.safetensors`` with ``input_ids`` (rows, tokens) and ``logits`` (rows, tokens, vocabulary). Of
    several processes each writes its own, with its rank in the name.

    Args:
        what: ``text`` or ``logits``.
        prompt_tokens: Tokens of each row to continue; None for half of a row.
        new_tokens: Tokens to generate.

    Raises:
        DataError: If a number is below 1, or the rows are not longer than the prompt.
    """

    def __init__(self, what: What, prompt_tokens: int | None, new_tokens: int) -> None:
        super().__init__("batch")
        for name, number in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens)):
            if number is not None and number < 1:
                raise DataError(f"predict: {name}={number}: it must be at least 1.")
        self.what, self.prompt_tokens, self.new_tokens = what, prompt_tokens, new_tokens
        self._lines: list[str] = []
        self._folder = Path()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the run directory."""
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective: call it on all ranks
        self._lines = []

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
        ids = batch["input_ids"]
        if self.what == "logits":
            self._folder.joinpath("logits").mkdir(parents=True, exist_ok=True)
            tensors = {"input_ids": ids.cpu().contiguous(), "logits": prediction.cpu().contiguous()}
            save_file(tensors, self._folder / "logits" / f"{batch_idx:05d}{rank}.safetensors")
            return
        tokenizer, cut = trainer.datamodule.tokenizer, self.cut(ids)  # type: ignore[attr-defined]
        for row, made in zip(ids.tolist(), prediction.tolist(), strict=True):
            parts = {"prompt": row[:cut], "generated": made, "true": row[cut : cut + self.new_tokens]}
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
            print(f"Predictions: {path}")

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        """What ``predict_step`` returns for a batch: the generated tokens, or the logits."""
        ids: Tensor = batch["input_ids"]
        if self.what == "logits":
            logits: Tensor = model(input_ids=ids, use_cache=False).logits
            return logits
        return continuations(model, ids, self.cut(ids), self.new_tokens)

    def cut(self, input_ids: Tensor) -> int:
        """How many tokens of each row are the prompt."""
        cut = self.prompt_tokens or max(1, input_ids.shape[1] // 2)
        if cut > input_ids.shape[1]:
            raise DataError(
                f"predict: prompt_tokens={cut}: the rows have only {input_ids.shape[1]} tokens (data.block_size); "
                "lower it."
            )
        return cut
