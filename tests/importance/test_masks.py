"""Padding read from a mask of queries and keys equals the mask of tokens that it was made of."""

import pytest
import torch

import layershed as ls
from layershed.errors import CalibrationError
from layershed.importance.masks import tokens_that_count
from tests.support.models import build_model

LENGTHS = {"left": (8, 3, 5, 1), "right": (8, 3, 5, 2), "none": (8, 8, 8, 8)}
LOWEST = torch.finfo(torch.float32).min


def of_tokens(side):
    """Shape (batch, tokens), true where a token is real."""
    mask = torch.zeros(4, 8, dtype=torch.bool)
    for row, length in zip(mask, LENGTHS[side], strict=True):
        row[slice(8 - length, None) if side == "left" else slice(length)] = True
    return mask


def pairs(tokens, pattern="causal"):
    """Shape (batch, 1, queries, keys), true where a query attends to a key."""
    position = torch.arange(tokens.shape[1])
    back = position[:, None] - position
    allowed = {"causal": back >= 0, "all": back > -99, "window": (back >= 0) & (back < 3)}[pattern]
    return allowed & tokens[:, None, None, :]


FORMS = {
    "bool": lambda mask: mask,
    "integers": lambda mask: mask.long(),
    "lowest": lambda mask: torch.zeros(mask.shape).masked_fill(~mask, LOWEST),
    "infinity": lambda mask: torch.zeros(mask.shape).masked_fill(~mask, -torch.inf),
    "ten thousand": lambda mask: torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill(~mask, -1e4),
    "biased": lambda mask: torch.full(mask.shape, -512.0).masked_fill(~mask, -torch.inf),
    "several heads": lambda mask: mask.expand(-1, 3, -1, -1),
    "no heads": lambda mask: mask[:, 0],
    "by layer type": lambda mask: {"sliding_attention": mask, "full_attention": mask},
    "empty rows filled": lambda mask: mask | ~mask.any(-1, keepdim=True),
}


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("pattern", ["causal", "all", "window"])
@pytest.mark.parametrize("side", list(LENGTHS))
def test_padding_of_a_mask_of_pairs_is_that_of_the_tokens(side, pattern, form):
    tokens = of_tokens(side)
    assert torch.equal(tokens_that_count(FORMS[form](pairs(tokens, pattern))), tokens)


@pytest.mark.parametrize("pattern", ["causal", "window"])
def test_left_padding_that_attends_to_itself_is_padding(pattern):
    tokens = of_tokens("left")[:3]
    mask = pairs(tokens, pattern) | torch.eye(8, dtype=torch.bool)
    assert torch.equal(tokens_that_count(mask), tokens)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("documents", [(4, 4), (3, 1, 4), (1, 4, 3), (4, 3, 1), (2, 2, 2, 2), (1,) * 8])
def test_packed_sequences_are_not_padding(documents, causal):
    number = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))
    mask = number[:, None] == number
    mask = mask.tril() if causal else mask
    for form in ("bool", "lowest"):
        assert tokens_that_count(FORMS[form](mask[None, None])).all()


def test_padding_after_packed_sequences_is_padding():
    number = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    mask = ((number[:, None] == number) & (number < 2)).tril()
    expected = [True] * 5 + [False] * 3
    assert tokens_that_count(mask[None, None])[0].tolist() == expected
    assert tokens_that_count((mask | torch.eye(8, dtype=torch.bool))[None, None])[0].tolist() == expected


def test_prefix_that_attends_both_ways_is_not_padding():
    mask = torch.ones(8, 8, dtype=torch.bool).tril()
    mask[:5, :5] = True
    assert tokens_that_count(mask[None, None]).all()
    mask[:, 3] = mask[3] = True  # a global token
    assert tokens_that_count(mask[None, None]).all()


def test_mask_of_keys_alone_gives_their_padding():
    tokens = of_tokens("right")
    assert torch.equal(tokens_that_count(tokens[:, None, None]), tokens)
    assert torch.equal(tokens_that_count(FORMS["lowest"](tokens[:, None, None])), tokens)
    assert torch.equal(tokens_that_count(FORMS["lowest"](tokens)), tokens)
    assert torch.equal(tokens_that_count(tokens.float()), tokens)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (pairs(of_tokens("left")).float(), "floats of 0 and 1"),
        (pairs(of_tokens("right")) | torch.eye(8, dtype=torch.bool), "several tokens in a row"),
        (torch.ones(8), "1 dimensions"),
        ("a word", "it is a str"),
    ],
    ids=["floats", "padding that attends to itself after the text", "one dimension", "word"],
)
def test_mask_that_does_not_tell_padding_is_refused(mask, reason):
    with pytest.raises(CalibrationError, match=rf"Cannot read padding.*{reason}.*Pass a mask of shape"):
        tokens_that_count(mask)


@pytest.mark.parametrize("form", ["bool", "lowest", "empty rows filled"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_importance_under_a_mask_of_pairs_is_that_under_a_mask_of_tokens(side, form):
    model = build_model("llama")
    ids = torch.randint(3, 97, (4, 8), generator=torch.Generator().manual_seed(0))
    tokens = of_tokens(side)
    position_ids = (tokens.cumsum(-1) - 1).clamp(min=0)
    batch = {"input_ids": ids.masked_fill(~tokens, 0), "position_ids": position_ids}
    expected = ls.estimate_importance(model, [{**batch, "attention_mask": tokens.long()}])
    scores = ls.estimate_importance(model, [{**batch, "attention_mask": FORMS[form](pairs(tokens))}])
    assert scores.tokens == expected.tokens == tokens.sum()
    assert dict(scores) == pytest.approx(dict(expected), rel=1e-5)
    assert scores.blocks == pytest.approx(expected.blocks, rel=1e-5)


def test_estimating_importance_refuses_a_mask_that_does_not_tell_padding():
    tokens = of_tokens("left")
    batch = {"input_ids": torch.full((4, 8), 5), "attention_mask": pairs(tokens).float()}
    with pytest.raises(CalibrationError, match="floats of 0 and 1"):
        ls.estimate_importance(build_model("llama"), [batch])
