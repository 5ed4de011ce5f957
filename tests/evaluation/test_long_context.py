"""Pass keys, asked of a model that can only look them up; loss by position against plain sums."""

import random

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import ByT5Tokenizer

import layershed as ls
from layershed.errors import TaskError
from layershed.evaluation.long_context import passkey_question
from tests.support.models import build_model

TOKENIZER = ByT5Tokenizer(extra_ids=0)


@pytest.mark.parametrize("keys", [1, 3])
@pytest.mark.parametrize("depth", [0.1, 0.9])
def test_a_question_has_its_length_and_its_key_at_its_depth(keys, depth):
    question = passkey_question(TOKENIZER, 400, depth, keys, random.Random(0))
    text = TOKENIZER.decode(question.ids[0].tolist())
    name = text.rpartition("The pass key of ")[2].removesuffix(" is")
    sentence = f"The pass key of {name} is {question.answer}. "
    assert question.ids.shape == (1, 400)
    assert text.count("The pass key of") == keys + 1
    assert abs(text.index(sentence) / 400 - depth) < 0.2


class Knows:
    """Makes ``generate`` give the digits after the last name that the context repeats."""

    def __init__(self, model, monkeypatch, wrong=0):
        self.calls = 0

        def generate(ids, **_):
            self.calls += 1
            text = TOKENIZER.decode(ids[0].tolist())
            name = text.rpartition("The pass key of ")[2].removesuffix(" is")
            digits = text.split(f"The pass key of {name} is ")[1][:5]
            answer = f" {digits}." if self.calls > wrong else f" {digits}9"
            return torch.cat([ids, torch.tensor([TOKENIZER(answer, add_special_tokens=False)["input_ids"]])], 1)

        monkeypatch.setattr(model, "generate", generate)


def test_keys_that_are_found_count_and_longer_numbers_do_not(monkeypatch):
    model = build_model("llama", vocab_size=300, max_position_embeddings=512)
    Knows(model, monkeypatch, wrong=3)
    found = ls.passkey_retrieval(model, TOKENIZER, (200, 300), questions=6, keys=2)
    assert [(score.task, score.value, score.questions) for score in found.scores] == [
        ("passkeys2_200", 0.5, 6),
        ("passkeys2_300", 1.0, 6),
    ]


def test_a_random_model_finds_no_key():
    model = build_model("llama", vocab_size=300, max_position_embeddings=512)
    assert ls.passkey_retrieval(model, TOKENIZER, (200,), questions=2).average == 0


@pytest.mark.parametrize(
    ("lengths", "options", "says"),
    [((600,), {}, "Take at most 496"), ((40,), {}, "no room"), ((200,), {"keys": 99}, "only 12 names")],
)
def test_contexts_that_cannot_be_are_refused(lengths, options, says):
    model = build_model("llama", vocab_size=300, max_position_embeddings=512)
    with pytest.raises(TaskError, match=says):
        ls.passkey_retrieval(model, TOKENIZER, lengths, questions=1, **options)


def test_loss_by_position_is_the_mean_of_each_range():
    model = build_model("llama")
    batches = [
        {"input_ids": torch.randint(3, 97, (2, 13), generator=torch.Generator().manual_seed(i))} for i in range(2)
    ]
    batches[1]["attention_mask"] = torch.ones(2, 13, dtype=torch.long)
    batches[1]["attention_mask"][0, :4] = 0
    found = ls.loss_by_position(model, batches, buckets=3)
    sums, counts = torch.zeros(12, dtype=torch.float64), torch.zeros(12)
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        with torch.no_grad():
            logits = model(**batch).logits[:, :-1]
        losses = cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none").view(2, 12)
        counted = mask[:, 1:] & mask[:, :-1]
        sums += torch.where(counted, losses, 0).double().sum(0)
        counts += counted.sum(0)
    assert list(found) == [(1, 5), (5, 9), (9, 13)]
    for (start, stop), loss in found.items():
        assert loss == pytest.approx(float(sums[start - 1 : stop - 1].sum() / counts[start - 1 : stop - 1].sum()))
