"""Conversations on two ranks, against each other, their rows, and runs that were not interrupted."""

import pytest
import torch

from layershed.training.tokenizer import load_tokenizer
from tests.support.chats import chat_of
from tests.support.ranks.chats import CUT, HELD, KINDS, ROWS, STEPS


@pytest.fixture(scope="module")
def ranks(ddp_folder):
    return [torch.load(ddp_folder / "chats" / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def conversations(batches):
    """The packed conversations, as tuples of tokens, in order."""
    found = []
    for batch in batches:
        for ids, places in zip(batch["input_ids"].tolist(), batch["position_ids"].tolist(), strict=True):
            starts = [index for index, place in enumerate(places) if place == 0]
            parts = [tuple(ids[a:b]) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
            found += [part for part in parts if part != (0,)]  # not the padding
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_on_different_conversations_and_hold_equal_weights(ranks, kind):
    first, second = (found[kind]["whole"] for found in ranks)
    assert all(torch.equal(tensor, second["weights"][name]) for name, tensor in first["weights"].items())
    assert first["val_loss"] == second["val_loss"]
    assert len(first["batches"]) == len(second["batches"]) == STEPS
    tokenizer = load_tokenizer(None)
    rows = [number for part in range(2) for number in range(part, ROWS, 2)]
    texts = [tokenizer.apply_chat_template(chat_of(number), tokenize=False) for number in rows]
    known = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    seen = [conversations(run["batches"]) for run in (first, second)]
    assert {*seen[0], *seen[1]} <= set(known)
    if kind == "streamed":
        assert not {*seen[0]} & {*seen[1]}, "in any pass, a row belongs to one rank"
        assert not {*seen[0], *seen[1]} & set(known[:HELD]), "the first rows are held out"
    else:
        epoch = [conversations(run["batches"][:3]) for run in (first, second)]
        assert not {*epoch[0]} & {*epoch[1]}


def test_stream_on_two_ranks_resumed_equals_the_whole_run(ranks):
    for found in ranks:
        whole, resumed = found["streamed"]["whole"], found["streamed"]["resumed"]
        assert len(resumed["batches"]) == STEPS - CUT
        for expected, batch in zip(whole["batches"][CUT:], resumed["batches"], strict=True):
            assert all(torch.equal(tensor, batch[name]) for name, tensor in expected.items())
        assert all(torch.equal(tensor, resumed["weights"][name]) for name, tensor in whole["weights"].items())
        assert whole["val_loss"] == resumed["val_loss"]
