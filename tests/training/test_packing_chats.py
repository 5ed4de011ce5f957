"""Packing of conversations, against plain Python; and whether models keep them apart, against each one run alone."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from layershed.importance.masks import tokens_with_a_place
from layershed.quality import evaluate_quality
from layershed.training.chat import IGNORED
from layershed.training.collate import collate
from layershed.training.isolation import why_not_apart
from layershed.training.packing import best_fit, pack_conversations
from tests.support.models import build_model

SIZE, PAD = 16, 0


@given(st.lists(st.integers(1, 9), max_size=30), st.integers(9, 20))
def test_best_fit_puts_every_item_in_one_group_that_is_not_too_long(lengths, size):
    groups = best_fit(lengths, size)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    sums = sorted(sum(lengths[index] for index in group) for group in groups)
    assert all(total <= size for total in sums)
    # no two groups fit in one: every group but one is more than half full
    assert all(one + other > size for one, other in pairwise(sums))


def conversations():
    """Token ids and labels: the answer is the second half."""
    generator = np.random.default_rng(0)
    for length in (5, 9, 7, 3, 12, 4):
        ids = generator.integers(3, 90, length).astype(np.int32)
        yield ids, np.where(np.arange(length) < length // 2, IGNORED, ids).astype(np.int32)


def test_packed_sequences_hold_whole_conversations_with_positions_of_their_own():
    pairs = list(conversations())
    packed = pack_conversations(pairs, SIZE, PAD)
    found = []
    for row in packed:
        assert {name: values.shape for name, values in row.items()} == dict.fromkeys(row, (SIZE,))
        starts = [*np.flatnonzero(row["position_ids"] == 0), SIZE]
        for start, end in pairwise(starts):
            ids = row["input_ids"][start:end].tolist()
            if ids != [PAD]:  # each token of the padding stands alone
                assert row["position_ids"][start:end].tolist() == list(range(end - start))
                assert row["labels"][start] == IGNORED, "the first token is predicted from another conversation"
                found.append((ids, row["labels"][start:end].tolist()))
    assert sorted(found) == sorted((ids.tolist(), labels.tolist()) for ids, labels in pairs)


def test_tokens_of_a_packed_batch_that_are_not_padding_are_found_by_their_positions():
    batch = collate(pack_conversations(list(conversations()), SIZE, PAD), PAD)
    counts = tokens_with_a_place(batch["position_ids"])
    assert torch.equal(counts, batch["input_ids"] != PAD)
    assert tokens_with_a_place(torch.zeros(2, 1, dtype=torch.int64)).all(), "a first token alone counts"
    assert tokens_with_a_place(torch.zeros(3, 2, 4)) is None


@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("gpt2", "sdpa"),
        ("gpt_neox", "eager"),
        ("gemma3_text", "sdpa"),
    ],
)
def test_packed_and_padded_conversations_have_the_same_loss(kind, attention):
    model, pairs = build_model(kind, attn_implementation=attention), list(conversations())
    assert why_not_apart(model) is None
    packed = collate(pack_conversations(pairs, SIZE, PAD), PAD)
    padded = collate([{"input_ids": ids, "labels": labels} for ids, labels in pairs], PAD)
    assert "attention_mask" in padded
    assert "attention_mask" not in packed
    alone = [
        cross_entropy(model(input_ids=ids[None]).logits[0, :-1], labels[1:], ignore_index=IGNORED, reduction="sum")
        for ids, labels in ((torch.tensor(ids).long(), torch.tensor(labels).long()) for ids, labels in pairs)
    ]
    predicted = sum(int((labels[1:] != IGNORED).sum()) for _, labels in pairs)
    expected = float(sum(alone).detach()) / predicted
    for batch in (packed, padded):
        measured = evaluate_quality(model, [batch])
        assert measured.tokens == predicted
        assert measured.loss == pytest.approx(expected, rel=1e-5)
        assert float(model(**batch, use_cache=False).loss.detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("bloom", "takes no position_ids"),
        ("recurrent_gemma", "lets the tokens of one conversation"),
        ("mamba", "position_ids"),
    ],
)
def test_model_that_mixes_packed_conversations_is_found_out(kind, reason):
    sizes = {"n_head": 4} if kind == "bloom" else {}
    before = torch.get_rng_state()
    assert reason in why_not_apart(build_model(kind, **sizes).train())
    assert torch.equal(torch.get_rng_state(), before)


def test_model_that_ignores_its_own_positions_is_found_out():
    model = build_model("llama")
    inner = model.model.forward
    model.model.forward = lambda *args, position_ids=None, **kwargs: inner(*args, **kwargs)
    assert "change the logits of another" in why_not_apart(model)


def test_attention_without_effect_proves_nothing():
    model = build_model("llama")
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
    assert "no effect of earlier tokens" in why_not_apart(model)
    assert "no weights yet" in why_not_apart(model.to("meta"))
    assert "no transformer" in why_not_apart(torch.nn.Linear(2, 2))
