"""A causal language model as a LightningModule, built from a config, a folder, a hub id or a GGUF file."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.text import Perplexity

from layershed.errors import CheckpointError, OptimizerError, RecoveryError, ScheduleError
from layershed.integration.namespaces import InheritedModule, OptimizerLRSchedulerConfig
from layershed.integration.preflight import waits_for_nothing
from layershed.recovery.distillation import Distillation, check_teacher, self_distillation
from layershed.saving.checkpoint import apply_structure, write_structure
from layershed.saving.load_model import build_model
from layershed.spellings import recompute_activations
from layershed.training.collate import without_labels
from layershed.training.lr_schedule import Schedule, share_of_peak

# as Lightning's command line reads it; its own name for it would import the command line
OptimizerCallable = Callable[[Iterable[Any]], Optimizer]


class CausalLM(InheritedModule):
    """Trains, validates and tests a Hugging Face causal language model.

    Logs ``train_loss`` at every step, and ``val_loss`` / ``val_perplexity`` (``test_...``) over each evaluation.
    Distillation also logs its parts, ``train_lm_loss`` and ``train_divergence``, and ``teacher_seconds`` per step.

    Args:
        pretrained: Model to start from: a local folder (also one that layershed saved), a hub id, or the path of a
            GGUF file. None trains from scratch.
        config: Fields of the model's config, including ``model_type``, for training from scratch. With ``pretrained``,
            fields to override. None without ``pretrained`` builds a 12-block Llama over bytes.
        optimizer: Optimizer class and its arguments.
        schedule: Learning-rate schedule over the whole run, with the formulas of ``transformers.get_scheduler``.
        warmup_steps: Optimizer steps over which the learning rate rises from 0.
        dtype: Type of the weights: ``float32``, ``bfloat16`` or ``float16``.
        gradient_checkpointing: Recompute activations in the backward pass. Saves memory, takes about 30 % more time.
        distillation: How to learn from the dense model (the teacher): weight, temperature and kind of
            layershed.Distillation. None learns from the text only. With adapters (LoRARecovery) the teacher does not
            change; in full recovery its weights are trained too.

    Raises:
        ModelError: If the model cannot be built. The message gives the reason in one sentence.
        LayershedError: Before training, if distillation has no teacher because sublayers were removed.
        ScheduleError: If the warm-up is negative. Before training, if the schedule needs the length of the run and the
            run has no end.
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
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__()
        # primitives only: a class or a function would make the checkpoint unreadable with weights_only=True
        self.save_hyperparameters(ignore=["optimizer", "distillation"])
        given: Any = distillation  # a dict if it comes from a checkpoint
        self.distillation: Distillation | None = Distillation(**given) if isinstance(given, dict) else given
        self.save_hyperparameters({"distillation": None if self.distillation is None else asdict(self.distillation)})
        if warmup_steps < 0:
            raise ScheduleError(f"CausalLM(warmup_steps={warmup_steps}): warmup_steps must be at least 0.")
        self.optimizer, self.schedule, self.warmup_steps = optimizer, schedule, warmup_steps
        self.predicted: Callable[[nn.Module, Any], Any] | None = None  # what predict_step makes of a batch
        self._total_steps = math.inf  # until training starts; the first learning rate does not depend on it
        # transformers loads a folder in eval mode, and Lightning does not change the mode of a module
        self.model = build_model(pretrained, config, getattr(torch, dtype)).train()
        if gradient_checkpointing:
            recompute_activations(self.model)
        self.val_perplexity = Perplexity(ignore_index=-100)
        self.test_perplexity = Perplexity(ignore_index=-100)

    def forward(self, **inputs: Any) -> Any:
        """Call the transformer."""
        return self.model(**inputs)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Mean next-token cross-entropy of a batch, in nats; with distillation mixed with the divergence."""
        if self.distillation is None:
            loss: Tensor = self.model(**batch, use_cache=False).loss
        else:
            parts = self_distillation(self.model, batch, self.distillation)
            loss = parts.loss
            self.log_dict({"train_lm_loss": parts.lm, "train_divergence": parts.divergence})
            self.log("teacher_seconds", parts.teacher_seconds)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_fit_start(self) -> None:
        """Check that distillation has a teacher and a drop to learn from."""
        if self.distillation is not None:
            check_teacher(self.model)
            if waits_for_nothing(self.trainer, self):
                raise RecoveryError(
                    "CausalLM(distillation=...): It starts at the drop, but nothing is dropped and no SublayerDrop is "
                    "listed. Add one, or leave out distillation."
                )

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log loss and perplexity of a validation batch."""
        self._evaluate(batch, "val", self.val_perplexity)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log loss and perplexity of a test batch."""
        self._evaluate(batch, "test", self.test_perplexity)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        """What ``predicted`` makes of the batch; else the most likely next token at each position, (batch, tokens)."""
        if self.predicted is not None:
            return self.predicted(self.model, batch)
        return self.model(**without_labels(batch), use_cache=False).logits.argmax(-1)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build the optimizer of the trainable parameters and its schedule per step."""
        if self.trainer.max_epochs == -1:
            self._count_steps()
        try:
            optimizer = self.optimizer(parameter for parameter in self.parameters() if parameter.requires_grad)
        except ValueError as error:  # torch raises it for every number out of range
            raise OptimizerError(
                f"CausalLM(optimizer=...): torch refuses its arguments ({error}); correct them."
            ) from error
        scheduler = LambdaLR(
            optimizer, lambda step: share_of_peak(self.schedule, step, self.warmup_steps, self._total_steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Read the length of the run: Lightning knows it from here on."""
        self._count_steps()

    def _count_steps(self) -> None:
        steps = self.trainer.estimated_stepping_batches
        self._total_steps = steps if 0 <= steps < math.inf else math.inf
        if self._total_steps == math.inf and not self.schedule.startswith("constant"):
            raise ScheduleError(
                f"CausalLM(schedule={self.schedule!r}): the schedule needs the length of the run; set max_steps or "
                "max_epochs, or use a constant schedule."
            )

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load as torch does; the error for weights that do not fit is one sentence."""
        try:
            return super().load_state_dict(*args, **kwargs)
        except RuntimeError as error:
            where = textwrap.shorten(" ".join(str(error).splitlines()[1:]), 200)
            raise CheckpointError(
                f"The checkpoint's weights do not fit this model ({where}); give the config of its run by --config."
            ) from error

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record what is dropped, quantized and adapted, even if the checkpoint holds the weights only."""
        write_structure(checkpoint, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop, quantize and adapt the model as it was when it was saved."""
        apply_structure(checkpoint, self)

    def _evaluate(self, batch: dict[str, Tensor], stage: str, perplexity: Perplexity) -> None:
        output = self.model(**batch, use_cache=False)
        perplexity.update(output.logits[:, :-1].float(), batch["labels"][:, 1:])
        # a mean over tokens: conversations differ in their labels; a tensor, as int() would wait for the device
        tokens: Any = (batch["labels"][:, 1:] != -100).sum()
        self.log(f"{stage}_loss", output.loss, prog_bar=True, sync_dist=True, batch_size=tokens)
        self.log(f"{stage}_perplexity", perplexity)
