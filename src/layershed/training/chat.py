"""Conversations as token ids, by the tokenizer's chat template, with the tokens of the answers. Pure.

``{% generation %}`` in a template marks the answers. In other templates an answer begins where the messages before it,
with the prompt for an answer, end, and it ends with its own message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from layershed.errors import ChatTemplateError
from layershed.extras import needs
from layershed.training.conversations import Conversation

with needs("data", "TextData"):
    from jinja2 import TemplateError

IGNORED = -100
"""Label of a token without loss, as transformers has it."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens.

    Args:
        input_ids: The token ids.
        answers: By token, whether an answer of the assistant holds it.
    """

    input_ids: list[int]
    answers: list[bool]

    def labels(self, mask_prompts: bool) -> list[int]:
        """The token ids; -100 outside the answers if ``mask_prompts``."""
        if not mask_prompts:
            return self.input_ids
        return [token if learned else IGNORED for token, learned in zip(self.input_ids, self.answers, strict=True)]


def prompt_ids(tokenizer: Any, conversation: Conversation) -> list[int]:
    """Token ids of the messages and of the template's prompt for an answer: what a model goes on from.

    Raises:
        ChatTemplateError: If the template refuses the messages.
    """
    text = _written(tokenizer, conversation, len(conversation.messages), prompt=True)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def encode_conversation(tokenizer: Any, conversation: Conversation, *, mask_prompts: bool = True) -> Encoded:
    """The tokens of ``tokenizer.apply_chat_template(messages)``, and which of them are answers.

    The same tokens as trl's ``assistant_only_loss`` where the template has ``{% generation %}``, and as its
    ``completion_only_loss`` for a pair of prompt and answer.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        conversation: The messages.
        mask_prompts: Whether the answers must be known. If not, and they cannot be told apart, only the last token
            counts as one.

    Raises:
        ChatTemplateError: If the template refuses the messages; if it has no ``{% generation %}`` and writes a message
            differently when others follow it; or if it writes no answer.
    """
    try:
        if tokenizer.is_fast and _GENERATION.search(_template(tokenizer, conversation)):
            encoded = _marked(tokenizer, conversation)
        else:
            text, spans = _answers(tokenizer, conversation)
            encoded = _tokens(tokenizer, text, spans)
    except _UnstableError:
        if mask_prompts:
            raise
        text = _written(tokenizer, conversation, len(conversation.messages), prompt=False)
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        encoded = Encoded(ids, [index == len(ids) - 1 for index in range(len(ids))])
    if not any(encoded.answers):
        raise ChatTemplateError("the chat template writes no answer of these messages; check the template")
    return encoded


def shorten(encoded: Encoded, size: int) -> Encoded:
    """At most ``size`` tokens of a conversation, with the last answer.

    What follows the last answer is cut first, then the beginning of the conversation. If the last answer alone is too
    long, its end is cut: it keeps one token before it, from which its first token is predicted.

    Args:
        encoded: The conversation.
        size: Number of tokens, at least 2.
    """
    if len(encoded.input_ids) <= size:
        return encoded
    end = len(encoded.answers) - encoded.answers[::-1].index(True)
    begin = next((index + 1 for index in reversed(range(end)) if not encoded.answers[index]), 0)
    start = max(0, min(end - size, begin - 1))
    return Encoded(encoded.input_ids[start : start + size], encoded.answers[start : start + size])


def _template(tokenizer: Any, conversation: Conversation) -> str:
    """The template that transformers would choose: a tokenizer may have one for tools."""
    return str(tokenizer.get_chat_template(tools=conversation.tools))


def _marked(tokenizer: Any, conversation: Conversation) -> Encoded:
    """By ``{% generation %}``."""
    with _as_chat_error():
        written = tokenizer.apply_chat_template(
            list(conversation.messages),
            tools=conversation.tools,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
    answers = [bool(marked) for marked in written["assistant_masks"]]
    if conversation.first_answer:  # the prompt may hold answers of its own
        before = _written(tokenizer, conversation, conversation.first_answer, prompt=False)
        text = _written(tokenizer, conversation, len(conversation.messages), prompt=False)
        later = _tokens(tokenizer, text, [(_shared(before, text), len(text))]).answers
        answers = [marked and late for marked, late in zip(answers, later, strict=True)]
    return Encoded(list(written["input_ids"]), answers)


def _answers(tokenizer: Any, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
    """The whole conversation as text, and where its answers begin and end."""
    messages = conversation.messages
    text = _written(tokenizer, conversation, len(messages), prompt=False)
    spans = []
    for index in range(conversation.first_answer, len(messages)):
        if messages[index]["role"] != "assistant":
            continue
        through = _written(tokenizer, conversation, index + 1, prompt=False)
        start = _start(tokenizer, conversation, index, through)
        if start is None or not text.startswith(through):
            raise _UnstableError(f"message {index + 1}")
        spans.append((start, len(through)))
    return text, spans


def _start(tokenizer: Any, conversation: Conversation, index: int, through: str) -> int | None:
    """Where the answer begins in the text of the messages up to it; None if the text before it is another."""
    if index == 0:
        return 0  # many templates refuse an empty list
    asking = _written(tokenizer, conversation, index, prompt=True)
    if through.startswith(asking):
        return len(asking)
    before = _written(tokenizer, conversation, index, prompt=False)
    # the prompt for an answer may hold more than this answer begins with, such as the start of a thought
    return max(len(before), _shared(asking, through)) if through.startswith(before) else None


def _shared(one: str, other: str) -> int:
    """Number of characters that two texts share at their beginnings."""
    differ = (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def _tokens(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> Encoded:
    """The tokens of a text, and which of them begin within one of the spans of characters."""
    if tokenizer.is_fast:
        given = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts = [start for start, _ in given["offset_mapping"]]
        return Encoded(given["input_ids"], [any(a <= start < b for a, b in spans) for start in starts])
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    answers = [False] * len(ids)
    for span in spans:
        start, end = (_count(tokenizer, text[:place], ids) for place in span)
        answers[start:end] = [True] * (end - start)
    return Encoded(ids, answers)


def _count(tokenizer: Any, beginning: str, ids: Sequence[int]) -> int:
    """Number of tokens of the beginning of a text, with these tokens."""
    own = tokenizer(beginning, add_special_tokens=False, verbose=False)["input_ids"]
    if own != ids[: len(own)]:
        raise _UnstableError("an answer's first token", "the tokenizer")
    return len(own)


def _written(tokenizer: Any, conversation: Conversation, count: int, *, prompt: bool) -> str:
    """The first messages as the template writes them."""
    with _as_chat_error():
        return str(
            tokenizer.apply_chat_template(
                list(conversation.messages[:count]),
                tools=conversation.tools,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        )


@contextmanager
def _as_chat_error() -> Iterator[None]:
    try:
        yield
    except (TemplateError, TypeError, ValueError) as error:  # such as a sum of text and None
        raise ChatTemplateError(
            f"the chat template refuses the messages ({error}); change the row or the template"
        ) from error


class _UnstableError(ChatTemplateError):
    """A beginning of the conversation is not written as the beginning of the whole."""

    def __init__(self, what: str, who: str = "the chat template") -> None:
        super().__init__(
            f"{who} writes {what} differently when other messages follow, so the answers cannot be told apart; set "
            "data.chat_template to a template with {% generation %} around the answers, give one answer per row, "
            "or set data.mask_prompts to false"
        )
