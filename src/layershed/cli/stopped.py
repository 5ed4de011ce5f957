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
        told = f"Stopped by {SIGNALS[signal.Signals(self.signum)]} after step {self.step}. To go on:"
        return f"{told}\n{_again(words, self.checkpoint)}"


class StoppedControl(Stopped):
    """The control was stopped by a signal; its run is complete.

    Args:
        signum: The signal.
        step: Optimizer steps of the run.
        checkpoint: The run's last checkpoint; None if it has none.
    """

    def __init__(self, signum: int, step: int, checkpoint: Path | None) -> None:
        BaseException.__init__(self, signum, step, checkpoint)
        self.signum, self.step, self.last = signum, step, checkpoint

    def told(self, words: Sequence[str]) -> str:
        """What happened, and the command that runs the control."""
        told = f"The control was stopped by {SIGNALS[signal.Signals(self.signum)]}. Its run is complete."
        if self.last is None:
            return f"{told} It has no checkpoint, so only the whole command runs the control again."
        return f"{told} To run only the control:\n{_again(words, self.last)}"


def _again(words: Sequence[str], checkpoint: Path) -> str:
    return shlex.join(["python", PROGRAM, *_without_checkpoint(words), "--ckpt_path", str(checkpoint)])


def _without_checkpoint(words: Sequence[str]) -> list[str]:
    kept, following = [], iter(words)
    for word in following:
        if word == "--ckpt_path":
            next(following, None)
        elif not word.startswith("--ckpt_path="):
            kept.append(word)
    return kept
