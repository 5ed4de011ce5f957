"""The commands of ``train.py`` and the help that lists them. Imports no torch."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import NoReturn

PROGRAM = "train.py"
DESCRIPTION = "Training-aware layer dropping for transformers."
CONFIG_HELP = "Path to a configuration file in json or yaml format."
PURPOSES = {
    "fit": "Train, and drop sublayers during training. Without --config it runs the quickstart.",
    "validate": "Measure loss and perplexity on the held-out text; --ckpt_path takes a checkpoint of fit.",
    "test": "The same as validate, under the names test_loss and test_perplexity.",
    "predict": "Continue the held-out text with the model, into predictions.jsonl; or write its logits.",
    "score": "Measure the importance of every sublayer of a pretrained model: a table and bars, no training.",
    "prune": "Drop sublayers of a pretrained model without training: score, drop, measure, save.",
    "benchmark": "Measure a dropped model against its dense base, or sweep over drops of a dense one.",
    "evaluate": "Score a dropped model on tasks and long contexts, with the dense one beside it if asked.",
    "generate": "Continue or answer prompts by a dropped model, with the dense one beside it if asked.",
    "plan": "Predict size and speed after a drop on a device. Needs the model's config only: no weights, no text.",
    "compare": "Put runs side by side: what differs in their configurations, their figures, their curves on one axis.",
    "recommend": "Say how many to drop, from a sweep of benchmark or from importances.",
}
# Usage of the commands that read files of runs and load no model.
FILE_COMMANDS = {
    "compare": "RUN RUN [RUN ...] [--page FILE]",
    "recommend": "RUN [--max_loss_increase NATS] [--scope SCOPE]",
}
# Usage of the commands that do not train. LightningCLI provides the others.
USAGE = {
    "score": "--model.pretrained MODEL [--OPTION VALUE ...]",
    "prune": "--model.pretrained MODEL (--ratio SHARE | --count NUMBER) [--OPTION VALUE ...]",
    "benchmark": "(--model.pretrained DROPPED --base DENSE | --ckpt_path FILE | --model.pretrained DENSE --counts LIST)"
    " [...]",
    "evaluate": "--model.pretrained MODEL [--tasks LIST] [--passkey LIST] [--dense] [--OPTION VALUE ...]",
    "generate": "--model.pretrained MODEL (--prompt TEXT | --prompts FILE | --chat) [--dense] [--OPTION VALUE ...]",
    "plan": "--model.pretrained MODEL [--scope SCOPE --count NUMBER | --plan FILE] [--device NAME] [...]",
}
OVERVIEW = f"{PROGRAM} [-c CONFIG] {{{','.join(PURPOSES)}}} ..."


class _Overview(argparse.ArgumentParser):
    """Parser that lists the commands without their options."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"error: {message}\n")


def answer_overview(words: Sequence[str]) -> None:
    """Print the list of commands, or an error if the command is missing or unknown, and exit.

    Does nothing if the command is known. The full parsers import torch, so this answer comes seconds earlier.

    Raises:
        SystemExit: After the answer.
    """
    first = words[0] if words else ""
    if first in PURPOSES or (first.startswith("-") and first not in ("-h", "--help")):
        return
    parser = _overview()
    if first.startswith("-"):
        parser.parse_args([first])
    near = difflib.get_close_matches(first, PURPOSES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"{PROGRAM} --help lists them."
    parser.error(f"there is no command {first!r}; {hint}" if first else f"no command is given; {hint}")


def _overview() -> argparse.ArgumentParser:
    parser = _Overview(prog=PROGRAM, usage=OVERVIEW, description=DESCRIPTION)
    parser.add_argument("-c", "--config", metavar="CONFIG", help=CONFIG_HELP)
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", description=f"{PROGRAM} COMMAND --help lists the options of a command."
    )
    for name, purpose in PURPOSES.items():
        commands.add_parser(name, help=purpose)
    return parser
