"""Long contexts: a pass key that must be found again, and the loss by the position in a text.

Perplexity hardly shows whether a model can look something up far back, which is what attention is for. So the model
reads filler text of some length, with the sentence "The pass key of NAME is NUMBER." at some depth, and is asked for
the number at the end. With several keys, it has to find the right one. A relative is the pass key task of Mohtashami
and Jaggi (arXiv 2305.16300).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from layershed.arguments import check_most
from layershed.batches import TokenIdRange, device_of, iterate
from layershed.discovery.find import find_transformer
from layershed.discovery.probe import evaluating
from layershed.errors import TaskError
from layershed.evaluation.results import TaskResults, TaskScore
from layershed.progress import least, track
from layershed.quality import check_head, predictions_of, read_batch

FILLER = (
    "The grass is green and the sky is blue. The sun rises in the east and sets in the west. Here we go, there and "
    "back again. Water runs down the hill, and birds fly over it. "
)
_NAMES = ("Ada", "Bruno", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas", "Karla", "Leo")
_DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


def passkey_retrieval(
    model: nn.Module,
    tokenizer: Any,
    lengths: Sequence[int] = (256, 512, 1024),
    *,
    keys: int = 1,
    questions: int = 10,
    filler: str = FILLER,
    seed: int = 0,
    name: str | None = None,
) -> TaskResults:
    """Share of pass keys that a causal language model finds again, by the length of the context.

    The model continues greedily, with its KV cache, and must give exactly the five digits.

    Args:
        model: A causal language model, or a module that holds one.
        tokenizer: Its tokenizer.
        lengths: Tokens of the contexts.
        keys: Number of pass keys in a context, of different names; one is asked for.
        questions: Questions at each length, at depths from a tenth to nine tenths of the context.
        filler: Text around the keys, repeated as often as needed.
        seed: Seed of the keys.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Returns:
        One score for each length, ``passkey_512`` or ``passkeys4_512``.

    Raises:
        TaskError: If an argument is out of range, or a context is too short for its keys or too long for the model.
        MeasurementError: If the model does not predict the next token.
    """
    for what, value in (("questions", questions), ("keys", keys)):
        check_most(value, what, TaskError)
    if keys > len(_NAMES):
        raise TaskError(f"keys={keys}: there are only {len(_NAMES)} names. Take fewer.")
    transformer: Any = find_transformer(model, name=name)
    check_head(transformer)
    most = getattr(transformer.config.get_text_config(), "max_position_embeddings", None)
    label = "passkey" if keys == 1 else f"passkeys{keys}"
    scores = []
    with evaluating(transformer), torch.no_grad():
        for length in lengths:
            if isinstance(most, int) and length + _ROOM > most:
                raise TaskError(
                    f"lengths={tuple(lengths)}: the model takes {most} tokens. Take at most {most - _ROOM}."
                )
            generator = random.Random(f"{seed}-{length}-{keys}")
            asked = [
                passkey_question(tokenizer, length, _DEPTHS[number % len(_DEPTHS)], keys, generator, filler)
                for number in range(questions)
            ]
            hits = [_answers(transformer, tokenizer, each) for each in track(asked, "Asking for pass keys", questions)]
            share = sum(hits) / questions
            error = (share * (1 - share) / questions) ** 0.5
            scores.append(TaskScore(f"{label}_{length}", "exact_match", share, error, questions=questions))
    return TaskResults(tuple(scores))


_ROOM = 16  # tokens of the answer


@dataclass(frozen=True)
class PasskeyQuestion:
    """One context with its question.

    Args:
        ids: Its token ids, shape (1, tokens).
        answer: The digits.
    """

    ids: Tensor
    answer: str


def passkey_question(
    tokenizer: Any, length: int, depth: float, keys: int, generator: random.Random, filler: str = FILLER
) -> PasskeyQuestion:
    """Build a context of about ``length`` tokens with keys in it; the one asked for lies at ``depth``, in (0, 1).

    Raises:
        TaskError: If the length has no room for the keys.
    """
    names = generator.sample(_NAMES, keys)
    digits = [str(generator.randrange(10_000, 100_000)) for _ in names]
    sentences = [f"The pass key of {who} is {number}. " for who, number in zip(names, digits, strict=True)]
    question = f"\nThe pass key of {names[0]} is"
    places = [depth, *(generator.random() for _ in names[1:])]
    parts = [_ids(tokenizer, sentence) for sentence in sentences]
    asked, unit = _ids(tokenizer, question), _ids(tokenizer, filler)
    room = length - sum(map(len, parts)) - len(asked)
    if room < len(parts):
        raise TaskError(f"lengths: {length} tokens have no room for {keys} pass keys. Take longer contexts.")
    around = (unit * (room // max(1, len(unit)) + 1))[:room]
    for place, part in sorted(zip(places, parts, strict=True), key=lambda pair: -pair[0]):
        at = int(place * room)
        around[at:at] = part
    return PasskeyQuestion(torch.tensor([[*around, *asked]]), digits[0])


def loss_by_position(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    buckets: int = 8,
    max_batches: int | None = None,
    name: str | None = None,
) -> dict[tuple[int, int], float]:
    """Mean next-token loss by the position in the text, in nats per token.

    Args:
        model: A causal language model, or a module that holds one.
        batches: As of :func:`evaluate_quality`, of one length.
        buckets: Number of equal ranges of positions.
        max_batches: Stop after that many batches.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Returns:
        The loss by (first position, position after the last) of the predicted tokens; without ranges that hold none.

    Raises:
        TaskError: If there is no batch, or they are of several lengths.
    """
    check_most(buckets, "buckets", TaskError)
    transformer = find_transformer(model, name=name)
    check_head(transformer)
    ids = TokenIdRange(transformer)
    sums: Tensor | None = None
    with evaluating(transformer), torch.no_grad():
        for batch in track(iterate(batches, max_batches), "Measuring loss by position", least(batches, max_batches)):
            logits, targets, counted = predictions_of(transformer, *read_batch(transformer, batch, ids))
            losses = cross_entropy(logits.transpose(1, 2).float(), torch.where(counted, targets, 0), reduction="none")
            found = torch.stack([torch.where(counted, losses, 0).double().sum(0), counted.double().sum(0)])
            if sums is not None and sums.shape != found.shape:
                raise TaskError("loss_by_position: the batches have several lengths. Give texts of one length.")
            sums = found if sums is None else sums + found
    ids.read()
    if sums is None:
        raise TaskError("loss_by_position: there is no batch. A generator can be read only once.")
    return _by_bucket(sums.cpu(), buckets)


def _by_bucket(sums: Tensor, buckets: int) -> dict[tuple[int, int], float]:
    length = sums.shape[1]
    edges = [round(place * length / buckets) for place in range(buckets + 1)]
    found = {}
    for start, stop in pairwise(edges):
        loss, tokens = sums[:, start:stop].sum(1).tolist()
        if tokens:
            found[start + 1, stop + 1] = loss / tokens  # the first token is not predicted
    return found


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _answers(transformer: Any, tokenizer: Any, question: PasskeyQuestion) -> bool:
    ids = question.ids.to(device_of(transformer))
    pad = transformer.generation_config.pad_token_id
    made = transformer.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=_ROOM,
        do_sample=False,
        pad_token_id=0 if pad is None else pad,
    )
    text = tokenizer.decode(made[0, ids.shape[1] :].tolist(), skip_special_tokens=True).strip()
    return bool(text.startswith(question.answer) and not text[len(question.answer) :][:1].isdigit())
