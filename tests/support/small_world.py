"""The text and the model that tests of the command line and bad inputs share."""

from __future__ import annotations

from typing import Any

TEXT = "\n\n".join(f"{number} is not {number + 1}, nor will it ever be {number + 2}." for number in range(120))
TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
}
