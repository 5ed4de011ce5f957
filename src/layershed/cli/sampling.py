"""How ``train.py generate`` chooses tokens: transformers' GenerationConfig, from options of its names."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from layershed.errors import GenerationError, UnknownNameError

USUAL_TOKENS = 100
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_RANGES: dict[str, tuple[str, Any]] = {
    "max_new_tokens": ("at least 1", lambda value: value >= 1),
    "temperature": ("above 0", lambda value: value > 0),
    "top_k": ("at least 1", lambda value: value >= 1),
    "top_p": ("in (0, 1]", lambda value: 0 < value <= 1),
    "min_p": ("in [0, 1]", lambda value: 0 <= value <= 1),
    "repetition_penalty": ("above 0", lambda value: value > 0),
    "num_beams": ("at least 1", lambda value: value >= 1),
}


def check_sampling(options: Mapping[str, Any]) -> None:
    """Check the options that a user gave, before a model is loaded.

    Args:
        options: Fields of GenerationConfig; None where it is not given.

    Raises:
        GenerationError: If a number is out of range, or an option has no effect.
        UnknownNameError: If GenerationConfig has no such field.
    """
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    for name, value in options.items():
        if name not in known:
            raise UnknownNameError("field of GenerationConfig", name, known)
        words, holds = _RANGES.get(name, ("", None))
        if value is None or holds is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not holds(value):
            greedy = (
                ". Without it, --do_sample false takes the likeliest token"
                if (name, value) == ("temperature", 0)
                else ""
            )
            raise GenerationError(f"generate: {name}={value!r}: it must be {words}{greedy}.")
    sampled = [name for name in _SAMPLING if options.get(name) is not None]
    if sampled and options.get("do_sample") is False:
        raise GenerationError(f"generate: {sampled[0]} has no effect with do_sample=False. Leave out one of both.")


def generation_config(model: PreTrainedModel, tokenizer: Any, options: Mapping[str, Any]) -> GenerationConfig:
    """The model's own GenerationConfig with the options of the user.

    An option of sampling turns sampling on. Ends and padding that the model does not say come from the tokenizer.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        options: Checked by :func:`check_sampling`.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if any(name in given for name in _SAMPLING):
        given.setdefault("do_sample", True)
    own = copy.deepcopy(getattr(model, "generation_config", None) or GenerationConfig())
    if own.eos_token_id is None:
        own.eos_token_id = tokenizer.eos_token_id
    if own.pad_token_id is None:
        ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
        own.pad_token_id = next((each for each in (tokenizer.pad_token_id, *ends) if each is not None), None)
    own.update(**given)
    return own


def new_tokens(model: PreTrainedModel, prompt_tokens: int, wanted: int | None) -> int:
    """How many tokens to generate: those asked for, or 100, or what fits behind the prompt.

    Raises:
        GenerationError: If the model has too few positions.
    """
    places = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = None if places is None else places - prompt_tokens
    if room is not None and room < (wanted or 1):
        lower = f"set max_new_tokens to at most {room}" if room > 0 else "shorten the prompt"
        raise GenerationError(
            f"generate: the prompt has {prompt_tokens} tokens, and the model has {places} positions; {lower}."
        )
    return wanted or min(USUAL_TOKENS, room or USUAL_TOKENS)
