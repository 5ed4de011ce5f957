"""``python train.py``: runs a command and reports an error in one sentence. Imports torch only if it needs it."""

from __future__ import annotations

import errno
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from layershed.cli.commands import FILE_COMMANDS, answer_overview
from layershed.cli.messages import causes, one_line
from layershed.cli.stopped import Stopped
from layershed.errors import LayershedError
from layershed.extras import needs


def main(arguments: Sequence[str] | None = None, *, quickstart: Path | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words of the command line; None takes those of the process.
        quickstart: Config that ``fit`` uses if none is given.

    Returns:
        Exit code: 0; 1 after an error, printed as one sentence; 130 after Ctrl-C; 143 after SIGTERM, if ``fit`` could
        save a checkpoint.

    Raises:
        SystemExit: With 0 after a help text, with 2 after wrong usage.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    answer_overview(words)
    named = any(word.startswith("-c") or word.split("=")[0] in ("--config", "-h", "--help") for word in words)
    if words[:1] == ["fit"] and quickstart is not None and not named:
        words[1:1] = ["--config", str(quickstart)]
    try:
        with needs("cli", "The command line"):
            if words[0] in FILE_COMMANDS:
                from layershed.cli.file_commands import run_file_command

                run_file_command(words)
                return 0
            with _no_garbage_collection():
                from layershed.cli.lightning_cli import run_command
            run_command(words)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Stopped as stopped:
        print(stopped.told(words), file=sys.stderr)
        return stopped.exit_code
    except Exception as error:
        sentence = _sentence_of(error)
        if sentence is None:
            raise
        print(f"error: {one_line(sentence)}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Imports leave no garbage, but the search for it takes a sixth of their time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _sentence_of(error: Exception) -> str | None:
    """Sentence to print instead of a traceback; None for a bug, which keeps its traceback."""
    for cause in causes(error):
        if isinstance(cause, LayershedError):
            return str(cause)
    for cause in causes(error):
        if getattr(cause, "errno", 0) == errno.ENOSPC:
            where = getattr(cause, "filename", None) or "a file"
            return f"{where} cannot be written: {os.strerror(errno.ENOSPC)}; make room and resume."
    return None
