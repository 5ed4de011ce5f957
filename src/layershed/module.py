"""A causal language model as a LightningModule: from a config, a folder, a hub id or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torchmetrics.text import Perplexity
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, get_scheduler

from layershed.checkpoint import apply_dropped, write_dropped
from layershed.errors import ModelError
from layershed.export import load_config, load_pretrained, skipped_in

Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine"]

QUICKSTART_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


class CausalLM(pl.LightningModule):
    """Trains, validates and tests a Hugging Face causal language model.

    Logs ``train_loss`` at every step, and ``val_loss`` / ``val_perplexity`` (``test_...``) over each evaluation.

    Args:
        pretrained: What to start from: a local folder (also one that layershed saved), a hub id, or the path of a
            GGUF file. None trains from scratch.
        config: Fields of the model's config, ``model_type`` among them, for training from scratch; with
            ``pretrained``, fields to override. None without ``pretrained`` is a 12-block Llama over bytes.
        optimizer: Optimizer class and its arguments.
        schedule: Learning-rate schedule over the whole run, by its name in ``transformers.get_scheduler``.
        warmup_steps: Optimizer steps over which the learning rate rises from 0.
        dtype: Weights as ``float32``, ``bfloat16`` or ``float16``.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about 30 % more time.

    Raises:
        ModelError: If the model cannot be built; says why in one sentence.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        config: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule = "cosine",
        warmup_steps: int = 0,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.optimizer, self.schedule, self.warmup_steps = optimizer, schedule, warmup_steps
        self.model = build_model(pretrained, config, getattr(torch, dtype))
        if gradient_checkpointing:
            self.model.activation_checkpointing_enable()
        self.val_perplexity = Perplexity(ignore_index=-100)
        self.test_perplexity = Perplexity(ignore_index=-100)

    def forward(self, **inputs: Any) -> Any:
        """The transformer's own forward."""
        return self.model(**inputs)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean next-token cross-entropy of a batch, in nats."""
        loss: Tensor = self.model(**batch, use_cache=False).loss
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Loss and perplexity of a validation batch."""
        self._evaluate(batch, "val", self.val_perplexity)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Loss and perplexity of a test batch."""
        self._evaluate(batch, "test", self.test_perplexity)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The most likely next token at every position, shape (batch, tokens)."""
        return self.model(input_ids=batch["input_ids"], use_cache=False).logits.argmax(-1)

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer over what is trainable, and its schedule by step."""
        optimizer = self.optimizer(parameter for parameter in self.parameters() if parameter.requires_grad)
        scheduler = get_scheduler(
            self.schedule,
            optimizer,
            num_warmup_steps=self.warmup_steps,
            num_training_steps=int(self.trainer.estimated_stepping_batches),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what is bypassed, also in a checkpoint of the weights alone."""
        write_dropped(checkpoint, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Become the dropped model that was saved; never the dense one in silence."""
        apply_dropped(checkpoint, self)

    def _evaluate(self, batch: dict[str, Tensor], stage: str, perplexity: Perplexity) -> None:
        output = self.model(**batch, use_cache=False)
        perplexity.update(output.logits[:, :-1].float(), batch["labels"][:, 1:])
        self.log(f"{stage}_loss", output.loss, prog_bar=True, sync_dist=True, batch_size=len(batch["input_ids"]))
        self.log(f"{stage}_perplexity", perplexity)


def build_model(
    pretrained: str | None = None, config: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A causal language model; the arguments are those of :class:`CausalLM`.

    Raises:
        ModelError: If it cannot be built.
    """
    if pretrained is None:
        return _from_scratch(QUICKSTART_CONFIG if config is None else config, dtype)
    path = Path(pretrained)
    if path.suffix == ".gguf":
        return _from_gguf(path, config or {}, dtype)
    if pretrained.startswith((".", "/", "~")) and not path.is_dir():
        raise ModelError(f"pretrained={pretrained!r}: there is no such folder.")
    overrides = {**(config or {}), "dtype": dtype}
    if skipped_in(load_config(pretrained)):
        return load_pretrained(pretrained, dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(pretrained, **overrides)


def _from_scratch(fields: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ModelError("config: it needs a model_type, such as llama, to train from scratch.")
    try:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields), dtype=dtype)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"config: no causal language model can be built from it ({reason}).") from error


def _from_gguf(path: Path, fields: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    if not path.is_file():
        raise ModelError(f"pretrained={str(path)!r}: there is no such GGUF file.")
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype, **fields)
    except ImportError:
        raise ModelError("Reading GGUF needs one more package: pip install 'layershed[gguf]'.") from None
    # the weights are dequantized: what is left of the file's quantization would forbid saving
    del model.config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)
    return model
