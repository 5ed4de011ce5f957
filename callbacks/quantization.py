"""Quantizes the model in memory while it trains: before recovery (QLoRA), or at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from layershed.callbacks.run import StepCounter, current_drop, publish, rewrap
from layershed.callbacks.structure import (
    callbacks_of,
    carry_structure,
    check_order,
    leave_structure,
    waits_for_nothing,
)
from layershed.discovery import find_transformer
from layershed.errors import QuantizationError, ScheduleError
from layershed.optimizers import forget_quantized
from layershed.quantization import ComputeDtype, Mode, check_mode, quantization_of, quantize, stored_bytes
from layershed.surgery import dropped_sublayers


class Quantization(Callback):
    """Quantizes the linear maps with bitsandbytes, in place, without reloading.

    Hooks: quantizes in ``on_train_batch_end`` once the configured step is done, or in ``on_fit_end``. Before recovery
    list it behind SublayerDrop and before LoRARecovery; at the end behind LoRARecovery, which merges first.
    Logs: ``quantization/bytes_before`` and ``quantization/bytes``, those of the saved weights.
    Checkpoint: nothing of its own; how the model is quantized is noted with the model's state.

    Args:
        mode: ``nf4``, ``fp4`` or ``int8``.
        start: Optimizer steps before it happens; null for the drop, or at once if something is dropped already; or
            ``end``, after training.
        double_quant: Quantize the scales of 4-bit weights, too.
        compute_dtype: Dtype of the products with 4-bit weights; null for the model's own.
        skip_modules: Modules to leave alone, by any part of their path.
        transformer: Path of the transformer in the LightningModule; needed only where it holds more than one.

    Raises:
        UnknownNameError: If there is no such mode.
        ScheduleError: If start has no meaning; before training, if it would never happen or comes out of order.
        QuantizationError: Before training, if nothing but norms and embeddings would be left to train.
    """

    def __init__(
        self,
        mode: Mode = "nf4",
        start: int | Literal["end"] | None = None,
        double_quant: bool = True,
        compute_dtype: ComputeDtype | None = None,
        skip_modules: Sequence[str] = (),
        transformer: str | None = None,
    ) -> None:
        check_mode(mode)
        if start not in (None, "end") and (not isinstance(start, int) or start < 0):
            raise ScheduleError(f"Quantization(start={start!r}): it must be a number of steps, 'end', or nothing.")
        self.mode, self.start, self.transformer = mode, start, transformer
        self.options: dict[str, Any] = {
            "double_quant": double_quant,
            "compute_dtype": compute_dtype,
            "skip_modules": tuple(skip_modules),
        }
        self._steps = StepCounter()

    @property
    def place(self) -> int:
        """In the order drop, quantize, LoRA, export; at the end it comes after the merge."""
        return 4 if self.start == "end" else 2

    @property
    def first_step(self) -> int | None:
        """The step at which it happens; None for that of the drop, or the end."""
        return self.start if isinstance(self.start, int) else None

    @property
    def quantizes_before_recovery(self) -> bool:
        """Whether adapters are trained on quantized weights."""
        return self.start != "end"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have every checkpoint say how the model is quantized."""
        carry_structure(pl_module, self.transformer)
        if stage == "fit" and isinstance(trainer.strategy, ModelParallelStrategy):
            raise QuantizationError(
                "Quantization: bitsandbytes cannot quantize weights that ModelParallelStrategy shards; quantize the "
                "exported model (layershed.quantize)."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give a module in its original state its hooks back."""
        leave_structure(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what this run cannot do, and prepare the optimizers of a resumed run."""
        check_order(trainer)
        if self._done(pl_module):
            forget_quantized(trainer.optimizers, pl_module)
            return
        if self.start is None and waits_for_nothing(trainer, pl_module):
            raise ScheduleError(
                "Quantization(start=None): it waits for a drop, and nothing is dropped, and no SublayerDrop is among "
                "the callbacks; set start to an optimizer step, or to 'end'."
            )
        adapts = any(getattr(callback, "mode", "") == "lora" for callback in callbacks_of(trainer))
        if self.start != "end" and not adapts:
            raise QuantizationError(
                f"Quantization(start={self.start!r}): quantized weights do not train, so that only norms and "
                "embeddings would; add LoRARecovery behind it, or set start='end'."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize at once where nothing is to be waited for."""
        limit = trainer.estimated_stepping_batches
        if isinstance(self.start, int) and limit != float("inf") and self.start >= limit:
            raise ScheduleError(
                f"Quantization(start={self.start}): the run ends after {int(limit)} steps, so that it would never "
                "happen; set start='end'."
            )
        self._steps.start(trainer)
        if self.start == 0 or (self.start is None and dropped_sublayers(pl_module)):
            self._quantize(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Quantize, if it is time."""
        taken = self._steps.taken(trainer)
        if self.start in taken or (self.start is None and current_drop(pl_module)):
            self._quantize(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize what was trained, after the last checkpoint."""
        if self.start == "end":
            self._quantize(trainer, pl_module)

    def _quantize(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._done(pl_module):
            return
        transformer = find_transformer(pl_module, name=self.transformer)
        before = stored_bytes(transformer)
        quantize(transformer, self.mode, **self.options)
        forget_quantized(trainer.optimizers, pl_module)
        if self.start != "end":
            rewrap(trainer, pl_module)
        publish(
            trainer,
            {"quantization/bytes_before": float(before), "quantization/bytes": float(stored_bytes(transformer))},
        )

    def _done(self, pl_module: LightningModule) -> bool:
        return quantization_of(pl_module, name=self.transformer) is not None
