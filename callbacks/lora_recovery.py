"""Trains what a drop has left: LoRA in the remaining linear maps, or everything, and merges or saves at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from layershed.discovery.find import find_transformer
from layershed.errors import RecoveryError, ScheduleError, UnknownNameError
from layershed.integration.fsdp_checkpoints import give_back_strategy, reshard
from layershed.integration.measurements import regained_loss, trainable_parameters
from layershed.integration.metric_names import LR_FACTOR
from layershed.integration.module_hooks import carry_structure, leave_structure
from layershed.integration.preflight import check_order, check_start, refuse_averaging
from layershed.integration.recovery_checks import (
    check_recovery,
    check_resumed_lora,
    inject_before_sharding,
    train_before_sharded_load,
)
from layershed.integration.run import StepCounter, current_drop, plan_of, publish, rewrap, run_directory, show
from layershed.integration.strategies import fit_strategy, is_sharded, restore_empty_rates, train_adapters
from layershed.planning.plan import Sublayer
from layershed.quantization import dequantize, quantization_of
from layershed.recovery.lora import adapted_modules, check_lora, check_targets, inject_lora, merge_lora
from layershed.recovery.lora_targets import Placement
from layershed.recovery.optimizer_groups import (
    Layout,
    LearningRateFactor,
    forget_parameters,
    hand_over,
    layout_of,
    restore_layout,
)
from layershed.saving.lora_folder import check_adapter_folder, save_adapter
from layershed.surgery import dropped_sublayers

RecoveryMode = Literal["lora", "full", "none"]
Finish = Literal["merge", "adapter", "dequantize"]


class LoRARecovery(Callback):
    """Recovers a dropped model: trains adapters, or everything that is left, from the drop on.

    With ``mode: lora`` the transformer is frozen and adapters of peft go into its remaining linear maps; what stands
    outside it in the LightningModule trains on. The optimizer takes them over in place, so that the learning-rate
    schedule goes on. One per Trainer.

    Hooks: begins in ``on_train_batch_end``, once the configured optimizer step is done, or in ``on_train_start``;
    merges or saves in ``on_fit_end``.
    Logs: ``recovery/trainable_parameters`` when it begins; ``recovery/lr_factor``, where there is one; at the end
    ``recovery/regained``, (loss after the drop - at the end) / (after - before), where SublayerDrop measured these. It
    counts whatever else the model has learned meanwhile, too.
    Writes: with ``finish: adapter``, the adapter in peft's format, with the drop plan, in the run directory.
    Checkpoint: where it began and which parameters the optimizer holds; the adapters are in the model's own state.

    Args:
        start: Optimizer steps before recovery begins; None for the drop, or at once if something is dropped already.
        mode: ``lora``; ``full``, train everything that is left; ``none``, end the run there, for comparison.
        rank: Rank of the adapters.
        alpha: Their scale is alpha / rank.
        dropout: Dropout probability of what goes into them, in [0, 1).
        target_modules: ``all-linear``, every linear map but the output embedding, or a list of ends of module paths.
        placement: ``all``, or ``neighbours``: only in the nearest sublayers before and after each dropped one.
        rslora: Scale by alpha / sqrt(rank) (rank-stabilised LoRA).
        dora: Train magnitude and direction apart (DoRA).
        seed: Seed of the adapters' initial values.
        lr_factor: What the scheduled learning rate is multiplied by from then on.
        warmup_steps: Optimizer steps over which that factor rises from 0.
        finish: ``merge`` adds the adapters into the weights; ``adapter`` saves them and leaves them in the model;
            ``dequantize`` turns quantized weights back before it merges.
        folder: Where ``finish: adapter`` writes; a relative path is one inside the run directory.
        transformer: Path of the transformer in the LightningModule; needed only where it holds more than one.

    Raises:
        RecoveryError: If an option has no meaning; before training, if something contradicts the mode.
        ScheduleError: Before training, if recovery would never begin or the callbacks stand in another order.
        QuantizationError: Before training, if it would merge into quantized weights.
        StrategyError: Before training, if the Trainer's strategy does not let the model change.
    """

    place = 3  # in the order drop, quantize, LoRA, export

    def __init__(
        self,
        start: int | None = None,
        mode: RecoveryMode = "lora",
        rank: int = 8,
        alpha: int = 16,
        dropout: float = 0.0,
        target_modules: str | Sequence[str] = "all-linear",
        placement: Placement = "all",
        rslora: bool = False,
        dora: bool = False,
        seed: int = 0,
        lr_factor: float = 1.0,
        warmup_steps: int = 0,
        finish: Finish = "merge",
        folder: str = "adapter",
        transformer: str | None = None,
    ) -> None:
        for what, value, known in (("mode", mode, get_args(RecoveryMode)), ("finish", finish, get_args(Finish))):
            if value not in known:
                raise UnknownNameError(f"{what} of recovery", value, known)
        check_lora(rank=rank, alpha=alpha, dropout=dropout, target_modules=target_modules, placement=placement)
        if mode != "lora" and finish != "merge":
            raise RecoveryError(f"LoRARecovery(mode={mode!r}, finish={finish!r}): without LoRA there is no adapter.")
        if start is not None and start < 0:
            raise ScheduleError(f"LoRARecovery(start={start}): it must not be negative.")
        if not 0 < lr_factor < math.inf or warmup_steps < 0:
            raise RecoveryError(
                f"LoRARecovery(lr_factor={lr_factor}, warmup_steps={warmup_steps}): the factor must be above 0, and "
                "the steps not negative."
            )
        self.start, self.mode, self.finish, self.folder = start, mode, finish, folder
        self.options: dict[str, Any] = {
            "rank": rank,
            "alpha": alpha,
            "dropout": dropout,
            "target_modules": target_modules,
            "placement": placement,
            "rslora": rslora,
            "dora": dora,
            "seed": seed,
        }
        self.lr_factor, self.warmup_steps, self.transformer = lr_factor, warmup_steps, transformer
        self.began: int | None = None
        self._layout: Layout | None = None
        self._origin: Layout | None = None
        self._dropped: tuple[Sublayer, ...] = ()
        self._steps = StepCounter()
        self._trainer: Trainer | None = None
        self._rates = LearningRateFactor(self._factor)

    @property
    def first_step(self) -> int | None:
        """The step of the beginning; None for that of the drop."""
        return self.start

    @property
    def trains_lora(self) -> bool:
        """Whether LoRA is trained, and not everything that is left."""
        return self.mode == "lora"

    @property
    def keeps_lora(self) -> bool:
        """Whether LoRA stays in the model at the end."""
        return self.finish == "adapter"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have every checkpoint carry the adapters; under FSDP2 put them in before the weights are sharded."""
        fit_strategy(trainer, self, pl_module, self.transformer)
        carry_structure(pl_module, self.transformer)
        if stage == "fit":
            # anew for every fit; what a checkpoint says comes later
            self.began, self._layout, self._origin, self._dropped = None, None, None, ()
        if self._sharded(trainer) and (stage == "fit" or not adapted_modules(pl_module)):
            inject_before_sharding(pl_module, self.options, self.transformer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the strategy its methods back, and a module in its original state its hooks."""
        give_back_strategy(trainer)
        leave_structure(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what this run cannot do, and prepare the optimizers of a resumed run."""
        check_order(trainer)
        self._trainer = trainer
        transformer = find_transformer(pl_module, name=self.transformer)
        check_recovery(
            trainer, pl_module, start=self.start, mode=self.mode, finish=self.finish, transformer=self.transformer
        )
        if self.mode == "lora":
            refuse_averaging(trainer, self)
            check_targets(pl_module, self.options["target_modules"], name=self.transformer)
        if self.mode == "lora" and self.finish == "adapter":
            directory = run_directory(trainer)
            check_adapter_folder(directory / self.folder, apart=directory)
        if self._origin is None:
            self._origin = layout_of(trainer.optimizers, pl_module)
        if self.began is not None and self.mode != "none":
            if self.mode == "lora":
                check_resumed_lora(transformer, self.options)
            if self._layout is not None:
                restore_layout(trainer.optimizers, pl_module, self._layout)
                forget_parameters(trainer.optimizers, transformer)
            self._rates.attach(trainer.optimizers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin at once where nothing is to be waited for."""
        self._steps.start(trainer)
        if self.began is not None:
            if self._sharded(trainer):  # its state came after on_fit_start
                check_resumed_lora(find_transformer(pl_module, name=self.transformer), self.options)
                self._rates.attach(trainer.optimizers)
                restore_empty_rates(trainer)
            trainer.should_stop = self.mode == "none"
            self._dropped = current_drop(pl_module)
            show(trainer, trainable_parameters(pl_module))
            return
        check_start(trainer, self, self.start)
        if self.start == trainer.global_step or (self.start is None and dropped_sublayers(pl_module)):
            self._begin(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log what the scheduled learning rate is multiplied by, which no monitor of learning rates sees."""
        if self.began is not None and (self.lr_factor != 1 or self.warmup_steps):
            pl_module.log(LR_FACTOR, self._factor())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Begin, if it is time; after a further drop, put in the adapters that it asks for."""
        taken, dropped = self._steps.taken(trainer), current_drop(pl_module)
        if self.began is None:
            if dropped if self.start is None else self.start in taken:
                self._begin(trainer, pl_module)
        elif self.mode != "none" and dropped != self._dropped:
            self._dropped = dropped
            if self.mode == "lora" and self.options["placement"] == "neighbours":
                self._adapt(trainer, pl_module)
            publish(trainer, trainable_parameters(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell how much of the lost loss came back."""
        if self.began is None:
            rank_zero_warn("LoRARecovery never began: the run ended before its step, or before any drop.")
        if regained := regained_loss(trainer):
            publish(trainer, regained)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge or save the adapters; after the last checkpoint, which can so be resumed."""
        self._rates.detach()
        transformer = find_transformer(pl_module, name=self.transformer)
        if self.began is None or not adapted_modules(transformer):
            return
        if self.finish == "adapter":
            directory = run_directory(trainer)  # asks all ranks
            if trainer.is_global_zero or self._sharded(trainer):
                save_adapter(transformer, directory / self.folder, plan=plan_of(directory, pl_module))
            return
        if self.finish == "dequantize" and quantization_of(transformer) is not None:
            dequantize(transformer)
        merge_lora(transformer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the learning rates and the strategy as they were."""
        self._rates.detach()
        give_back_strategy(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Where it began and what the optimizer holds, as primitives."""
        return {"began": self.began, "layout": self._layout, "origin": self._origin}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.began, self._layout, self._origin = (state_dict[name] for name in ("began", "layout", "origin"))

    def before_sharded_load(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any]) -> None:
        """Under FSDP2, before weights and optimizer states come: train what the interrupted run trained."""
        begun = state["began"] is not None and self.mode == "lora"
        train_before_sharded_load(trainer, pl_module, state["layout"], begun=begun, transformer=self.transformer)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = trainer.global_step
        if self.mode == "none":
            trainer.should_stop = True
            return
        self._dropped = current_drop(pl_module)
        if self.mode == "lora":
            self._adapt(trainer, pl_module)
        self._rates.attach(trainer.optimizers)
        publish(trainer, trainable_parameters(pl_module))

    def _adapt(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put adapters in, or switch them on, and have the optimizers train them."""
        transformer = find_transformer(pl_module, name=self.transformer)
        reshard(pl_module)
        if self._sharded(trainer):
            train_adapters(transformer)
        else:
            inject_lora(transformer, **self.options)
        hand_over(trainer.optimizers, pl_module, transformer, self._origin)
        forget_parameters(trainer.optimizers, transformer)
        self._layout = layout_of(trainer.optimizers, pl_module)
        rewrap(trainer, pl_module)

    def _factor(self) -> float:
        """What the learning rate of the coming step is multiplied by."""
        assert self._trainer is not None
        assert self.began is not None
        # while an optimizer steps, Lightning has not counted that step yet
        done = self._trainer.global_step - self.began + 1
        return self.lr_factor * min(1.0, done / self.warmup_steps if self.warmup_steps else 1.0)

    def _sharded(self, trainer: Trainer) -> bool:
        return self.mode == "lora" and is_sharded(trainer)
