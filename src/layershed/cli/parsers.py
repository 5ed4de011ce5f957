"""The parsers of the commands: their help, and their errors in one sentence."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from typing import NoReturn

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

from layershed import callbacks
from layershed.cli.commands import PROGRAM, PURPOSES, USAGE
from layershed.cli.messages import advises, hint, in_short, options_of
from layershed.cli.named_callbacks import by_name
from layershed.performance.roofline import ACCELERATORS

# Help for options whose docstrings in Lightning or layershed do not fit a command line.
_HELP = {
    "seed_everything": "Seed of every random number generator; true draws a seed, false sets none.",
    "trainer.callbacks": f"Callbacks by name, best given in a config. layershed's: {', '.join(callbacks.__all__)}; "
    "--trainer.callbacks.help CLASS lists the options of one; --trainer.callbacks.NAME.OPTION VALUE sets one, and "
    "--trainer.callbacks.NAME null leaves a callback out.",
    "data.tokenizer": "A local folder, a hub id or a .gguf file; bytes for one token a byte (a vocabulary of 259). "
    "null takes the tokenizer of model.pretrained, or bytes if that is null.",
    "control": "true runs the same steps again without the drop, after the run, so that the report says what the drop "
    "cost; a run directory takes a finished run without the drop instead.",
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
_TOKENIZER = {**_TRAINING_FREE, "trainer": {"default_root_dir", "accelerator", "precision"}, "data": {"tokenizer"}}
_WITHOUT_TEXT: dict[str, set[str]] = {**_TRAINING_FREE, "trainer": {"default_root_dir", "accelerator"}, "data": set()}
_LISTED = {"plan": _WITHOUT_TEXT, "generate": _TOKENIZER, "evaluate": _TOKENIZER}
SEE_HELP = f"; see {PROGRAM} COMMAND --help"


class HelpFormatter(DefaultHelpFormatter):
    """Formats help without docstring markup and without the names of all imported classes."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = re.sub(r", known subclasses: [^)]*", "", super()._get_help_string(action) or "")
        return re.sub(r":\w+:`[~.]*(.*?)`|``(.*?)``", r"\1\2", text)


class CommandParser(LightningArgumentParser):
    """A parser whose errors are one sentence and suggest the nearest known name."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with one sentence. The parser of a class inside a config raises, and the outer parser exits."""
        if not self.exit_on_error:
            own = [
                action.dest for action in self._actions if action.help != argparse.SUPPRESS and action.dest != "help"
            ]
            super().error(message + (hint(message, ex, own) or options_of(message, own)), ex)
        reason = in_short(message, ex)
        if "subcommand" in message:
            self.print_usage(sys.stderr)
        advice = hint(reason, ex, self._names()) or ("" if advises(reason) else SEE_HELP)
        self.exit(2, f"error: {reason}{advice}\n")

    def _names(self) -> set[str]:
        inner = self._subcommands_action.choices.values() if self._subcommands_action else ()
        actions = [action for parser in (self, *inner) for action in parser._actions]
        # an option of fit that another command accepts only from a config is not suggested
        shown = {action.dest for action in actions if action.help != argparse.SUPPRESS or "." in action.dest}
        return shown | set(callbacks.__all__)


def describe(parser: LightningArgumentParser, name: str, program: str) -> None:
    """Give the parser of a command layershed's help, and let it take the config of a fit run.

    Args:
        parser: The parser.
        name: The command.
        program: How the program is called.
    """
    by_name(parser)
    parser.usage = f"{program} {name} {USAGE.get(name, '[--config FILE] [--OPTION VALUE ...]')}"
    parser.description = PURPOSES[name]
    if name in ("predict", *USAGE):
        known = {action.dest for action in parser._actions}
        for option in (option for option in _OF_FIT if option not in known):
            parser.add_argument(f"--{option}", type=_refused, default=None, help=argparse.SUPPRESS)
    listed = _LISTED.get(name, _TRAINING_FREE) if name in USAGE else {}
    for action in parser._actions:
        _describe_option(action, name, listed)
    for section, group in (parser.groups or {}).items():
        group.title = _SECTIONS.get(section, f"options of {name} alone")
    if name in ("validate", "test"):
        parser.set_defaults(verbose=False)  # EvaluatedModel prints the metrics
    if name == "plan":
        parser.set_defaults({"model.dtype": "bfloat16"})  # the usual dtype for running a model


def _describe_option(action: argparse.Action, name: str, listed: Mapping[str, set[str]]) -> None:
    action.help = _HELP.get(action.dest, action.help)
    if action.dest == "control" and name != "fit":
        action.help = argparse.SUPPRESS  # accepted, so that a config of fit works
    section, option = f"{action.dest}..".split(".")[:2]
    if name in USAGE and not option and action.default is False:
        action.nargs, action.const = "?", True  # --standalone alone is --standalone true
    if section in listed and option not in listed[section]:
        action.help = argparse.SUPPRESS


def _refused(value: object) -> NoReturn:
    raise argparse.ArgumentTypeError(f"this command has no such option; got {value}")
