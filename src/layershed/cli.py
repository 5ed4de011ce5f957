"""The command line: LightningCLI's fit, validate, test and predict, and two more, score and prune."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from transformers.utils import logging as transformers_logging

from layershed import commands
from layershed.data import TextData
from layershed.errors import DataError, LayershedError
from layershed.module import CausalLM
from layershed.plan import Scope


class Trainer(pl.Trainer):
    """A Lightning Trainer with two training-free commands, and CSV and TensorBoard logs in one numbered directory."""

    def __init__(self, *, logger: Any = None, default_root_dir: str | Path = "runs", **kwargs: Any) -> None:
        if logger is None or logger is True:
            version = _next_version(Path(default_root_dir))
            logger = [kind(default_root_dir, name="", version=version) for kind in (CSVLogger, TensorBoardLogger)]
        super().__init__(logger=logger, default_root_dir=str(default_root_dir), **kwargs)

    def score(
        self,
        model: CausalLM,
        datamodule: TextData,
        metric: str = "cosine",
        batches: int = 16,
    ) -> None:
        """Measure the importance of every sublayer of a pretrained model: a table and a heat map, no training.

        Args:
            model: The model to score.
            datamodule: Where the text comes from; its training split is scored.
            metric: cosine, relative_magnitude or angular.
            batches: Number of batches to score.
        """
        commands.score(self, model, datamodule, metric=metric, batches=batches)

    def prune(
        self,
        model: CausalLM,
        datamodule: TextData,
        scope: Scope = "joint",
        count: int | None = None,
        ratio: float | None = None,
        metric: str = "cosine",
        protect: Sequence[int] = (),
        batches: int = 16,
        quality_batches: int = 16,
        prompt_tokens: int = 128,
        new_tokens: int = 32,
        runs: int = 5,
        output: str = "pruned",
    ) -> None:
        """Drop sublayers of a pretrained model without training: score, drop, measure, save.

        Args:
            model: The model to prune.
            datamodule: Where the text comes from: the training split is scored, quality is measured on the held-out one.
            scope: attention, mlp, block or joint.
            count: How many to drop (blocks with scope block, else sublayers); or
            ratio: which share, in (0, 1).
            metric: cosine, relative_magnitude or angular.
            protect: Indices of blocks that stay whole; negative ones count from the end.
            batches: Number of batches to score.
            quality_batches: Number of held-out batches for loss and accuracy.
            prompt_tokens: Tokens per prompt of the speed measurement.
            new_tokens: Tokens decoded by the speed measurement.
            runs: Pairs of dense and dropped runs of the speed measurement.
            output: Folder for the dropped model; a relative path is one inside the run directory.
        """
        commands.prune(
            self,
            model,
            datamodule,
            scope=scope,
            count=count,
            ratio=ratio,
            metric=metric,
            protect=protect,
            batches=batches,
            quality_batches=quality_batches,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            runs=runs,
            output=output,
        )


class LayershedCLI(LightningCLI):
    """LightningCLI with ``score`` and ``prune``, and a tokenizer that follows the model."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """LightningCLI's own, and the two of :class:`Trainer`."""
        ours = dict.fromkeys(("score", "prune"), {"model", "datamodule"})
        return {**LightningCLI.subcommands(), **ours}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Defaults for a first run."""
        parser.set_defaults({"seed_everything": 0})

    def before_instantiate_classes(self) -> None:
        """The text is tokenized as the model expects it, unless said otherwise."""
        config = self.config[self.subcommand]
        if config.data.tokenizer is None:
            config.data.tokenizer = config.model.pretrained

    def after_instantiate_classes(self) -> None:
        """Refuse text that the model has no embedding or no position for."""
        config = self.model.model.config.get_text_config()
        if self.datamodule.vocab_size > config.vocab_size:
            raise DataError(
                f"The tokenizer has {self.datamodule.vocab_size} ids and the model only {config.vocab_size}; "
                "set data.tokenizer to the model's own, or model.config.vocab_size to at least that many."
            )
        places = getattr(config, "max_position_embeddings", None)
        if places is not None and self.datamodule.block_size > places:
            raise DataError(
                f"data.block_size={self.datamodule.block_size} exceeds the model's {places} positions; lower it."
            )


def main(arguments: Sequence[str] | None = None, *, quickstart: Path | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words of the command line; None takes those of the process.
        quickstart: Config that ``fit`` runs when none is given.

    Returns:
        Exit code: 0, or 1 after an error that is said in one sentence. Wrong usage exits with 2.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    configured = any(word.split("=")[0] in ("-c", "--config", "-h", "--help", "--print_config") for word in words)
    if words[:1] == ["fit"] and quickstart is not None and not configured:
        words[1:1] = ["--config", str(quickstart)]
    _quieten()
    sys.argv[1:] = []  # LightningCLI warns about words that it sees there besides its args
    try:
        LayershedCLI(
            CausalLM,
            TextData,
            trainer_class=Trainer,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "train.py", "description": "Training-aware layer dropping for transformers."},
            args=words,
        )
    except LayershedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _quieten() -> None:
    """What other libraries say about themselves would bury what this run has to say."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # two cores: more loader processes than the one would only compete with training
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning 2.6 calls what torch 2.13 deprecates
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")


def _next_version(folder: Path) -> str:
    taken = [int(path.name.removeprefix("version_")) for path in folder.glob("version_*") if path.name[8:].isdigit()]
    return f"version_{max(taken, default=-1) + 1}"
