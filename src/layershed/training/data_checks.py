"""What TextData refuses: arguments out of range, and runs that a stream cannot feed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layershed.errors import DataError
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


def check_rows_left(source: Source, count: int, held: int) -> None:
    """Refuse a stream whose rows are all held out.

    Args:
        source: The source, for errors.
        count: Rows of the stream, counted up to one more than ``held``.
        held: First rows that are held out.

    Raises:
        DataError: If no row is left for training.
    """
    if count <= held:
        raise DataError(
            f"{source}: the stream has {count} rows, and the first {held} are held out (val_rows), so none is left for "
            "training; lower val_rows, or give more rows."
        )


def batches_of_run(trainer: Any, source: Source) -> int:
    """Number of batches that a run takes from a stream, at most: its first epoch is as long as the run.

    Args:
        trainer: The Trainer.
        source: The source, for errors.

    Raises:
        DataError: If the run has no end.
    """
    if trainer.max_steps >= 0:
        return int(trainer.max_steps * trainer.accumulate_grad_batches)
    if isinstance(trainer.limit_train_batches, int):
        return int(trainer.limit_train_batches)  # of each epoch; the next one goes on in the stream
    raise DataError(f"{source}: a stream has no end, so the run has none; set trainer.max_steps.")


def check_validation(trainer: Any, source: Source, batches: int) -> None:
    """Refuse an interval of validation that is longer than an epoch; Lightning's own error has no short form.

    Args:
        trainer: The Trainer.
        source: The source, for errors.
        batches: Training batches of an epoch, without the Trainer's limits.

    Raises:
        DataError: If no validation would run.
    """
    every, limit = trainer.val_check_interval, trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    validates = trainer.limit_val_batches > 0 and trainer.check_val_every_n_epoch is not None
    if validates and isinstance(every, int) and every > batches:
        raise DataError(
            f"{source}: an epoch has {batches} training batches, but val_check_interval={every}; lower it, or set "
            "trainer.check_val_every_n_epoch to null, which counts the batches of all epochs."
        )
