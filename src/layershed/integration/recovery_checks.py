"""What LoRARecovery refuses before training, and what FSDP2 needs before the weights are sharded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from layershed.arguments import check_number
from layershed.discovery.find import find_transformer
from layershed.errors import CheckpointError, QuantizationError, RecoveryError, ScheduleError
from layershed.integration.lightning_private import lasting_masks
from layershed.integration.namespaces import LightningModule, ModelPruning, Trainer, rank_zero_warn
from layershed.integration.preflight import callbacks_of, waits_for_nothing
from layershed.integration.protocols import Quantizes, Replaces
from layershed.integration.strategies import is_sharded, train_adapters
from layershed.quantization import quantization_of
from layershed.recovery.lora import inject_lora, lora_settings, modules_to_adapt, set_enabled
from layershed.recovery.lora_options import lora_arguments
from layershed.surgery import linear_maps


def check_step(start: int | None) -> None:
    """Refuse a start of LoRARecovery that is no step.

    Raises:
        ScheduleError: If it is not.
    """
    if start is not None:
        check_number(start, "LoRARecovery: start", ScheduleError, whole=True)
        if start < 0:
            raise ScheduleError(f"LoRARecovery(start={start}): start must be 0 or above.")


def check_rates(lr_factor: float, warmup_steps: int) -> None:
    """Refuse a factor on the learning rate, or a warm-up, that is out of range; arguments are LoRARecovery's."""
    if not 0 < lr_factor < math.inf or warmup_steps < 0:
        raise RecoveryError(
            f"LoRARecovery(lr_factor={lr_factor}, warmup_steps={warmup_steps}): lr_factor must be finite and above 0, "
            "and warmup_steps 0 or above."
        )


def check_recovery(
    trainer: Trainer, pl_module: LightningModule, *, start: int | None, mode: str, finish: str, transformer: str | None
) -> None:
    """Refuse a recovery that would never begin, or that contradicts the strategy or the quantization.

    Args:
        trainer: The Trainer.
        pl_module: The module that holds the transformer.
        start: As of LoRARecovery, like mode, finish and transformer.
        mode: See above.
        finish: See above.
        transformer: See above.

    Raises:
        ScheduleError: If it waits for a drop that never comes.
        RecoveryError: If sharded weights would be merged into, quantized weights trained in full, or linear maps
            trained where there are none.
        QuantizationError: If LoRA would be merged into quantized weights.
    """
    if mode == "lora" and is_sharded(trainer) and finish != "adapter":
        raise RecoveryError(
            f"LoRARecovery(finish={finish!r}): LoRA cannot be merged into weights that ModelParallelStrategy shards. "
            "Use finish='adapter', then layershed.merge_lora on the base and the adapter."
        )
    if start is None and waits_for_nothing(trainer, pl_module):
        raise ScheduleError(
            "LoRARecovery(start=None): it starts at the drop, but nothing is dropped and no SublayerDrop is listed. "
            "Add one, or set start to an optimizer step."
        )
    if mode == "stand_ins" and not linear_maps(pl_module) and not any(map(_replaces, callbacks_of(trainer))):
        raise RecoveryError(
            "LoRARecovery(mode='stand_ins'): there is no linear map to train. Set replace='linear' in SublayerDrop, or "
            "use mode='lora'."
        )
    quantizing = (other for other in callbacks_of(trainer) if isinstance(other, Quantizes))
    before = any(other.quantizes_before_recovery for other in quantizing)
    if not before and quantization_of(pl_module, name=transformer) is None:
        return
    if mode == "full":
        raise RecoveryError(
            "LoRARecovery(mode='full'): quantized weights cannot be trained. Use mode='lora', or quantize at the end "
            "(Quantization(start='end'))."
        )
    if mode == "lora" and finish == "merge":
        raise QuantizationError(
            "LoRARecovery(finish='merge'): merging into quantized weights rounds the recovery away. Use "
            "finish='adapter' to keep both apart, or finish='dequantize' to merge into full precision."
        )


def warn_unfrozen(number: int) -> None:
    """Say that others made parameters trainable that LoRARecovery keeps frozen."""
    rank_zero_warn(
        f"LoRARecovery: {number} frozen parameters were made trainable while it trains adapters, by another callback "
        "or a hook of the module. They were frozen again and left out of the optimizers. To train all weights, set "
        "mode='full'."
    )


def _replaces(callback: object) -> bool:
    return isinstance(callback, Replaces) and callback.places_maps


def refuse_lasting_masks(
    trainer: Trainer, pl_module: LightningModule, target_modules: str | Sequence[str], *, transformer: str | None
) -> None:
    """Refuse a ModelPruning that still masks the weights into which the adapters are merged at the end.

    Args:
        trainer: The Trainer, once all callbacks are set up.
        pl_module: The module that holds the transformer.
        target_modules: As of LoRARecovery, like transformer.
        transformer: See above.

    Raises:
        RecoveryError: If a mask would undo the merge.
    """
    found = find_transformer(pl_module, name=transformer)
    paths = {id(module): path for path, module in modules_to_adapt(found, target_modules).items()}
    for callback in callbacks_of(trainer):
        masked = lasting_masks(callback) if isinstance(callback, ModelPruning) else []
        first = next((paths[id(module)] for module, name in masked if name == "weight" and id(module) in paths), None)
        if first is not None:
            raise RecoveryError(
                f"{type(callback).__name__}(make_pruning_permanent=False): the weight of {first} would still be "
                "masked when LoRARecovery merges its adapters into it, and the merge would be lost. Set "
                "make_pruning_permanent=True, or keep the adapters (LoRARecovery(finish='adapter'))."
            )


def check_resumed_lora(transformer: nn.Module, options: dict[str, Any]) -> None:
    """Refuse to resume with other LoRA settings than those of the interrupted run.

    Args:
        transformer: The transformer, as the checkpoint made it.
        options: Those of ``inject_lora``.

    Raises:
        CheckpointError: If they differ.
    """
    found, wanted = lora_settings(transformer), lora_arguments(**options)
    if found is not None and found["settings"] != wanted:
        raise CheckpointError(
            f"LoRARecovery: the checkpoint's LoRA has the settings {found['settings']}, and this run asks for "
            f"{wanted}. Resume with the same settings."
        )


def inject_before_sharding(pl_module: LightningModule, options: dict[str, Any], transformer: str | None) -> None:
    """Put LoRA in, switched off: peft would size it by the local shard later. Until recovery begins, all weights train.

    Args:
        pl_module: The module that holds the transformer.
        options: Those of ``inject_lora``.
        transformer: Path of the transformer in the module.

    Raises:
        RecoveryError: If the placement depends on the drop, which is not known yet.
    """
    if options["placement"] != "all":
        raise RecoveryError(
            f"LoRARecovery(placement={options['placement']!r}): ModelParallelStrategy needs LoRA in the model before "
            "the drop, and the neighbours are not known then. Use placement='all'."
        )
    frozen = {parameter for parameter in pl_module.parameters() if not parameter.requires_grad}
    inject_lora(pl_module, name=transformer, **options)
    for parameter in pl_module.parameters():
        parameter.requires_grad_(parameter not in frozen)
    set_enabled(pl_module, False)


def train_before_sharded_load(pl_module: LightningModule, *, begun: bool, transformer: str | None) -> None:
    """Train what the interrupted run trained, before FSDP2 reads weights and optimizer states.

    Args:
        pl_module: The module that holds the transformer.
        begun: Whether LoRA was being trained.
        transformer: Path of the transformer in the module.
    """
    found = find_transformer(pl_module, name=transformer)
    if begun:
        train_adapters(found)
    else:
        set_enabled(found, False)
