"""What a run says that Ctrl-C or SIGTERM has stopped. Imports no torch."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Sequence
from pathlib import Path

from layershed.cli.commands import PROGRAM

SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Stopped(BaseException):
    """The run was stopped by a signal, and its checkpoint is saved. No error, so nothing that handles errors sees it.

    Args:
        signum: The signal.
        step: Optimizer steps taken.
        checkpoint: Where the checkpoint is.
    """

    def __init__(self, signum: int, step: int, checkpoint: Path) -> None:
        super().__init__(signum, step, checkpoint)
        self.signum, self.step, self.checkpoint = signum, step, checkpoint

    @property
    def exit_code(self) -> int:
        """128 and the number of the signal, as a shell has it."""
        return 128 + self.signum

    def told(self, words: Sequence[str]) -> str:
        """What happened, and the command that goes on.

        Args:
            words: The command line that was stopped.
        """
        again = shlex.join(["python", PROGRAM, *_without_checkpoint(words), "--ckpt_path", str(self.checkpoint)])
        return f"Stopped by {SIGNALS[signal.Signals(self.signum)]} after step {self.step}. To go on:\n{again}"


def _without_checkpoint(words: Sequence[str]) -> list[str]:
    kept, following = [], iter(words)
    for word in following:
        if word == "--ckpt_path":
            next(following, None)
        elif not word.startswith("--ckpt_path="):
            kept.append(word)
    return kept
