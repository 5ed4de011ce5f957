"""What TextData refuses: arguments out of range, and runs that a stream cannot feed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layershed.errors import DataError
from layershed.integration.namespaces import rank_zero_warn
from layershed.training.sources import Source


def check_numbers(**given: tuple[int, int]) -> None:
    """Refuse numbers that are too small.

    Args:
        given: By name of an argument, its value and the least that it may be.
    """
    for name, (value, least) in given.items():
        if value < least:
            raise DataError(f"TextData({name}={value}): {name} must be at least {least}.")


def check_split(val_fraction: float, max_tokens: int | None, tokens: int) -> None:
    """Refuse a share or a limit out of range; ``tokens`` are those of one batch."""
    if not 0 < val_fraction < 1:
        raise DataError(f"TextData(val_fraction={val_fraction}): val_fraction must be in (0, 1).")
    if max_tokens is not None and max_tokens < tokens:
        raise DataError(
            f"TextData(max_tokens={max_tokens}): max_tokens must be at least batch_size * block_size = {tokens}, the "
            "tokens of one batch."
        )


def check_files(tokenizer: str | None, chat_template: str | None) -> None:
    """Refuse the path of a file that is not there."""
    gguf = tokenizer if str(tokenizer).endswith(".gguf") else None
    for name, path, kind in (("tokenizer", gguf, ".gguf"), ("chat_template", chat_template, "Jinja")):
        if path is not None and not Path(path).expanduser().is_file():
            raise DataError(f"TextData({name}={path!r}): there is no such file; give the path of a {kind} file.")


def check_stream(num_workers: int, max_tokens: int | None) -> None:
    """Refuse options that do not go with ``streaming``."""
    if num_workers > 1:
        raise DataError(
            f"TextData(streaming=True, num_workers={num_workers}): one process reads a stream for each device; "
            "set num_workers to 0 or 1."
        )
    if max_tokens is not None:
        raise DataError(
            f"TextData(streaming=True, max_tokens={max_tokens}): a stream has no end; set trainer.max_steps instead."
        )


def check_run(trainer: Any, source: Source) -> None:
    """Refuse, before training, a run that a stream without end cannot feed.

    Args:
        trainer: The Trainer; None in a loop of one's own.
        source: The source, for errors.
    """
    if trainer is None:
        return
    limit, epochs = trainer.limit_train_batches, trainer.max_epochs
    counted = isinstance(limit, int)
    if trainer.max_steps == -1 and not (counted and epochs == 1):
        raise DataError(f"{source}: a stream has no end, so the run has none; set trainer.max_steps.")
    if counted and epochs != 1 and not 0 <= trainer.max_steps <= limit:
        raise DataError(
            f"{source}: a stream is one epoch without end, so limit_train_batches={limit} cannot begin another one; "
            "set trainer.max_steps and trainer.val_check_interval instead."
        )
    if not counted and trainer.enable_validation and trainer.val_check_interval == 1.0:
        rank_zero_warn(
            f"{source}: a stream is one epoch without end, so no validation runs after an epoch. Set "
            "trainer.val_check_interval to a number of batches."
        )
