"""The Trainer of the command line: a Lightning Trainer whose four commands without training call plain functions.

The signatures and docstrings of the methods are what ``train.py COMMAND --help`` lists.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from layershed.cli.benchmark import benchmark
from layershed.cli.plan import predict_plan
from layershed.cli.prune import prune
from layershed.cli.run_folder import TrainerError, check_devices, check_writable, next_version
from layershed.cli.score import score
from layershed.integration.checkpoint_io import keep_checkpoints_whole
from layershed.performance.benchmark import Benchmark, QualityName
from layershed.performance.prediction import Prediction
from layershed.performance.stopwatch import SpeedSettings
from layershed.planning.plan import DropPlan, ImportanceScores, Scope
from layershed.planning.selection import Objective
from layershed.training.causal_lm import CausalLM
from layershed.training.text_data import TextData


class Trainer(pl.Trainer):
    """A Lightning Trainer with training-free commands, and CSV and TensorBoard logs in one numbered directory.

    Args:
        logger: Loggers; true or null for CSV and TensorBoard files in default_root_dir/version_N, false for none.
        default_root_dir: Folder for the results of all runs; each run gets a version_N of its own in it.
        kwargs: As of lightning.pytorch.Trainer.

    Raises:
        TrainerError: If nothing can be written to the folder, or Lightning refuses an argument.
    """

    def __init__(
        self,
        *,
        logger: Logger | Iterable[Logger] | bool | None = None,
        default_root_dir: str | Path = "runs",
        **kwargs: Any,
    ) -> None:
        root = Path(default_root_dir)
        check_writable(root)
        check_devices(kwargs)
        if logger is None or logger is True:
            version = next_version(root)
            logger = [kind(root, name="", version=version) for kind in (CSVLogger, TensorBoardLogger)]
        try:
            super().__init__(logger=logger, default_root_dir=str(default_root_dir), **kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise TrainerError(f"trainer: {error}") from error
        keep_checkpoints_whole(self.strategy)  # validate and test, too, answer a damaged one in a sentence

    def score(
        self, model: CausalLM, datamodule: TextData, metric: str = "cosine", batches: int = 16
    ) -> ImportanceScores:
        """Measure the importance of every sublayer of a pretrained model: a table and a heat map, no training.

        Writes ``importance.csv`` and ``importance.png`` into the run directory.

        Args:
            model: The model to score.
            datamodule: Where the text comes from; its training split is scored.
            metric: cosine, relative_magnitude or angular.
            batches: Number of batches to score.

        Returns:
            The importances.

        Raises:
            LayershedError: Before anything is measured, if an argument has no meaning.
        """
        return score(self, model, datamodule, metric, batches)

    def prune(
        self,
        model: CausalLM,
        datamodule: TextData,
        scope: Scope = "joint",
        count: int | None = None,
        ratio: float | None = None,
        metric: str = "cosine",
        objective: Objective = "importance",
        protect: Sequence[int] = (),
        batches: int = 16,
        quality_batches: int = 16,
        prompt_tokens: int = 128,
        new_tokens: int = 32,
        runs: int = 5,
        output: str = "pruned",
    ) -> DropPlan:
        """Drop sublayers of a pretrained model without training: score, drop, measure, save.

        Writes ``importance.csv``, ``drop_plan.json``, ``speed.json``, the dropped model and ``report.html``.

        Args:
            model: The model to prune.
            datamodule: Where the text comes from; the training split is scored, the held-out one is for quality.
            scope: What is ranked, and dropped: attention, mlp, block, or joint (attention and MLP in one ranking).
            count: How many to drop: blocks with scope block, else sublayers. Give this or ratio.
            ratio: Share to drop, in (0, 1): of the blocks with scope block, else of the sublayers. Give this or count.
            metric: cosine, relative_magnitude or angular.
            objective: importance (the least important goes first) or speed (what costs least importance per measured
                millisecond of decoding).
            protect: Indices of blocks that stay whole, such as [0, -1]; negative ones count from the end.
            batches: Number of batches to score.
            quality_batches: Number of held-out batches for loss and accuracy.
            prompt_tokens: Tokens per prompt of the speed measurement.
            new_tokens: Tokens decoded by the speed measurement.
            runs: Pairs of dense and dropped runs of the speed measurement.
            output: Folder for the dropped model; a relative path is one inside the run directory.

        Returns:
            What was dropped.

        Raises:
            LayershedError: Before anything is measured, if that cannot be dropped, measured or saved.
        """
        return prune(
            self,
            model,
            datamodule,
            scope=scope,
            count=count,
            ratio=ratio,
            metric=metric,
            objective=objective,
            protect=protect,
            batches=batches,
            quality_batches=quality_batches,
            speed=SpeedSettings(prompt_tokens, new_tokens, runs=runs),
            output=output,
        )

    def benchmark(
        self,
        model: CausalLM,
        datamodule: TextData,
        base: str | None = None,
        ckpt_path: str | None = None,
        counts: Sequence[int] = (),
        scopes: Sequence[Scope] = ("attention", "mlp", "joint", "block"),
        metric: str = "cosine",
        objective: Objective = "importance",
        batches: int = 16,
        quality_batches: int = 16,
        quality: QualityName = "accuracy",
        prompt_tokens: int = 128,
        new_tokens: int = 32,
        batch_size: int = 1,
        runs: int = 10,
    ) -> Benchmark:
        """Measure a dropped model against its dense base, or sweep over drops of a dense one: quality beside speed.

        Writes ``benchmark.json``, and for a sweep ``frontier.png`` and ``importance.csv``.

        Args:
            model: The dropped model; for a sweep the dense one.
            datamodule: Where the text comes from; quality is measured on the held-out split.
            base: The dense model to compare with: a folder, a hub id or a GGUF file. null compares with the same
                weights, the bypass lifted, which a checkpoint still has.
            ckpt_path: A checkpoint of fit; it brings the options of its model along.
            counts: For a sweep, how many are dropped, such as [2, 4, 8]; blocks with scope block, else sublayers.
            scopes: For a sweep, what is ranked; every scope is measured with every count.
            metric: For a sweep: cosine, relative_magnitude or angular.
            objective: For a sweep: importance (the least important goes first) or speed (what costs least importance
                per measured millisecond of decoding).
            batches: For a sweep, number of batches to score.
            quality_batches: Number of held-out batches for loss and accuracy.
            quality: What the picture shows and the SDR counts: accuracy, loss or perplexity.
            prompt_tokens: Tokens per prompt of the speed measurement.
            new_tokens: Tokens decoded by the speed measurement.
            batch_size: Sequences at once of the speed measurement.
            runs: Pairs of dense and dropped runs of the speed measurement.

        Returns:
            What was measured.

        Raises:
            LayershedError: Before anything is measured, if there is nothing to compare, or too little to drop.
        """
        return benchmark(
            self,
            model,
            datamodule,
            base=base,
            ckpt_path=ckpt_path,
            counts=counts,
            scopes=scopes,
            metric=metric,
            objective=objective,
            batches=batches,
            quality_batches=quality_batches,
            quality=quality,
            speed=SpeedSettings(prompt_tokens, new_tokens, batch_size, runs),
        )

    def plan(
        self,
        model: CausalLM,
        datamodule: TextData,
        scope: Scope = "attention",
        count: int | None = None,
        ratio: float | None = None,
        plan: str | None = None,
        device: str = "this",
        batch_size: int = 1,
        prompt_tokens: int = 256,
        new_tokens: int = 64,
    ) -> Prediction:
        """Predict what a drop would bring on a device, from the model's config alone: no weight is read or allocated.

        Writes ``prediction.json`` into the run directory.

        Args:
            model: A skeleton on the meta device.
            datamodule: Not used; no text is needed.
            scope: What goes, the deepest first, as there are no importances: attention, mlp or block. For joint give
                a plan.
            count: How many go: blocks with scope block, else sublayers. Give this, ratio or plan; without any, half
                of the attention goes, or of a dropped model what it lacks.
            ratio: Share that goes, in (0, 1).
            plan: A drop_plan.json that a run wrote, instead of scope, count and ratio.
            device: this, whose ceilings are measured, or one by its published ceilings (DEVICES).
            batch_size: Sequences at once.
            prompt_tokens: Tokens of each prompt.
            new_tokens: Tokens decoded after it; the KV cache is that of prompt and new tokens.

        Returns:
            What theory predicts.

        Raises:
            LayershedError: If that cannot be dropped or predicted.
        """
        speed = SpeedSettings(prompt_tokens, new_tokens, batch_size)
        return predict_plan(self, model, scope=scope, count=count, ratio=ratio, plan=plan, device=device, speed=speed)
