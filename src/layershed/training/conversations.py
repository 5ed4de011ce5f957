"""Rows of a data set as conversations: which columns hold them, and what is wrong with a row. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
"""Roles that chat templates of transformers know; ``developer``, ``function`` and ``ipython`` are names of some."""


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template.

    Args:
        messages: Mappings with ``role`` and ``content``, and what else the row gives, such as ``tool_calls``.
        tools: JSON schemas of the functions that the assistant may call; None without.
        first_answer: Index of the first message whose content is learned, if it is the assistant's.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Any] | None = None
    first_answer: int = 0


@dataclass(frozen=True)
class Columns:
    """The columns that hold a conversation: ``messages``, or ``prompt`` and ``response``.

    Args:
        messages: Column of lists of messages; None if there are pairs.
        prompt: Column of questions: text, or lists of messages.
        response: Column of answers: text, or lists of messages.
    """

    messages: str | None = None
    prompt: str = ""
    response: str = ""


class RowError(ValueError):
    """What is wrong with a row, in a sentence that begins with the row."""


def find_columns(names: Sequence[str], prompt: str, response: str | None) -> Columns | None:
    """The columns of conversations among ``names``: ``messages``, or a pair; None without them.

    Args:
        names: Names of all columns.
        prompt: Name of the column of questions.
        response: Name of the column of answers; None for ``response`` or ``completion``, trl's name.
    """
    if "messages" in names and prompt == "prompt" and response is None:
        return Columns(messages="messages")
    answers = ("response", "completion") if response is None else (response,)
    answer = next((name for name in answers if name in names), None)
    return Columns(prompt=prompt, response=answer) if prompt in names and answer is not None else None


def conversation_of(row: Mapping[str, Any], columns: Columns) -> Conversation:
    """The conversation of a row.

    Args:
        row: Values by column. An optional column ``tools`` holds JSON schemas.
        columns: Where the conversation is.

    Raises:
        RowError: If it is none: no messages, a role that no template knows, a content that is not text, or no answer.
    """
    if columns.messages is not None:
        messages, first = _messages(row.get(columns.messages), columns.messages), 0
    else:
        asked = _turn(row.get(columns.prompt), columns.prompt, "user")
        messages = [*asked, *_turn(row.get(columns.response), columns.response, "assistant")]
        first = len(asked)
    if not any(message["role"] == "assistant" for message in messages[first:]):
        raise RowError("no message is the assistant's, so there is no answer to learn; leave the row out")
    return Conversation(messages, _tools(row.get("tools")), first)


def _turn(value: Any, column: str, role: str) -> list[dict[str, Any]]:
    """A text as a message of the role; or a list of messages as it is, since trl takes both."""
    if isinstance(value, str):
        if role == "assistant" and not value.strip():
            raise RowError(f"the answer in {column!r} is empty; fill it, or leave the row out")
        return [{"role": role, "content": value}]
    if value is not None and not _is_list(value):
        raise RowError(f"{column!r} must be text or a list of messages, but it is a {type(value).__name__}")
    return _messages(value, column)


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    if value is None:
        raise RowError(f"{column!r} is missing; fill it, or leave the row out")
    if not _is_list(value):
        kind = type(value).__name__
        raise RowError(f"{column!r} must be a list of messages with role and content, but it is a {kind}")
    if not value:
        raise RowError(f"{column!r} holds no message; leave the row out")
    place = "message {}" if column == "messages" else f"message {{}} of {column!r}"
    return [_message(message, place.format(number)) for number, message in enumerate(value, start=1)]


def _message(given: Any, place: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise RowError(f"{place} must hold role and content, but it is a {type(given).__name__}")
    message = {key: part for key, part in given.items() if part is not None}  # datasets fills gaps with None
    role, content = message.get("role"), message.get("content")
    if role is None:
        raise RowError(f"{place} has no role (its keys: {', '.join(map(str, message)) or 'none'}); call it role")
    if role not in ROLES:
        raise RowError(f"{place} has the role {role!r}; use system, user, assistant or tool")
    calls = role == "assistant" and message.get("tool_calls")
    if content is None and not calls:
        raise RowError(f"{place} has no content (its keys: {', '.join(map(str, message))}); call it content")
    if content is not None and not isinstance(content, str):
        raise RowError(f"the content of {place} must be text, but it is a {type(content).__name__}")
    if role == "assistant" and not calls and not str(content).strip():
        raise RowError(f"the answer in {place} is empty; fill it, or leave the row out")
    return message


def _tools(value: Any) -> Sequence[Any] | None:
    """The tools of a row; trl also takes them as JSON."""
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise RowError(f"'tools' is no JSON ({error}); write a list of schemas") from None
    if tools and not _is_list(tools):
        raise RowError(f"'tools' must be a list of JSON schemas, but it is a {type(tools).__name__}")
    return tools or None


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
