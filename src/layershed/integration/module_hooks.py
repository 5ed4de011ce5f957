"""Every checkpoint of a changed model says what is dropped, quantized and adapted, through the module's own hooks.

Lightning's hooks of the module, and neither those of callbacks nor of torch, because

- Lightning asks no callback for a checkpoint of the weights alone, and asks callbacks after the weights are loaded;
- the key of torch's ``get_extra_state`` is always ``_extra_state``: the error of strict loading without layershed would
  not name what to do, as the mark of :func:`write_structure` does;
- a key that ``register_state_dict_post_hook`` adds breaks FSDP2 (``get_model_state_dict`` looks every key up in the
  module), and would stand in every folder that ``save_pretrained`` writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from layershed.errors import StrategyError
from layershed.integration.fsdp_checkpoints import withhold_weights
from layershed.integration.strategies import is_sharded
from layershed.saving.checkpoint import (
    CHECKPOINT_KEY,
    apply_structure,
    has_structure,
    transformer_or_none,
    write_structure,
)
from layershed.stand_ins.install import overridden

_BY_HAND_KEY = "layershed_by_hand"
_SAVE, _LOAD = "on_save_checkpoint", "on_load_checkpoint"


class StructureHooks:
    """The checkpoint hooks of one module, with its structure added.

    Args:
        pl_module: The module. What its hooks were before is called first.
        transformer: Path of the transformer in it.
        changes: Whether a callback changes the model. If not, only what was changed by hand is written, and a
            checkpoint without such a note leaves the model as it is.
    """

    def __init__(self, pl_module: LightningModule, transformer: str | None, *, changes: bool) -> None:
        self.pl_module, self.transformer, self.changes = pl_module, transformer, changes
        self._own: dict[str, Callable[[dict[str, Any]], None]] = {
            name: getattr(pl_module, name) for name in (_SAVE, _LOAD)
        }
        self._set_on_instance = [name for name in self._own if name in vars(pl_module)]

    def install(self) -> None:
        """Put them in place, on this one module."""
        vars(self.pl_module).update({_SAVE: self.save, _LOAD: self.load})

    def release(self) -> None:
        """Give the module back the hooks that it had."""
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

    def load(self, checkpoint: dict[str, Any]) -> None:
        """``on_load_checkpoint``."""
        self._own[_LOAD](checkpoint)
        if self.changes or _BY_HAND_KEY in checkpoint:
            apply_structure(checkpoint, self.pl_module, name=self.transformer)

    def watched(self) -> nn.Module | None:
        """The transformer, or None if there is none, or several and no name."""
        return transformer_or_none(self.pl_module, self.transformer)


def carry_structure(pl_module: LightningModule, transformer: str | None) -> None:
    """Have the module's own checkpoint hooks carry its structure, for a callback that changes the model."""
    before = _hooks_of(pl_module)
    _install(pl_module, transformer or _name(before), changes=True)


def carry_changes_by_hand(pl_module: LightningModule, transformer: str | None = None) -> None:
    """Have them carry what was changed by hand: into the checkpoint, and back from it.

    Next to a callback that changes the model this adds nothing.
    """
    before = _hooks_of(pl_module)
    _install(pl_module, _name(before) or transformer, changes=before is not None and before.changes)


def watch_for_changes(pl_module: LightningModule, transformer: str | None = None) -> None:
    """Have them carry what was changed by hand if anything was, for a callback that only watches.

    The hooks of a dense model stay what they are.
    """
    if _hooks_of(pl_module) is not None:  # somebody carries it; this callback may know the name
        carry_changes_by_hand(pl_module, transformer)
        return
    found = transformer_or_none(pl_module, transformer)
    if found is not None and has_structure(found):
        carry_changes_by_hand(pl_module, transformer)


def watch_for_bypass(pl_module: LightningModule, transformer: str | None = None) -> None:
    """The same within a run, cheap enough for every step: it notices a bypass only."""
    if _hooks_of(pl_module) is None and next(overridden(pl_module), None) is not None:
        watch_for_changes(pl_module, transformer)


def write_structure_made_by_hand(checkpoint: dict[str, Any], transformer: nn.Module) -> None:
    """Note in a checkpoint what was changed by hand, and that no callback did it.

    The optimizers hold all parameters then; SublayerDrop would take those of the dropped sublayers out.
    """
    write_structure(checkpoint, transformer, callback="ExactResume")
    if CHECKPOINT_KEY in checkpoint:
        checkpoint[_BY_HAND_KEY] = True


def refuse_shards_changed_by_hand(trainer: Trainer, pl_module: LightningModule, callback: Callback) -> None:
    """Refuse, before training, to shard a model that was changed by hand where no callback changes it.

    Only callbacks that change a model have FSDP2 write the weights of dropped sublayers under names of their own.

    Raises:
        StrategyError: If loading the shards would evaluate the dense model in silence.
    """
    hooks = _hooks_of(pl_module)
    if hooks is None or hooks.changes or not is_sharded(trainer):
        return
    transformer = hooks.watched()
    if transformer is not None and has_structure(transformer):
        raise StrategyError(
            f"{type(callback).__name__}: the model was bypassed, quantized or adapted by hand, and a Trainer would "
            "take its checkpoints under ModelParallelStrategy for those of the dense model; list SublayerDrop instead "
            "of bypassing by hand, or use another strategy, such as DDPStrategy."
        )


def leave_structure(pl_module: LightningModule) -> None:
    """Give a module in its original state its hooks back; a changed one may still be saved."""
    hooks = _hooks_of(pl_module)
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
