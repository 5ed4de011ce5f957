"""Every checkpoint of a changed model says what is dropped, quantized and adapted, through the module's own hooks.

These are Lightning's hooks of the module, not those of callbacks or of torch, because

- Lightning asks no callback for a checkpoint of the weights alone, and asks callbacks after the weights are loaded;
- the key of torch's ``get_extra_state`` is always ``_extra_state``: the error of strict loading without layershed would
  not name what to do, as the mark of :func:`write_structure` does;
- a key that ``register_state_dict_post_hook`` adds breaks FSDP2 (``get_model_state_dict`` looks every key up in the
  module), and would be in every folder that ``save_pretrained`` writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from layershed.errors import StrategyError
from layershed.integration.fsdp_checkpoints import withhold_weights
from layershed.integration.lightning_private import trainer_of
from layershed.integration.namespaces import Callback, LightningModule, Trainer
from layershed.integration.pending_work import fits
from layershed.integration.strategies import is_sharded
from layershed.integration.trained_parameters import TrainedParameters, rename_finetuned
from layershed.recovery.as_before import as_before
from layershed.recovery.lora import adapted_modules
from layershed.saving.checkpoint import (
    CHECKPOINT_KEY,
    apply_structure,
    has_structure,
    transformer_or_none,
    write_structure,
)
from layershed.stand_ins.record import overridden
from layershed.surgery import dropped_sublayers

_BY_HAND_KEY = "layershed_by_hand"
_SAVE, _LOAD = "on_save_checkpoint", "on_load_checkpoint"


class StructureHooks:
    """The checkpoint hooks of one module, with its structure added.

    Args:
        pl_module: The module. Its former hooks are called first.
        transformer: Path of the transformer in it.
        changes: Whether a callback changes the model. If not, only what was changed by hand is written, and a
            checkpoint without such a note leaves the model as it is.
    """

    def __init__(self, pl_module: LightningModule, transformer: str | None, *, changes: bool) -> None:
        self.pl_module, self.transformer, self.changes = pl_module, transformer, changes
        self.training: TrainedParameters | None = None
        self._own: dict[str, Callable[[dict[str, Any]], None]] = {
            name: getattr(pl_module, name) for name in (_SAVE, _LOAD)
        }
        self._set_on_instance = [name for name in self._own if name in vars(pl_module)]

    def install(self) -> None:
        """Replace the hooks of this one module."""
        vars(self.pl_module).update({_SAVE: self.save, _LOAD: self.load})

    def release(self) -> None:
        """Restore the module's former hooks."""
        for name, own in self._own.items():
            del vars(self.pl_module)[name]
            if name in self._set_on_instance:
                vars(self.pl_module)[name] = own

    def save(self, checkpoint: dict[str, Any]) -> None:
        """``on_save_checkpoint``."""
        self._own[_SAVE](checkpoint)
        if self.changes:
            write_structure(checkpoint, self.pl_module, name=self.transformer)
        elif (transformer := self.watched()) is not None:
            write_structure_made_by_hand(checkpoint, transformer)
        withhold_weights(checkpoint, self.pl_module)
        if self.training is not None:
            self.training.note(checkpoint)

    def load(self, checkpoint: dict[str, Any]) -> None:
        """``on_load_checkpoint``."""
        self._own[_LOAD](checkpoint)
        if self.changes or _BY_HAND_KEY in checkpoint:
            begun_changed = self._is_changed()  # by hand, before this run: configure_optimizers saw it so
            apply_structure(checkpoint, self.pl_module, name=self.transformer)
            rename_finetuned(checkpoint, self.pl_module)
            if self.changes and not begun_changed:
                self._configure_as_before()

    def _is_changed(self) -> bool:
        """Whether something is dropped or adapted now."""
        transformer = self.watched()
        return transformer is not None and bool(dropped_sublayers(transformer) or adapted_modules(transformer))

    def _configure_as_before(self) -> None:
        """In a resumed fit, let configure_optimizers see the model that the interrupted run began with, once.

        It may make groups by number, name or requires_grad. Their parameters are set later, from the checkpoint. FSDP2
        has built the optimizers by now.
        """
        trainer, transformer = trainer_of(self.pl_module), self.watched()
        if transformer is None or trainer is None or is_sharded(trainer) or not fits(trainer):
            return
        own, vars_ = self.pl_module.configure_optimizers, vars(self.pl_module)
        before = {name: vars_[name] for name in ("configure_optimizers",) if name in vars_}

        def configure() -> Any:
            del vars_["configure_optimizers"]
            vars_.update(before)
            with as_before(self.pl_module, transformer):
                return own()

        vars_["configure_optimizers"] = configure

    def watched(self) -> nn.Module | None:
        """The transformer, or None if there is none, or several and no name."""
        return transformer_or_none(self.pl_module, self.transformer)


def carry_structure(pl_module: LightningModule, transformer: str | None) -> None:
    """Make the module's checkpoint hooks save and restore its structure, for a callback that changes the model."""
    before = _hooks_of(pl_module)
    _install(pl_module, transformer or _name(before), changes=True)


def carry_changes_by_hand(pl_module: LightningModule, transformer: str | None = None) -> None:
    """Make the hooks save and restore the changes made by hand.

    Next to a callback that changes the model this adds nothing.
    """
    before = _hooks_of(pl_module)
    _install(pl_module, _name(before) or transformer, changes=before is not None and before.changes)


def watch_for_changes(pl_module: LightningModule, transformer: str | None = None) -> None:
    """Make the hooks save and restore changes made by hand, if there are any, for a callback that only watches.

    The hooks of a dense model do not change.
    """
    if _hooks_of(pl_module) is not None:  # another callback has replaced the hooks; this one may know the name
        carry_changes_by_hand(pl_module, transformer)
        return
    found = transformer_or_none(pl_module, transformer)
    if found is not None and has_structure(found):
        carry_changes_by_hand(pl_module, transformer)


def watch_for_bypass(pl_module: LightningModule, transformer: str | None = None) -> None:
    """The same during a run, but only for a bypass: cheap enough for every step."""
    if _hooks_of(pl_module) is None and next(overridden(pl_module), None) is not None:
        watch_for_changes(pl_module, transformer)


def write_structure_made_by_hand(checkpoint: dict[str, Any], transformer: nn.Module) -> None:
    """Note in a checkpoint what was changed by hand, and that no callback did it.

    The optimizers then hold all parameters. SublayerDrop would remove those of the dropped sublayers.
    """
    write_structure(checkpoint, transformer, callback="ExactResume")
    if CHECKPOINT_KEY in checkpoint:
        checkpoint[_BY_HAND_KEY] = True


def refuse_shards_changed_by_hand(trainer: Trainer, pl_module: LightningModule, callback: Callback) -> None:
    """Refuse, before training, to shard a model that was changed by hand if no callback changes it.

    Only callbacks that change a model make FSDP2 write the weights of dropped sublayers under other names.

    Raises:
        StrategyError: If loading the shards would evaluate the dense model in silence.
    """
    if is_sharded(trainer) and changed_by_hand(pl_module) is not None:
        raise StrategyError(
            f"{type(callback).__name__}: the model was bypassed, quantized or adapted by hand. Under "
            "ModelParallelStrategy, a Trainer would load its checkpoints as those of the dense model. Instead of "
            "bypassing by hand, list SublayerDrop, or use another strategy, such as DDPStrategy."
        )


def changed_by_hand(pl_module: LightningModule) -> nn.Module | None:
    """The transformer, if it was bypassed, quantized or adapted, and no callback changes it."""
    hooks = _hooks_of(pl_module)
    transformer = None if hooks is None or hooks.changes else hooks.watched()
    return transformer if transformer is not None and has_structure(transformer) else None


def follow_training(trainer: Trainer, pl_module: LightningModule) -> None:
    """Save and restore what others unfreeze during this fit; call it in on_fit_start, after :func:`carry_structure`."""
    hooks = _hooks_of(pl_module)
    if hooks is None or (hooks.training is not None and hooks.training.follows(trainer)):
        return
    hooks.training = TrainedParameters(trainer, pl_module, forgets=hooks.changes)


def leave_structure(pl_module: LightningModule) -> None:
    """Give a module in its original state its hooks back; a changed one may still be saved."""
    hooks = _hooks_of(pl_module)
    if hooks is not None and hooks.training is not None:
        hooks.training.release()
    if hooks is not None and not has_structure(pl_module, name=hooks.transformer):
        hooks.release()


def _name(hooks: StructureHooks | None) -> str | None:
    return None if hooks is None else hooks.transformer


def _hooks_of(pl_module: LightningModule) -> StructureHooks | None:
    hooks = getattr(vars(pl_module).get(_SAVE), "__self__", None)
    return hooks if isinstance(hooks, StructureHooks) else None


def _install(pl_module: LightningModule, transformer: str | None, *, changes: bool) -> None:
    before = _hooks_of(pl_module)
    if before is not None:
        before.release()
    StructureHooks(pl_module, transformer, changes=changes).install()
