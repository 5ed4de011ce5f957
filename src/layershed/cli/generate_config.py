"""The config of ``train.py generate``: a checkpoint as the model, its tokenizer, checks before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layershed.cli.prompts import read_prompts
from layershed.cli.sampling import check_sampling
from layershed.errors import GenerationError
from layershed.files.run_config import config_in

_WORDS = ("last", "best")
_OPTIONS = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_beams")


def model_from_checkpoint(config: Any) -> None:
    """Let ``model.pretrained`` name a checkpoint of fit: a .ckpt file, ``last`` or ``best``.

    Raises:
        GenerationError: If ``ckpt_path`` names another one.
    """
    source = config.model.pretrained
    if source is None or not (source.endswith(".ckpt") or (source in _WORDS and not Path(source).is_dir())):
        return
    if config.ckpt_path is not None:
        raise GenerationError(f"generate: model.pretrained={source!r} and ckpt_path are two checkpoints. Give one.")
    config.ckpt_path, config.model.pretrained = source, None


def check_generation(config: Any) -> None:
    """Check prompts and options, and take the tokenizer of a checkpoint's run; needs neither data nor model.

    Raises:
        GenerationError: If a prompt is missing or an option is out of range.
    """
    options = {name: config.get(name) for name in _OPTIONS}
    check_sampling({**options, **(config.get("generation") or {})})
    read_prompts(config.prompt, config.prompts, chat=config.chat, system=config.system)
    config.data.source = "pydoc"  # no text is read
    if config.ckpt_path is not None and config.data.tokenizer == config.model.pretrained:
        config.data.tokenizer = _tokenizer_of_run(Path(config.ckpt_path)) or config.data.tokenizer


def _tokenizer_of_run(checkpoint: Path) -> str | None:
    """The tokenizer of the run that wrote a checkpoint: its config lies in the folder above."""
    data = (config_in(checkpoint.absolute().parents[1]) or {}).get("data")
    found = data.get("tokenizer") if isinstance(data, Mapping) else None
    return found if isinstance(found, str) else None
