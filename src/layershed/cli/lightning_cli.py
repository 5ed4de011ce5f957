"""The parsers of the commands: those of LightningCLI, and layershed's score, prune, benchmark and plan.

Importing this module takes seconds, because the options are those of Lightning's Trainer.
"""

from __future__ import annotations

import argparse
import inspect
import io
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from layershed import callbacks  # the import makes their short names known to jsonargparse
from layershed.callbacks import ExactResume
from layershed.cli.commands import DESCRIPTION, PROGRAM, PURPOSES, USAGE
from layershed.cli.config_check import check_configs
from layershed.cli.last_checkpoint import resolve_last
from layershed.cli.messages import hint, in_short
from layershed.cli.quiet import quiet
from layershed.cli.run_folder import check_seed
from layershed.cli.stop_on_signal import StopOnSignal
from layershed.cli.trainer import Trainer
from layershed.errors import CheckpointError, DataError
from layershed.files.checkpoint_file import check_checkpoint, read_options
from layershed.performance.roofline import ACCELERATORS
from layershed.training.causal_lm import CausalLM
from layershed.training.text_data import TextData

# Help for options whose docstrings in Lightning or layershed do not fit a command line.
_HELP = {
    "seed_everything": "Seed of every random number generator; true draws a seed, false sets none.",
    "trainer.callbacks": f"Callbacks by name, best given in a config. layershed's: {', '.join(callbacks.__all__)}; "
    "--trainer.callbacks.help NAME lists the options of one.",
    "data.tokenizer": "A local folder, a hub id or a .gguf file; bytes for one token a byte (a vocabulary of 259). "
    "null takes the tokenizer of model.pretrained, or bytes if that is null.",
    "device": "Device to predict for: this (ceilings are measured), or a device with published ceilings: "
    f"{', '.join(ACCELERATORS)}.",
}
_SECTIONS = {
    "trainer": "where and how it runs (lightning.pytorch.Trainer)",
    "model": "the model (layershed.training.causal_lm.CausalLM)",
    "data": "the text or conversations (layershed.training.text_data.TextData)",
}
# Options that the help of the commands without training lists. They accept the others too, so that a config of fit
# works with them.
_TRAINING_FREE = {
    "trainer": {"logger", "default_root_dir", "accelerator", "devices", "precision"},
    "model": {"pretrained", "config", "dtype"},
}
# Options that the config of a fit run holds outside its sections. Commands without such an option accept null for it.
_OF_FIT = ("ckpt_path", "weights_only")
_WITHOUT_TEXT: dict[str, set[str]] = {**_TRAINING_FREE, "trainer": {"default_root_dir", "accelerator"}, "data": set()}
_CHECKPOINT_WORDS = ("best", "hpc", "registry")
_SEE_HELP = f"; see {PROGRAM} COMMAND --help"


class _HelpFormatter(DefaultHelpFormatter):
    """Formats help without docstring markup and without the names of all imported classes."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = re.sub(r", known subclasses: [^)]*", "", super()._get_help_string(action) or "")
        return re.sub(r":\w+:`[~.]*(.*?)`|``(.*?)``", r"\1\2", text)


class CommandParser(LightningArgumentParser):
    """A parser whose errors are one sentence and suggest the nearest known name."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with one sentence. The parser of a class inside a config raises, and the outer parser exits."""
        if not self.exit_on_error:
            super().error(message + hint(message, ex, self._names()), ex)
        reason = in_short(message, ex)
        if "subcommand" in message:
            self.print_usage(sys.stderr)
        advice = hint(reason, ex, self._names()) or ("" if "did you mean" in reason else _SEE_HELP)
        self.exit(2, f"error: {reason}{advice}\n")

    def _names(self) -> set[str]:
        inner = self._subcommands_action.choices.values() if self._subcommands_action else ()
        return {action.dest for parser in (self, *inner) for action in parser._actions} | set(callbacks.__all__)


class LayershedCLI(LightningCLI):
    """LightningCLI with the commands of :class:`Trainer`, and a tokenizer that follows the model."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The commands of LightningCLI and those of :class:`Trainer`."""
        return {**LightningCLI.subcommands(), **{name: {"model", "datamodule"} for name in USAGE}}

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Build the parsers, with layershed's help for commands and groups of options."""
        super().setup_parser(*args, **kwargs)
        subcommands = self.parser._subcommands_action
        for choice in subcommands._choices_actions if subcommands else ():
            choice.help = PURPOSES[choice.dest]
        for name, parser in self._subcommand_parsers.items():
            parser.usage = f"{self.parser.prog} {name} {USAGE.get(name, '[--config FILE] [--OPTION VALUE ...]')}"
            parser.description = PURPOSES[name]
            if name in USAGE:
                known = {action.dest for action in parser._actions}
                for option in (option for option in _OF_FIT if option not in known):
                    parser.add_argument(f"--{option}", type=_refused, default=None, help=argparse.SUPPRESS)
            listed = (_WITHOUT_TEXT if name == "plan" else _TRAINING_FREE) if name in USAGE else {}
            for action in parser._actions:
                action.help = _HELP.get(action.dest, action.help)
                section, option = f"{action.dest}..".split(".")[:2]
                if section in listed and option not in listed[section]:
                    action.help = argparse.SUPPRESS
            for section, group in (parser.groups or {}).items():
                group.title = _SECTIONS.get(section, f"options of {name} alone")
        if "plan" in self._subcommand_parsers:
            # the usual dtype for running a model
            self._subcommand_parsers["plan"].set_defaults({"model.dtype": "bfloat16"})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set the default seed."""
        parser.set_defaults({"seed_everything": 0})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, find the last checkpoint, and refuse an unreadable one.

        Lightning's own method warns if ``sys.argv`` and ``args`` are both given; here ``args`` come from ``sys.argv``.
        """
        self.config = parser.parse_args(args)
        check_seed(self.config[self.config.subcommand].seed_everything)
        config = self.config[self.config.subcommand]
        path = str(config.get("ckpt_path") or "best")
        if config.get("ckpt_path") is None and (asked := _asked_checkpoint(args)):
            raise CheckpointError(
                f"ckpt_path={asked!r}: a later --config resets ckpt_path to null. Put --config before --ckpt_path."
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
            reason = told.getvalue().strip().removeprefix("error: ").removesuffix(_SEE_HELP)
            raise CheckpointError(
                f"ckpt_path={str(path)!r}: the options of its model do not fit ({reason}); give another checkpoint."
            ) from None

    def before_instantiate_classes(self) -> None:
        """Take the model's tokenizer unless another is given."""
        config = self.config[self.subcommand]
        if self.subcommand == "plan":
            config.data.source, config.data.tokenizer = "pydoc", None  # plan needs no text
        elif config.data.tokenizer is None:
            config.data.tokenizer = config.model.pretrained

    def instantiate_classes(self) -> None:
        """Check the text before the model is built. Build the model without weights for ``plan``."""
        data = None if self.subcommand == "plan" else TextData(**self.config[self.subcommand].data.as_dict())
        if data is not None and data.is_local:
            data.check()
        with torch.device("meta") if self.subcommand == "plan" else nullcontext():
            super().instantiate_classes()
        self.datamodule = data or self.datamodule  # with the rows that were read

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add what every ``fit`` has: a signal stops it with a checkpoint, and it resumes exactly."""
        if self.subcommand == "fit":
            given = self.config_init[self.subcommand].trainer.get("callbacks")
            listed = given if isinstance(given, list) else [] if given is None else [given]
            exact = [] if any(isinstance(callback, ExactResume) for callback in listed) else [ExactResume()]
            kwargs["callbacks"] = [*listed, *exact, StopOnSignal()]
        return super().instantiate_trainer(**kwargs)

    def after_instantiate_classes(self) -> None:
        """Refuse text for which the model has too few embeddings or positions."""
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
    """The value of --ckpt_path in a command line."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option == "--ckpt_path":
            asked = value if equals else following
            return None if asked == "null" else asked
    return None


def run_command(words: Sequence[str]) -> None:
    """Parse a command line and run its command.

    Raises:
        SystemExit: With 0 after a help text, with 2 after wrong usage.
        LayershedError: If an input of the command is missing or wrong.
    """
    check_configs(words)
    # If --config comes first, the config may name the command, so all commands need a parser.
    cli = _only(words[0]) if words[:1] and words[0] in PURPOSES else LayershedCLI
    with quiet():
        cli(
            CausalLM,
            TextData,
            trainer_class=Trainer,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            parser_class=CommandParser,
            parser_kwargs={"prog": PROGRAM, "description": DESCRIPTION, "formatter_class": _HelpFormatter},
            args=list(words),
        )


def _only(command: str) -> type[LayershedCLI]:
    """The command line with one command only: building the parsers of all eight takes half a second."""

    class OneCommand(LayershedCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {command: LayershedCLI.subcommands()[command]}

    return OneCommand


def _refused(value: object) -> NoReturn:
    raise argparse.ArgumentTypeError(f"this command has no such option; got {value}")
