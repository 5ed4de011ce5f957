"""Keeps the checkpoint of the dropped model that validates best."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Literal

from layershed.errors import LayershedError
from layershed.files.checkpoint_file import read_checkpoint
from layershed.integration.namespaces import InheritedModelCheckpoint, LightningModule, Trainer, rank_zero_warn
from layershed.integration.preflight import callbacks_of, is_trial
from layershed.integration.protocols import Drops
from layershed.integration.run import current_drop


class BestCheckpoint(InheritedModelCheckpoint):
    """A ModelCheckpoint for runs that drop: the best is the best of the model as it is dropped in the end.

    Before a drop the loss is lower, so an ordinary ModelCheckpoint would keep the dense model. This one keeps nothing
    before the first drop. The first validation after each round of drops starts the comparison anew and replaces the
    file. If no validation with the metric follows the last round, the file stays that of a less dropped model: the run
    ends with a warning that says so, and ``best_model_path`` is empty. Without SublayerDrop it keeps the best of the
    whole run.

    Hooks: saves in ``on_validation_end``.
    Logs: nothing.
    Writes: one file, ``best.ckpt``, beside the other checkpoints. ``--ckpt_path best`` of the command line finds it.
    Checkpoint: the state of ModelCheckpoint, and what was dropped at the best. A run that is resumed in a new folder
    takes the best file along; if that is gone, or of a later step than the checkpoint, it warns and compares anew.

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
        self._fits, self._writes = False, True
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
            self._compare_anew(dropped)
        super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if nothing was saved, or nothing of the model as it is dropped now."""
        if is_trial(trainer):
            return
        advice = "Validate after the drop (val_check_interval)."
        if not self.best_model_path:
            why = self._passed or "there was no validation after the drop"
            rank_zero_warn(f"BestCheckpoint saved nothing: {why}. {advice}")
            return
        now = [sublayer.name for sublayer in current_drop(pl_module)]
        if now != self._dropped:
            why = self._passed or "there was no validation after the last drop"
            rank_zero_warn(
                f"BestCheckpoint: {str(self.best_model_path)!r} is not of the model at the end, as {why} (dropped "
                f"sublayers: {len(self._dropped)} in the file, {len(now)} at the end). {advice}"
            )
            self._compare_anew(now)

    def state_dict(self) -> dict[str, Any]:
        """The state of ModelCheckpoint, and what was dropped."""
        return {**super().state_dict(), "dropped": self._dropped}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note whether this is a fit: an evaluation takes no file along."""
        super().setup(trainer, pl_module, stage)
        self._fits, self._writes = stage == "fit", trainer.is_global_zero

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both, and take the best file along into a new folder."""
        own = {name: value for name, value in state_dict.items() if name != "dropped"}
        former, folder = own.get("dirpath"), self.dirpath
        if not self._fits or folder is None or str(former) == str(folder):
            if self._fits:
                self._dropped = list(state_dict.get("dropped", []))
                super().load_state_dict(own)
            return
        best = Path(str(own.get("best_model_path") or ""))
        if not best.name:
            return
        if best.name != f"{self.filename}.ckpt" or not self._is_noted(best, own.get("best_model_score")):
            rank_zero_warn(
                f"BestCheckpoint: {str(best)!r} is gone or no longer the best of the checkpoint's step, so this run "
                "compares anew from here on."
            )
            return
        target = Path(str(folder)) / best.name
        if self._writes:
            target.parent.mkdir(parents=True, exist_ok=True)
            beside = target.with_name(f".{target.name}.partial")
            shutil.copyfile(best, beside)
            os.replace(beside, target)
        name = str(target)
        moved = {"dirpath": folder, "best_model_path": name, "kth_best_model_path": name, "last_model_path": ""}
        self._dropped = list(state_dict.get("dropped", []))
        super().load_state_dict({**own, **moved, "best_k_models": {name: own["best_model_score"]}})

    def _compare_anew(self, dropped: list[str]) -> None:
        """Forget the scores and the file of a model that was dropped otherwise; the next best overwrites the file."""
        fresh = BestCheckpoint(str(self.monitor), "min" if self.mode == "min" else "max")
        for name in ("best_k_models", "best_model_score", "best_model_path", "kth_best_model_path", "kth_value"):
            setattr(self, name, getattr(fresh, name))
        self._dropped = dropped

    def _is_noted(self, path: Path, score: Any) -> bool:
        """Whether a file is the best that a checkpoint notes: the former run may have gone on."""
        try:
            noted = read_checkpoint(path, mmap=True)["callbacks"][self.state_key]["best_model_score"]
        except (OSError, LayershedError, KeyError, TypeError, RuntimeError):
            return False
        return noted is not None and score is not None and float(noted) == float(score)
