"""Saves the whole configuration of a run: as ``config.yaml``, in ``hparams.yaml`` and in every logger."""

from __future__ import annotations

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import SaveConfigCallback


class SaveWholeConfig(SaveConfigCallback):
    """Gives the loggers the configuration, optimizer, data and callbacks included.

    Lightning by itself logs the hyperparameters of the module alone, which a checkpoint must be able to hold.
    """

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Log it, on rank 0. Commands that do not train have no loggers in use, and a config.yaml."""
        if trainer.state.fn is None:
            return
        text = self.parser.dump(self.config, skip_none=False)
        for logger in trainer.loggers:
            logger.log_hyperparams(yaml.safe_load(text))
