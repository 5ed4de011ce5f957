"""The prompts of ``train.py generate``: from the command line, a file or a conversation, as token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from layershed.errors import GenerationError

Message = dict[str, str]


@dataclass(frozen=True)
class Prompt:
    """What a model continues, or answers.

    Args:
        text: The text; of a conversation the last message.
        messages: The conversation, for the tokenizer's chat template; empty for plain text.
    """

    text: str
    messages: tuple[Message, ...] = ()


def read_prompts(prompt: str | None, file: str | None, *, chat: bool, system: str | None) -> list[Prompt]:
    """Read the prompts; nothing else is loaded.

    Args:
        prompt: One prompt.
        file: A .txt file with a prompt on each line, or a .jsonl file whose rows have ``prompt`` or ``messages``.
        chat: Whether each prompt is a message of the user.
        system: The first message of each conversation.

    Returns:
        The prompts; none if neither is given and the conversation is read from the terminal.

    Raises:
        GenerationError: If there is none, the file cannot be read, or options contradict each other.
    """
    if prompt is not None and file is not None:
        raise GenerationError("generate: both prompt and prompts are given. Give one prompt, or a file of prompts.")
    if system is not None and not chat:
        raise GenerationError("generate: a system message needs a chat template. Add --chat, or leave out --system.")
    if prompt is not None:
        found = [Prompt(prompt)]
    elif file is not None:
        found = _from_file(Path(file).expanduser())
    elif chat:
        return []
    else:
        raise GenerationError("generate: there is no prompt. Give --prompt TEXT or --prompts FILE, or --chat to talk.")
    return [as_chat(each, system) if chat and not each.messages else each for each in found]


def as_chat(prompt: Prompt, system: str | None, before: Sequence[Message] = ()) -> Prompt:
    """The prompt as the next message of a user in a conversation."""
    first = [] if system is None or before else [{"role": "system", "content": system}]
    return Prompt(prompt.text, (*before, *first, {"role": "user", "content": prompt.text}))


def check_template(tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer without a chat template, as base models have it.

    Raises:
        GenerationError: If it has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise GenerationError(
            f"generate: the tokenizer of {name!r} has no chat template, so it cannot write a conversation; base models "
            "have none. Leave out --chat to continue a text, or give the tokenizer of a chat model by --data.tokenizer."
        )


def encode(prompt: Prompt, tokenizer: Any) -> dict[str, Tensor]:
    """The ids and the mask of a prompt, each of shape (1, tokens).

    Raises:
        GenerationError: If the chat template refuses the conversation, or the prompt has no tokens.
    """
    if prompt.messages:
        try:
            found = tokenizer.apply_chat_template(
                list(prompt.messages), add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in prompt.messages)
            raise GenerationError(
                f"generate: the chat template refuses a conversation of {roles} ({error}). Write it as the template "
                "wants it."
            ) from error
    else:
        found = tokenizer(prompt.text, return_tensors="pt")
    ids: Tensor = found["input_ids"].long()
    if not prompt.messages and ids.shape[1] and ids[0, -1].item() == tokenizer.eos_token_id:
        ids = ids[:, :-1]  # some tokenizers end every text, and a model says nothing after the end
    if not ids.shape[1] and tokenizer.bos_token_id is not None:
        ids = torch.tensor([[tokenizer.bos_token_id]])
    if not ids.shape[1]:
        raise GenerationError("generate: the prompt has no tokens, and the tokenizer has no first token. Give a text.")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _from_file(path: Path) -> list[Prompt]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise GenerationError(f"generate: prompts={str(path)!r} is no UTF-8 text ({error.reason}).") from None
    except OSError as error:
        raise GenerationError(
            f"generate: prompts={str(path)!r} cannot be read ({error.strerror or error}); give another file."
        ) from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise GenerationError(f"generate: prompts={str(path)!r} holds no prompt.")
    if path.suffix != ".jsonl":
        return [Prompt(line) for _, line in numbered]
    return [_from_row(line, f"prompts={str(path)!r}, line {number}") for number, line in numbered]


def _from_row(line: str, where: str) -> Prompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise GenerationError(f"generate: {where} is not JSON ({error}).") from None
    messages = row.get("messages") if isinstance(row, Mapping) else None
    if messages is None:
        text = row.get("prompt") if isinstance(row, Mapping) else row
        if not isinstance(text, str):
            raise GenerationError(f"generate: {where} has neither a text under 'prompt' nor a list under 'messages'.")
        return Prompt(text)
    if not (isinstance(messages, list) and messages and all(map(_is_message, messages))):
        raise GenerationError(f"generate: {where}: messages must be a list of role and content, both text.")
    kept = tuple({"role": each["role"], "content": each["content"]} for each in messages)
    return Prompt(kept[-1]["content"], kept)


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(name), str) for name in ("role", "content"))
