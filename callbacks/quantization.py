"""Quantizes the model in memory during training: before recovery (QLoRA), or at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from layershed.arguments import as_names, plain_number
from layershed.discovery.find import find_transformer
from layershed.errors import QuantizationError, ScheduleError
from layershed.integration.metric_names import BYTES, BYTES_BEFORE
from layershed.integration.module_hooks import carry_structure, leave_structure
from layershed.integration.namespaces import Callback, LightningModule, Trainer, rank_zero_warn
from layershed.integration.preflight import (
    callbacks_of,
    check_order,
    check_start,
    is_trial,
    refuse_averaging,
    waits_for_nothing,
)
from layershed.integration.protocols import TrainsLoRA
from layershed.integration.run import StepCounter, current_drop, publish, rewrap
from layershed.integration.strategies import fit_strategy, is_sharded
from layershed.quantization import (
    ComputeDtype,
    QuantizationMode,
    check_mode,
    check_quantizable,
    quantization_of,
    quantize,
    stored_bytes,
)
from layershed.recovery.optimizer_groups import forget_quantized
from layershed.surgery import dropped_sublayers


class Quantization(Callback):
    """Quantizes the linear maps with bitsandbytes, in place, without reloading.

    Hooks: quantizes in ``on_train_batch_end`` after the configured step, or in ``on_fit_end``. To quantize before
    recovery, list it after SublayerDrop and before LoRARecovery. With ``start: end``, list it after LoRARecovery,
    which merges first.
    Logs: ``quantization/bytes_before`` and ``quantization/bytes``, the size of the saved weights.
    Writes: nothing.
    Checkpoint: nothing of its own. The model's state says how the model is quantized.

    Args:
        mode: ``nf4``, ``fp4`` or ``int8``.
        start: Optimizer steps before it quantizes; null for the drop, or at once if something is already dropped;
            ``end`` for the end of training.
        double_quant: Also quantize the scales of 4-bit weights.
        compute_dtype: Dtype of the products with 4-bit weights; null for the model's own.
        skip_modules: Modules to leave as they are, by the beginning or the end of their paths.
        transformer: Path of the transformer in the LightningModule; needed only if it holds several.

    Raises:
        UnknownNameError: If mode or compute_dtype is unknown.
        ScheduleError: If start is invalid; before training, if it would never quantize or is out of order.
        QuantizationError: Before training, if only norms and embeddings would train, if adapters would stay in a model
            that is quantized at the end, or if the model is already quantized in another mode.
        StrategyError: Before training, if the model cannot change under the Trainer's strategy.
    """

    def __init__(
        self,
        mode: QuantizationMode = "nf4",
        start: int | Literal["end"] | None = None,
        double_quant: bool = True,
        compute_dtype: ComputeDtype | None = None,
        skip_modules: Sequence[str] = (),
        transformer: str | None = None,
    ) -> None:
        check_mode(mode, compute_dtype)
        start = plain_number(start)
        if start not in (None, "end") and (isinstance(start, bool) or not isinstance(start, int) or start < 0):
            raise ScheduleError(f"Quantization(start={start!r}): start must be an optimizer step, 'end' or None.")
        self.mode, self.start, self.transformer = mode, start, transformer
        self.options: dict[str, Any] = {
            "double_quant": double_quant,
            "compute_dtype": compute_dtype,
            "skip_modules": as_names(skip_modules, "skip_modules", QuantizationError),
        }
        self._steps = StepCounter()
        self._done = False

    @property
    def layershed_place(self) -> int:
        """Its place in the order drop, quantize, LoRA, export; with start='end', after the merge."""
        return 4 if self.start == "end" else 2

    @property
    def first_step(self) -> int | None:
        """The step at which it quantizes; None for the drop or the end."""
        return self.start if isinstance(self.start, int) else None

    @property
    def quantizes_before_recovery(self) -> bool:
        """Whether adapters are trained on quantized weights."""
        return self.start != "end"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save in every checkpoint how the model is quantized."""
        if is_sharded(trainer):
            raise QuantizationError(
                "Quantization: bitsandbytes cannot quantize weights that ModelParallelStrategy shards. Leave it out, "
                "and quantize the exported model (layershed.quantize)."
            )
        fit_strategy(trainer, self, pl_module, self.transformer)
        carry_structure(pl_module, self.transformer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the hooks of a module that is in its original state."""
        leave_structure(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same after an error."""
        leave_structure(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what this run cannot do, and prepare the optimizers of a resumed run."""
        check_order(trainer)
        refuse_averaging(trainer, self)
        found = quantization_of(pl_module, name=self.transformer)
        self._done = found is not None
        if found is not None:
            if found.mode != self.mode:
                raise QuantizationError(
                    f"Quantization(mode={self.mode!r}): the model is quantized as {found.mode} already. Call "
                    "layershed.dequantize(model) first, or leave the callback out."
                )
            forget_quantized(trainer.optimizers, pl_module)
            return
        check_quantizable(pl_module, self.options["skip_modules"], name=self.transformer)
        if self.start is None and waits_for_nothing(trainer, pl_module):
            raise ScheduleError(
                "Quantization(start=None): it starts at the drop, but nothing is dropped and no SublayerDrop is "
                "listed. Add one, or set start to an optimizer step or to 'end'."
            )
        lora = [other for other in callbacks_of(trainer) if isinstance(other, TrainsLoRA) and other.trains_lora]
        if self.start == "end" and any(other.keeps_lora for other in lora):
            raise QuantizationError(
                "Quantization(start='end'): LoRARecovery(finish='adapter') leaves its adapters in the model, and "
                "adapters must not be quantized. Set finish='merge', or quantize at the drop."
            )
        if self.start != "end" and not lora:
            raise QuantizationError(
                f"Quantization(start={self.start!r}): quantized weights do not train, so only norms and embeddings "
                "would. List LoRARecovery after it, or set start='end'."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Quantize at once if the start is reached or something is already dropped."""
        if not self._done:
            check_start(trainer, self, self.first_step)
        self._steps.start(trainer)
        if self.start == trainer.global_step or (self.start is None and dropped_sublayers(pl_module)):
            self._quantize(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Quantize if it is time."""
        taken = self._steps.taken(trainer)
        if self._done:
            return
        if self.start in taken or (self.start is None and current_drop(pl_module)):
            self._quantize(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if it never quantized."""
        if self.start != "end" and not self._done and not is_trial(trainer):
            rank_zero_warn("Quantization never happened: the run ended before its start step, or before any drop.")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With start='end', quantize the trained model, after the last checkpoint."""
        if self.start == "end":
            self._quantize(trainer, pl_module)

    def _quantize(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._done:
            return
        self._done = True
        transformer = find_transformer(pl_module, name=self.transformer)
        before = stored_bytes(transformer)
        quantize(transformer, self.mode, **self.options)
        forget_quantized(trainer.optimizers, pl_module)
        if self.start != "end":
            rewrap(trainer, pl_module)
        publish(
            trainer,
            {BYTES_BEFORE: float(before), BYTES: float(stored_bytes(transformer))},
        )
