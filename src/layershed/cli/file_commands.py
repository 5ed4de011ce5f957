"""The commands that read files of runs and load no model: ``compare`` and ``recommend``. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from layershed.cli.commands import FILE_COMMANDS, PROGRAM, PURPOSES
from layershed.cli.messages import hint, in_short


class _Parser(ArgumentParser):
    """A parser whose errors are one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        reason = in_short(message, ex)
        advice = hint(reason, ex, {action.dest for action in self._actions})
        self.exit(2, f"error: {reason}{advice or f'; see {self.prog} --help'}\n")


def run_file_command(words: Sequence[str]) -> None:
    """Parse a command line and run its command.

    Raises:
        SystemExit: With 0 after a help text, with 2 after wrong usage.
        LayershedError: If a file is missing or damaged.
    """
    name, *rest = words
    parser = _Parser(
        prog=f"{PROGRAM} {name}",
        usage=f"{PROGRAM} {name} {FILE_COMMANDS[name]}",
        description=PURPOSES[name],
        formatter_class=DefaultHelpFormatter,
    )
    if name == "compare":
        from layershed.cli.compare import compare

        parser.add_argument("runs", nargs="+", type=str, help="Folders of runs, or folders that hold several.")
        parser.add_function_arguments(compare, skip={"runs"}, as_group=False)
        given = parser.parse_args(rest)
        compare(given.runs, page=given.page)
    if name == "recommend":
        from layershed.cli.recommend import recommend

        parser.add_argument("result", type=str, help="The folder of a benchmark's sweep or of a score, or its file.")
        parser.add_function_arguments(recommend, skip={"result"}, as_group=False)
        given = parser.parse_args(rest)
        recommend(given.result, max_loss_increase=given.max_loss_increase, scope=given.scope)
