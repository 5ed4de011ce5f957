"""Loads a tokenizer, and the chat template that goes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, ByT5Tokenizer

from layershed.errors import ChatTemplateError
from layershed.training.as_data_error import as_data_error

BYTE_CHAT_TEMPLATE = """\
{%- if tools %}{{ "tools: " + (tools | tojson) + "\\n" }}{% endif %}
{%- for message in messages %}
{{- message.role + ": " + (message.content or "") }}
{%- if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}
{%- if message.role == "assistant" %}{{ eos_token }}{% endif %}
{{- "\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "assistant: " }}{% endif %}"""
"""Template of the byte tokenizer: a line ``role: content`` per message; the end token ends an answer."""


def load_tokenizer(name: str | None, chat_template: str | None = None) -> Any:
    """A transformers tokenizer.

    Args:
        name: None or ``"bytes"`` for one token per byte (a vocabulary of 259, with a chat template of plain lines);
            else a local folder, a hub id, or the path of a .gguf file.
        chat_template: Path of a Jinja file that replaces the tokenizer's chat template; None keeps its own.

    Raises:
        DataError: If the tokenizer or the template cannot be loaded.
    """
    tokenizer = _load(name)
    if chat_template is not None:
        with as_data_error(f"TextData(chat_template={chat_template!r}): the template could not be read"):
            tokenizer.chat_template = Path(chat_template).expanduser().read_text(encoding="utf-8")
    return tokenizer


def check_chat_template(tokenizer: Any, name: str | None) -> None:
    """Refuse a tokenizer that cannot write conversations.

    Args:
        tokenizer: A transformers tokenizer.
        name: Its name, for the message.

    Raises:
        ChatTemplateError: If it has no chat template.
    """
    if not tokenizer.chat_template:
        raise ChatTemplateError(
            f"The tokenizer {name!r} has no chat template, so it cannot write conversations. Set data.tokenizer to the "
            "folder or id of a chat model with the same vocabulary, or data.chat_template to a Jinja file."
        )


def padding_id(tokenizer: Any) -> int:
    """The token id of padding; the end of text where a tokenizer has none, since padding has no loss."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(number for number in ids if number is not None)


def _load(name: str | None) -> Any:
    if name is None or name == "bytes":
        return ByT5Tokenizer(extra_ids=0, chat_template=BYTE_CHAT_TEMPLATE)
    path = Path(name).expanduser()
    remedy = "; set data.tokenizer to another folder, or to bytes"
    with as_data_error(f"TextData(tokenizer={name!r}): the tokenizer could not be loaded", remedy):
        if path.suffix == ".gguf":
            return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
        return AutoTokenizer.from_pretrained(str(path) if path.exists() else name, trust_remote_code=False)
