"""Prompts in a batch of texts or conversations, and what a causal language model writes after them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from layershed.batches import device_of
from layershed.discovery.probe import evaluating

_IGNORED = -100  # label of a token without loss, as transformers has it


@dataclass(frozen=True)
class Passage:
    """A text or a conversation. A row of a batch holds one, or several packed ones.

    Args:
        ids: Its token ids, without padding.
        begin: Number of tokens before the last answer; half of the tokens if no answer can be told apart.
        end: Where that answer, or the text, ends.
        answered: Whether there is such an answer.
    """

    ids: list[int]
    begin: int
    end: int
    answered: bool


def passages_in(inputs: Mapping[str, Any]) -> list[Passage]:
    """The texts or conversations of a batch, in the order of its rows; none is shorter than 2 tokens.

    A passage begins where a position is 0. Padding is where the mask is 0, or where a position of 0 follows another.
    An answer is a run of labelled tokens that is neither the whole passage nor all but its first token.

    Args:
        inputs: ``input_ids``, and if there are any, ``labels``, ``position_ids`` and ``attention_mask``, all of shape
            (rows, tokens).
    """
    ids = inputs["input_ids"]
    columns = [_rows(inputs.get(name), ids) for name in ("labels", "position_ids", "attention_mask")]
    return [
        passage
        for row, labels, places, mask in zip(ids.tolist(), *columns, strict=True)
        for passage in _of_row(row, labels or row, places or range(len(row)), mask or [1] * len(row))
    ]


def greedy_continuations(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """The most likely next tokens after each prompt, one at a time, by the model's own ``generate``.

    Prompts of one length run in one batch. So there is no padding, and every position is right in a model of any kind.

    Args:
        model: A Hugging Face causal language model; it is in eval mode meanwhile.
        prompts: Token ids of each.
        new_tokens: Tokens to add, at most.

    Returns:
        The added tokens of each, up to and with the first token that ends a text.
    """
    given = model.generation_config.eos_token_id
    ends = set(given) if isinstance(given, Sequence) else {given} - {None}
    made: dict[int, list[int]] = {}
    for length in dict.fromkeys(map(len, prompts)):
        chosen = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[index] for index in chosen], device=device_of(model))  # (prompts, tokens)
        with evaluating(model), torch.no_grad():
            rows: Tensor = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                num_beams=1,
                max_new_tokens=new_tokens,
                pad_token_id=min(ends, default=0),  # after an end; it is cut off below
            )
        made.update(zip(chosen, rows[:, length:].tolist(), strict=True))
    return [_to_end(made[index], ends) for index in range(len(prompts))]


def _rows(value: Any, ids: Tensor) -> list[Any]:
    """The values of each row; None for each if there are none of that shape."""
    return value.tolist() if isinstance(value, Tensor) and value.shape == ids.shape else [None] * len(ids)


def _of_row(row: Sequence[int], labels: Sequence[int], places: Sequence[int], mask: Sequence[int]) -> Iterator[Passage]:
    kept = [index for index, whole in enumerate(mask) if whole]
    starts = [number for number, index in enumerate(kept) if number == 0 or places[index] == 0]
    for start, stop in pairwise([*starts, len(kept)]):
        if stop - start > 1:
            inside = kept[start:stop]
            yield _passage([row[index] for index in inside], [labels[index] != _IGNORED for index in inside])


def _passage(ids: list[int], labelled: Sequence[bool]) -> Passage:
    end = next((index + 1 for index in reversed(range(len(ids))) if labelled[index]), len(ids))
    begin = next((index + 1 for index in reversed(range(end)) if not labelled[index]), 0)
    answered = 1 < begin < end
    return Passage(ids, begin if answered else max(1, end // 2), end, answered)


def _to_end(tokens: list[int], ends: set[int]) -> list[int]:
    return tokens[: next((index + 1 for index, token in enumerate(tokens) if token in ends), len(tokens))]
