"""Trains the model that a drop left, with LoRA or in full, and merges or saves the adapters at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import nn
from torch.optim import Optimizer

from layershed.discovery.find import find_transformer
from layershed.errors import RecoveryError, UnknownNameError
from layershed.integration.fsdp_checkpoints import give_back_strategy, reshard
from layershed.integration.measurements import regained_loss, trainable_parameters
from layershed.integration.metric_names import LR_FACTOR
from layershed.integration.module_hooks import carry_structure, follow_training, leave_structure
from layershed.integration.namespaces import Callback, LightningModule, Trainer, rank_zero_warn
from layershed.integration.preflight import check_optimizers, check_order, check_start, is_trial, refuse_averaging
from layershed.integration.recovery_checks import (
    check_rates,
    check_recovery,
    check_resumed_lora,
    check_step,
    inject_before_sharding,
    refuse_lasting_masks,
    train_before_sharded_load,
    warn_unfrozen,
)
from layershed.integration.run import StepCounter, current_drop, plan_of, publish, rewrap, run_directory, show
from layershed.integration.strategies import fit_strategy, is_sharded, restore_empty_rates, train_adapters
from layershed.planning.plan import Sublayer
from layershed.quantization import dequantize, quantization_of
from layershed.recovery.frozen import StaysFrozen
from layershed.recovery.lora import adapted_modules, check_targets, inject_lora, merge_lora
from layershed.recovery.lora_options import as_targets, check_lora
from layershed.recovery.lora_targets import Placement
from layershed.recovery.optimizer_groups import (
    Layout,
    LearningRateFactor,
    forget_parameters,
    hand_over,
    layout_of,
    train_only_maps,
)
from layershed.saving.lora_folder import check_adapter_folder, save_adapter
from layershed.stand_ins.carried import dropped_parameters
from layershed.surgery import dropped_sublayers

RecoveryMode = Literal["lora", "full", "stand_ins", "none"]
Finish = Literal["merge", "adapter", "dequantize"]


class LoRARecovery(Callback):
    """Recovers a dropped model: trains adapters, or all remaining weights, from the drop on.

    With ``mode: lora`` it freezes the transformer and puts peft's adapters into the remaining linear maps. Modules of
    the LightningModule outside the transformer keep training. The optimizer takes the adapters over in place, so the
    learning-rate schedule continues. If a callback or a hook unfreezes weights of the base, they are frozen again, with
    one warning. Use one per Trainer.

    Hooks: begins in ``on_train_batch_end``, or in ``on_train_start``; merges or saves in ``on_fit_end``.
    Logs: ``recovery/trainable_parameters`` when it begins; ``recovery/lr_factor`` if ``lr_factor`` or ``warmup_steps``
    is set; at the end ``recovery/regained`` if SublayerDrop measured the losses: (loss after the drop - loss at the
    end) / (loss after the drop - loss before it). It includes everything that the model learned after the drop.
    Writes: with ``finish: adapter``, the adapter in peft's format and the drop plan, in the run directory.
    Checkpoint: the step at which it began and the optimizer's parameters. The model's own state holds the adapters.

    Args:
        start: Optimizer steps before recovery begins; None for the drop, or at once if something is already dropped.
        mode: ``lora`` trains adapters, and linear maps if there are some; ``stand_ins`` trains the linear maps alone;
            ``full`` trains all remaining weights; ``none`` ends the run, for comparison.
        rank: Rank of the adapters.
        alpha: The adapters' scale is alpha / rank.
        dropout: Dropout probability of the adapters' input, in [0, 1).
        target_modules: ``all-linear``, every linear map but the output embedding; or a list of module path endings.
        placement: ``all``; or ``neighbours``, only the nearest sublayers before and after each dropped one.
        rslora: Scale by alpha / sqrt(rank) (rank-stabilised LoRA).
        dora: Train magnitude and direction separately (DoRA).
        seed: Seed of the adapters' initial values.
        lr_factor: Factor on the scheduled learning rate once recovery has begun.
        warmup_steps: Optimizer steps over which that factor rises from 0.
        finish: ``merge`` adds the adapters to the weights; ``adapter`` saves them and leaves them in the model;
            ``dequantize`` dequantizes the weights, then merges.
        folder: Folder that ``finish: adapter`` writes; a relative path starts at the run directory.
        transformer: Path of the transformer in the LightningModule; needed only if it holds several.

    Raises:
        RecoveryError: If an option is out of range; before training, if the run contradicts the mode.
        ScheduleError: Before training, if recovery would never begin or the callbacks are listed in the wrong order.
        QuantizationError: Before training, if it would merge into quantized weights.
        StrategyError: Before training, if the model cannot change under the Trainer's strategy.
    """

    layershed_place = 3  # in the order drop, quantize, LoRA, export

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
        target_modules = as_targets(target_modules)
        check_lora(rank=rank, alpha=alpha, dropout=dropout, target_modules=target_modules, placement=placement)
        if mode != "lora" and finish != "merge":
            raise RecoveryError(
                f"LoRARecovery(mode={mode!r}, finish={finish!r}): only mode='lora' has adapters to finish. "
                "Leave finish out, or set mode='lora'."
            )
        check_step(start)
        check_rates(lr_factor, warmup_steps)
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
        self._frozen, self._warned = StaysFrozen(), False
        self._rates = LearningRateFactor(self._factor)

    @property
    def first_step(self) -> int | None:
        """The step at which recovery begins; None for the step of the drop."""
        return self.start

    @property
    def trains_lora(self) -> bool:
        """Whether adapters are trained, not all remaining weights."""
        return self.mode == "lora"

    @property
    def keeps_lora(self) -> bool:
        """Whether the adapters stay in the model at the end."""
        return self.finish == "adapter"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save the adapters in every checkpoint; under FSDP2, add them before the weights are sharded."""
        fit_strategy(trainer, self, pl_module, self.transformer)
        carry_structure(pl_module, self.transformer)
        if stage == "fit":
            # every fit begins anew; a checkpoint's state is loaded later
            self.began, self._layout, self._origin, self._dropped = None, None, None, ()
            self._frozen, self._warned = StaysFrozen(), False
        if self._sharded(trainer) and (stage == "fit" or not adapted_modules(pl_module)):
            inject_before_sharding(pl_module, self.options, self.transformer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the strategy's methods, and the hooks of a module that is in its original state."""
        give_back_strategy(trainer)
        leave_structure(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what this run cannot do, and prepare the optimizers of a resumed run."""
        check_order(trainer)
        check_optimizers(trainer, self)
        self._trainer = trainer
        transformer = find_transformer(pl_module, name=self.transformer)
        check_recovery(
            trainer, pl_module, start=self.start, mode=self.mode, finish=self.finish, transformer=self.transformer
        )
        if self.mode == "lora":
            refuse_averaging(trainer, self)
            merges = self.finish != "adapter"
            targets = self.options["target_modules"]
            check_targets(pl_module, targets, merges=merges, name=self.transformer)
            if merges:
                refuse_lasting_masks(trainer, pl_module, targets, transformer=self.transformer)
        if self.mode == "lora" and self.finish == "adapter":
            directory = run_directory(trainer)
            check_adapter_folder(directory / self.folder, apart=directory)
        if self._origin is None:
            self._origin = layout_of(trainer.optimizers, pl_module)
        if self.began is not None and self.mode == "stand_ins":
            train_only_maps(trainer.optimizers, pl_module, transformer)
        follow_training(trainer, pl_module)  # it restores the layout of a resumed run, too
        if self.began is not None and self.mode != "none":
            if self.mode == "lora":
                check_resumed_lora(transformer, self.options)
            self._rates.attach(trainer.optimizers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin at once if the start is reached or something is already dropped."""
        self._steps.start(trainer)
        if self.began is not None:
            if self._sharded(trainer):  # its state is loaded after on_fit_start
                check_resumed_lora(find_transformer(pl_module, name=self.transformer), self.options)
                self._rates.attach(trainer.optimizers)
                restore_empty_rates(trainer)
            trainer.should_stop = self.mode == "none"
            self._dropped = current_drop(pl_module)
            self._hold(pl_module)
            show(trainer, trainable_parameters(pl_module))
            return
        check_start(trainer, self, self.start)
        if self.start == trainer.global_step or (self.start is None and dropped_sublayers(pl_module)):
            self._begin(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log the factor on the learning rate, which LearningRateMonitor does not see."""
        self.refreeze()
        if self.began is not None and (self.lr_factor != 1 or self.warmup_steps):
            pl_module.log(LR_FACTOR, self._factor())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Keep the base frozen, whatever has unfrozen it."""
        self.refreeze()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Begin if it is time; after a further drop, add the adapters for it."""
        taken, dropped = self._steps.taken(trainer), current_drop(pl_module)
        if self.began is None:
            if dropped if self.start is None else self.start in taken:
                self._begin(trainer, pl_module)
        elif self.mode != "none" and dropped != self._dropped:
            self._dropped = dropped
            if self.mode == "lora" and self.options["placement"] == "neighbours":
                self._adapt(trainer, pl_module)
            self._hold(pl_module)
            publish(trainer, trainable_parameters(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the share of the loss that was regained."""
        if self.began is None and not is_trial(trainer):
            rank_zero_warn("LoRARecovery never began: the run ended before its start step, or before any drop.")
        if regained := regained_loss(trainer):
            publish(trainer, regained)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge or save the adapters. The last checkpoint is written before, so it can be resumed."""
        self._rates.detach()
        transformer = find_transformer(pl_module, name=self.transformer)
        if self.began is None or not adapted_modules(transformer):
            return
        if self.finish == "adapter":
            directory = run_directory(trainer)  # a collective: call it on all ranks
            if trainer.is_global_zero or self._sharded(trainer):
                save_adapter(transformer, directory / self.folder, plan=plan_of(directory, pl_module))
            return
        if self.finish == "dequantize" and quantization_of(transformer) is not None:
            dequantize(transformer)
        merge_lora(transformer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the learning rates and the strategy."""
        self._rates.detach()
        self.teardown(trainer, pl_module, "")

    def state_dict(self) -> dict[str, Any]:
        """The step at which it began and the optimizer's parameters, as primitives."""
        self.refreeze()
        return {"began": self.began, "layout": self._layout, "origin": self._origin}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.began, self._layout, self._origin = (state_dict[name] for name in ("began", "layout", "origin"))

    def before_sharded_load(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any]) -> None:
        """Under FSDP2, before weights and optimizer states are loaded: train what the interrupted run trained."""
        begun = state["began"] is not None and self.mode == "lora"
        train_before_sharded_load(pl_module, begun=begun, transformer=self.transformer)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = trainer.global_step
        if self.mode == "none":
            trainer.should_stop = True
            return
        self._dropped = current_drop(pl_module)
        if self.mode == "lora":
            self._adapt(trainer, pl_module)
        if self.mode == "stand_ins":
            train_only_maps(trainer.optimizers, pl_module, find_transformer(pl_module, name=self.transformer))
            rewrap(trainer, pl_module)
        self._hold(pl_module)
        self._rates.attach(trainer.optimizers)
        publish(trainer, trainable_parameters(pl_module))

    def _adapt(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add adapters, or switch them on, and let the optimizers train them."""
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

    def _hold(self, pl_module: LightningModule) -> None:
        """Keep frozen what recovery does not train: with LoRA the base, else the dropped sublayers."""
        reshard(pl_module)
        transformer = find_transformer(pl_module, name=self.transformer)
        base = [parameter for parameter in transformer.parameters() if not parameter.requires_grad]

        def frozen(transformer: nn.Module) -> list[nn.Parameter]:
            adapted = self.mode == "lora" and adapted_modules(transformer)
            return base if adapted or self.mode == "stand_ins" else dropped_parameters(transformer)

        self._frozen.hold(transformer, frozen)
        self.refreeze()

    def refreeze(self) -> None:
        """Freeze again what others unfroze, and keep it out of the optimizers."""
        if self._trainer is None or self.began is None:
            return
        unfrozen = self._frozen.enforce(self._trainer.optimizers)
        if unfrozen and self.mode == "lora" and not self._warned:
            self._warned = True
            warn_unfrozen(len(unfrozen))

    def _factor(self) -> float:
        """The factor on the learning rate of the next step."""
        assert self._trainer is not None
        assert self.began is not None
        # Lightning counts a step only after the optimizer has taken it
        done = self._trainer.global_step - self.began + 1
        return self.lr_factor * min(1.0, done / self.warmup_steps if self.warmup_steps else 1.0)

    def _sharded(self, trainer: Trainer) -> bool:
        return self.mode == "lora" and is_sharded(trainer)
