"""Keeps the checkpoint of the dropped model that validates best."""

from __future__ import annotations

from typing import Any, Literal

from layershed.integration.namespaces import InheritedModelCheckpoint, LightningModule, Trainer, rank_zero_warn
from layershed.integration.preflight import callbacks_of, is_trial
from layershed.integration.protocols import Drops
from layershed.integration.run import current_drop


class BestCheckpoint(InheritedModelCheckpoint):
    """A ModelCheckpoint for runs that drop: the best is the best of the model as it is dropped in the end.

    Before a drop the loss is lower, so an ordinary ModelCheckpoint would keep the dense model. This one keeps nothing
    before the first drop, and each round of drops starts the comparison anew. Without SublayerDrop it keeps the best of
    the whole run.

    Hooks: saves in ``on_validation_end``.
    Logs: nothing.
    Writes: one file, ``best.ckpt``, beside the other checkpoints. ``--ckpt_path best`` of the command line finds it.
    Checkpoint: the state of ModelCheckpoint, and what was dropped at the best. A run that is resumed in a new folder
    compares anew.

    Args:
        monitor: What the LightningModule logs in validation.
        mode: Whether lower (min) or higher (max) is better.
        filename: Name of the file, without its ending.
    """

    def __init__(self, monitor: str = "val_loss", mode: Literal["min", "max"] = "min", filename: str = "best") -> None:
        # one name for every best: each replaces the one before, also that of an earlier round
        super().__init__(
            monitor=monitor,
            mode=mode,
            filename=filename,
            save_top_k=1,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self._dropped: list[str] = []
        self._passed = ""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if this validation of the dropped model is the best."""
        dropped = [sublayer.name for sublayer in current_drop(pl_module)]
        if not dropped and any(isinstance(other, Drops) for other in callbacks_of(trainer)):
            return
        if self.monitor not in trainer.callback_metrics:
            self._passed = f"no validation after the drop logged {self.monitor!r}"
            return
        if dropped != self._dropped:
            fresh = BestCheckpoint(str(self.monitor), "min" if self.mode == "min" else "max")
            for name in ("best_k_models", "best_model_score", "best_model_path", "kth_best_model_path", "kth_value"):
                setattr(self, name, getattr(fresh, name))
            self._dropped = dropped
        super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if nothing was saved."""
        if not self.best_model_path and not is_trial(trainer):
            why = self._passed or "there was no validation after the drop"
            rank_zero_warn(f"BestCheckpoint saved nothing: {why}. Validate after the drop (val_check_interval).")

    def state_dict(self) -> dict[str, Any]:
        """The state of ModelCheckpoint, and what was dropped."""
        return {**super().state_dict(), "dropped": self._dropped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both."""
        self._dropped = list(state_dict.get("dropped", []))
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "dropped"})
