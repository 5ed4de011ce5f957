"""The command line: LightningCLI's fit, validate, test and predict, and our own: score, prune, benchmark and plan."""

from __future__ import annotations

import argparse
import errno
import importlib
import inspect
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from transformers.utils import logging as transformers_logging

from layershed import callbacks  # imported, they are also known by their short names
from layershed.cli.commands import Trainer
from layershed.cli.config_files import read_configs
from layershed.cli.last_checkpoint import resolve_last
from layershed.cli.messages import causes as _causes
from layershed.cli.messages import hint, in_short, one_line
from layershed.cli.run_folder import check_seed
from layershed.errors import CheckpointError, DataError, LayershedError
from layershed.files.checkpoint_file import check_checkpoint, read_options
from layershed.performance.roofline import ACCELERATORS
from layershed.training.causal_lm import CausalLM
from layershed.training.text_data import TextData

_WHAT_FOR = {
    "fit": "Train, and drop sublayers on the way. Without --config, the quickstart.",
    "validate": "Measure loss and perplexity on the held-out text; --ckpt_path takes a checkpoint of fit.",
    "test": "The same as validate, under the names test_loss and test_perplexity.",
    "predict": "Run the model over the held-out text, for a callback that writes its predictions.",
    "score": "Measure the importance of every sublayer of a pretrained model: a table and a heat map, no training.",
    "prune": "Drop sublayers of a pretrained model without training: score, drop, measure, save.",
    "benchmark": "Measure a dropped model against its dense base, or sweep over drops of a dense one.",
    "plan": "Predict what a drop would bring on a device, from the model's config alone: no weights, no text.",
}
_USAGE = {
    "score": "--model.pretrained MODEL [--OPTION VALUE ...]",
    "prune": "--model.pretrained MODEL (--ratio SHARE | --count NUMBER) [--OPTION VALUE ...]",
    "benchmark": "(--model.pretrained DROPPED --base DENSE | --ckpt_path FILE | --model.pretrained DENSE --counts LIST)"
    " [...]",
    "plan": "--model.pretrained MODEL [--scope SCOPE --count NUMBER | --plan FILE] [--device NAME] [...]",
}
# Instead of what Lightning and the docstrings, which know nothing of a command line, say of these options.
_HELP = {
    "seed_everything": "Seed of every random number generator; true draws one, false sets none.",
    "trainer.callbacks": f"Callbacks by name, best given in a config. layershed's: {', '.join(callbacks.__all__)}; "
    "--trainer.callbacks.help NAME lists the options of one.",
    "data.tokenizer": "A local folder, a hub id or a .gguf file; bytes for one token a byte (a vocabulary of 259). "
    "null takes that of model.pretrained, or bytes where there is none.",
    "device": "What it would run on: this, whose ceilings are measured, or by its published ceilings one of "
    f"{', '.join(ACCELERATORS)}.",
}
_SECTIONS = {
    "trainer": "where and how it runs (lightning.pytorch.Trainer)",
    "model": "the model (layershed.training.causal_lm.CausalLM)",
    "data": "the text (layershed.training.text_data.TextData)",
}
# What the commands without training have a use for; the rest is accepted, so that a config of fit serves them too, but
# not listed.
_TRAINING_FREE = {
    "trainer": {"logger", "default_root_dir", "accelerator", "devices", "precision"},
    "model": {"pretrained", "config", "dtype"},
}
# What the config that fit leaves in a run directory says beside its sections: those commands that have no such option
# take it as long as it says nothing.
_OF_FIT = ("ckpt_path", "weights_only")
_WITHOUT_TEXT: dict[str, set[str]] = {**_TRAINING_FREE, "trainer": {"default_root_dir", "accelerator"}, "data": set()}
# Where Lightning talks, and what of it nobody needs: advertisements, echoes of the config, hardware that is not there.
_LOGS = (
    "lightning.fabric.utilities.seed",
    "lightning.pytorch.utilities.rank_zero",
    "bitsandbytes.backends.cpu.ops",
    "bitsandbytes.autograd._functions",
    "datasets.packaged_modules.json.json",
    "datasets.packaged_modules.parquet.parquet",
)
_CHATTER = (
    "Tip: For seamless",
    "Seed set to",
    "GPU available: False",
    "TPU available: False",
    "`Trainer(limit_",
    "Loading `train_dataloader` to estimate",
    "Failed to load CPU gemm_4bit_forward",
    "MatMul8bitLt: inputs will be cast",
    "Restoring states from the checkpoint",
    # what our own sentence says in short
    "Failed to load JSON from file",
    "Failed to read schema from",
)
_CHECKPOINT_WORDS = ("best", "hpc", "registry")


class _HelpFormatter(DefaultHelpFormatter):
    """Help without the markup of docstrings, and without the names of all classes that happen to be imported."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = re.sub(r", known subclasses: [^)]*", "", super()._get_help_string(action) or "")
        return re.sub(r":\w+:`[~.]*(.*?)`|``(.*?)``", r"\1\2", text)


class _Parser(LightningArgumentParser):
    """A parser that says what is wrong in one sentence, with the nearest name that would have been right."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # the parser of a class inside a config: the outer one will tell
            super().error(message + hint(message, self._options()), ex)
        reason = in_short(message, ex)
        if "subcommand" in message:
            self.print_usage(sys.stderr)
        self.exit(2, f"error: {reason}{hint(reason, self._options())}\n")

    def _options(self) -> set[str]:
        inner = self._subcommands_action.choices.values() if self._subcommands_action else ()
        return {action.dest for parser in (self, *inner) for action in parser._actions}


class LayershedCLI(LightningCLI):
    """LightningCLI with the commands of :class:`Trainer`, and a tokenizer that follows the model."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """LightningCLI's own, and those of :class:`Trainer`."""
        return {**LightningCLI.subcommands(), **{name: {"model", "datamodule"} for name in _USAGE}}

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Say in plain words what the subcommands and the groups of options are for."""
        super().setup_parser(*args, **kwargs)
        subcommands = self.parser._subcommands_action
        for choice in subcommands._choices_actions if subcommands else ():
            choice.help = _WHAT_FOR[choice.dest]
        for name, parser in self._subcommand_parsers.items():
            parser.usage = f"{self.parser.prog} {name} {_USAGE.get(name, '[--config FILE] [--OPTION VALUE ...]')}"
            parser.description = _WHAT_FOR[name]
            if name in _USAGE:
                known = {action.dest for action in parser._actions}
                for option in (option for option in _OF_FIT if option not in known):
                    parser.add_argument(f"--{option}", type=_refused, default=None, help=argparse.SUPPRESS)
            listed = (_WITHOUT_TEXT if name == "plan" else _TRAINING_FREE) if name in _USAGE else {}
            for action in parser._actions:
                action.help = _HELP.get(action.dest, action.help)
                section, option = f"{action.dest}..".split(".")[:2]
                if section in listed and option not in listed[section]:
                    action.help = argparse.SUPPRESS
            for section, group in (parser.groups or {}).items():
                group.title = _SECTIONS.get(section, f"options of {name} alone")
        if "plan" in self._subcommand_parsers:
            # what a model is run in, where it is planned for
            self._subcommand_parsers["plan"].set_defaults({"model.dtype": "bfloat16"})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Defaults for a first run."""
        parser.set_defaults({"seed_everything": 0})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, find the last checkpoint, and refuse one that could not be read later.

        Lightning's own warns when there is a ``sys.argv`` besides ``args``; here ``args`` are made of it.
        """
        self.config = parser.parse_args(args)
        check_seed(self.config[self.config.subcommand].seed_everything)
        config = self.config[self.config.subcommand]
        path = str(config.get("ckpt_path") or "best")
        if config.get("ckpt_path") is None and (asked := _asked_checkpoint(args)):
            raise CheckpointError(
                f"ckpt_path={asked!r}: a --config behind it, as a run leaves one, says null; put --config first."
            )
        if path == "last":
            found = resolve_last(self.config.subcommand, config.trainer)
            config.ckpt_path = None if found is None else str(found)
        elif path.split(":")[0] not in _CHECKPOINT_WORDS and "://" not in path:
            try:
                check_checkpoint(Path(path), resumed=self.config.subcommand == "fit")
            except OSError as error:
                reason = error.strerror or error
                raise CheckpointError(
                    f"ckpt_path={path!r} cannot be read ({reason}); let this user read it."
                ) from error

    def _parse_ckpt_path(self) -> None:
        """Take the model's options from the checkpoint, as Lightning does, but no class: it may be a stranger's."""
        subcommand = self.config.subcommand
        path = Path(self.config[subcommand].get("ckpt_path") or "")
        if not path.is_file():
            return
        options = read_options(path, {*inspect.signature(CausalLM).parameters} - {"optimizer"})
        try:
            with redirect_stderr(io.StringIO()) as told:
                self.config = self.parser.parse_object({subcommand: {"model": options}}, self.config)
        except SystemExit:
            reason = told.getvalue().strip().removeprefix("error: ")
            raise CheckpointError(f"ckpt_path={str(path)!r}: the options of its model do not fit ({reason}).") from None

    def before_instantiate_classes(self) -> None:
        """The text is tokenized as the model expects it, unless said otherwise."""
        config = self.config[self.subcommand]
        if self.subcommand == "plan":
            config.data.source, config.data.tokenizer = "pydoc", None  # no text is needed: none is looked for
        elif config.data.tokenizer is None:
            config.data.tokenizer = config.model.pretrained

    def instantiate_classes(self) -> None:
        """To plan takes the model's skeleton alone."""
        with torch.device("meta") if self.subcommand == "plan" else nullcontext():
            super().instantiate_classes()

    def after_instantiate_classes(self) -> None:
        """Refuse text that the model has no embedding or no position for."""
        if self.subcommand == "plan":
            return
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


def _asked_checkpoint(words: Sequence[str]) -> str | None:
    """The checkpoint that a command line names."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option == "--ckpt_path":
            asked = value if equals else following
            return None if asked == "null" else asked
    return None


def main(arguments: Sequence[str] | None = None, *, quickstart: Path | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words of the command line; None takes those of the process.
        quickstart: Config that ``fit`` runs when none is given.

    Returns:
        Exit code: 0, or 1 after an error that is said in one sentence. Wrong usage exits with 2.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    named = any(word.startswith("-c") or word.split("=")[0] in ("--config", "-h", "--help") for word in words)
    if words[:1] == ["fit"] and quickstart is not None and not named:
        words[1:1] = ["--config", str(quickstart)]
    try:
        with _quiet():
            if _names_8bit_optimizer(words):
                # jsonargparse knows classes by their short names once they are imported; always imported,
                # bitsandbytes would make plain AdamW ambiguous
                importlib.import_module("bitsandbytes.optim")
            LayershedCLI(
                CausalLM,
                TextData,
                trainer_class=Trainer,
                save_config_kwargs={"overwrite": True},
                auto_configure_optimizers=False,
                parser_class=_Parser,
                parser_kwargs={
                    "prog": "train.py",
                    "description": "Training-aware layer dropping for transformers.",
                    "formatter_class": _HelpFormatter,
                },
                args=words,
            )
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        ours = next((cause for cause in _causes(error) if isinstance(cause, LayershedError)), None)
        told = str(ours)
        if ours is None:
            full = next((cause for cause in _causes(error) if getattr(cause, "errno", 0) == errno.ENOSPC), None)
            if full is None:
                raise
            told = f"{getattr(full, 'filename', None) or 'a file'}: {os.strerror(errno.ENOSPC)}; make room and resume."
        print(f"error: {one_line(told)}", file=sys.stderr)
        return 1
    return 0


def _names_8bit_optimizer(words: Sequence[str]) -> bool:
    """Whether the command line, or a config that it names, speaks of a class such as AdamW8bit."""
    return any(re.search(r"\b[A-Z]\w*8bit\b", text) for text in (*words, *read_configs(words)))


@contextmanager
def _quiet() -> Iterator[None]:
    """What other libraries say about themselves would bury what this run has to say."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    logs = [logging.getLogger(name) for name in _LOGS]
    with warnings.catch_warnings():
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        for log in logs:
            log.addFilter(_worth_saying)
        warnings.filterwarnings("ignore", message="Precision .* is not supported by the model summary")
        # two cores: more loader processes than the one would only compete with training
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # Lightning 2.6 calls what torch 2.13 and jsonargparse 4.53 deprecate
        warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning\.pytorch\.cli|jsonargparse")
        try:
            yield
        finally:
            for log in logs:
                log.removeFilter(_worth_saying)
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()


def _worth_saying(record: logging.LogRecord) -> bool:
    return not any(chatter in record.getMessage() for chatter in _CHATTER)


def _refused(value: object) -> NoReturn:
    raise argparse.ArgumentTypeError(f"this command has no such option; got {value}")
