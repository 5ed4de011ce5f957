"""A Lightning Trainer whose runs have a numbered folder each, callbacks with names, and predictions in a file."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger

from layershed.cli.claimed_folder import ClaimedFolder, RunCSVLogger, RunTensorBoardLogger
from layershed.cli.named_callbacks import Callbacks, as_list
from layershed.cli.predictions import PredictionFile, What
from layershed.cli.run_folder import TrainerError, check_devices, check_writable
from layershed.integration.checkpoint_io import keep_checkpoints_whole
from layershed.training.causal_lm import CausalLM
from layershed.training.text_data import TextData


class RunTrainer(pl.Trainer):
    """A Lightning Trainer with CSV and TensorBoard logs in one numbered folder.

    Args:
        logger: Loggers. true or null writes CSV and TensorBoard files to default_root_dir/version_N; false: none.
        default_root_dir: Folder for the results of all runs. Each run creates its own version_N in it.
        callbacks: Callbacks by name, one, or a list of them.
        kwargs: Arguments of lightning.pytorch.Trainer.

    Raises:
        TrainerError: If the folder is not writable, or Lightning refuses an argument.
    """

    def __init__(
        self,
        *,
        logger: Logger | Iterable[Logger] | bool | None = None,
        default_root_dir: str | Path = "runs",
        callbacks: Callbacks = None,
        **kwargs: Any,
    ) -> None:
        root = Path(default_root_dir)
        check_writable(root)
        check_devices(kwargs)
        if logger is None or logger is True:
            folder = ClaimedFolder(root)
            logger = [RunCSVLogger(folder), RunTensorBoardLogger(folder)]
        try:
            super().__init__(
                logger=logger, default_root_dir=str(default_root_dir), callbacks=as_list(callbacks), **kwargs
            )
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise TrainerError(f"trainer: {error}") from error
        keep_checkpoints_whole(self.strategy)  # validate and test, too, report a damaged checkpoint in one sentence

    def predict(  # type: ignore[override]
        self,
        model: CausalLM,
        datamodule: TextData,
        ckpt_path: str | None = None,
        what: What = "text",
        prompt_tokens: int | None = None,
        new_tokens: int = 32,
    ) -> None:
        """Continue the held-out texts and conversations with a model, or write its logits.

        Writes ``predictions.jsonl``, or the folder ``logits``, into the run directory.

        Args:
            model: The model.
            datamodule: The text; every held-out sequence is continued, of a conversation the last answer is written.
            ckpt_path: A checkpoint of fit. It also sets the options of the model.
            what: text (the most likely continuation of each text or conversation) or logits (of every position).
            prompt_tokens: Tokens of each to continue; null for half of a text, and for all before the last answer.
            new_tokens: Tokens to generate.

        Raises:
            LayershedError: If a number is out of range, or the checkpoint cannot be loaded.
        """
        writer = PredictionFile(what, prompt_tokens, new_tokens)
        model.predicted = writer.predict
        self.callbacks.append(writer)  # type: ignore[attr-defined]
        super().predict(model, datamodule=datamodule, return_predictions=False, ckpt_path=ckpt_path)
