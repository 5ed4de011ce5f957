"""Quality against a plain reference in float64, one token at a time."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import AutoModel

from layershed.discovery.find import find_sublayers
from layershed.errors import MeasurementError
from layershed.quality import evaluate_quality
from layershed.surgery import bypass
from tests.support.models import build_model


def make_batch(seed, rows, length, padding=(), **extra):
    """Random tokens. ``padding`` is the number of padding positions of each row; negative pads on the left."""
    ids = torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row, number in enumerate(padding):
        padded = slice(length - number, length) if number >= 0 else slice(0, -number)
        ids[row, padded], mask[row, padded] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, **extra}


def plain_quality(model, rows):
    """Loss, accuracy and number of tokens over unpadded rows of (tokens, labels), each run by itself in float64."""
    model = copy.deepcopy(model).double().eval()
    losses, hits = [], []
    for tokens, labels in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].tolist()
        for scores, label in zip(logits, labels[1:], strict=False):
            if label == -100:
                continue
            top = max(scores)
            losses.append(top + math.log(sum(math.exp(score - top) for score in scores)) - scores[label])
            hits.append(scores.index(top) == label)
    return sum(losses) / len(losses), sum(hits) / len(hits), len(losses)


def rows_of(batches):
    """The rows without their padding."""
    for batch in batches:
        labels = batch.get("labels", batch["input_ids"])
        for ids, marks, mask in zip(batch["input_ids"], labels, batch["attention_mask"].bool(), strict=True):
            yield ids[mask].tolist(), marks[mask].tolist()


def check(found, expected):
    loss, accuracy, tokens = expected
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.accuracy == pytest.approx(accuracy, rel=1e-5)
    assert found.tokens == tokens


def predictable(model, batch):
    """Set half of the labels to the model's predictions, so that the accuracy is neither 0 nor 1."""
    with torch.no_grad():
        likely = model(**batch, use_cache=False).logits.argmax(-1)
    labels = batch["input_ids"].clone()
    labels[:, 1::2] = likely[:, :-1][:, ::2]
    return {**batch, "labels": labels}


def test_quality_is_the_mean_over_tokens_of_unequal_batches(model):
    batches = [predictable(model, make_batch(i, rows, length)) for i, (rows, length) in enumerate([(3, 9), (1, 4)])]
    expected = plain_quality(model, rows_of(batches))
    assert 0.2 < expected[1] < 0.8
    check(evaluate_quality(model, batches), expected)


def test_padding_on_either_side_does_not_change_quality(llama):
    shapes = [(2, 12, (5, -3)), (3, 7, (0, 6, -6)), (1, 5, (4,))]
    batches = [predictable(llama, make_batch(i, *shape)) for i, shape in enumerate(shapes)]
    expected = plain_quality(llama, rows_of(batches))
    assert expected[2] == (6 + 8) + (6 + 0 + 0) + 0
    check(evaluate_quality(llama, batches), expected)


def test_quality_ignores_labels_of_minus_100(llama):
    batch = make_batch(0, 3, 10, (0, 4, -2))
    labels = batch["input_ids"].flip(1).clone()
    labels[0, 2:5] = -100
    labels[1] = -100
    labels[2, ::2] = -100
    batches = [{**batch, "labels": labels}, make_batch(1, 1, 6)]
    check(evaluate_quality(llama, batches), plain_quality(llama, rows_of(batches)))


def test_quality_loss_without_padding_equals_the_models_loss(model, tokens):
    with torch.no_grad():
        expected = model(input_ids=tokens, labels=tokens, use_cache=False).loss.item()
    assert evaluate_quality(model, [{"input_ids": tokens}]).loss == pytest.approx(expected, rel=1e-5)


def test_quality_of_a_bypassed_model_equals_that_of_zeroed_branches(llama):
    batches = [make_batch(0, 2, 8)]
    dense = evaluate_quality(llama, batches)
    zeroed = copy.deepcopy(llama)
    for projection in (zeroed.model.layers[0].self_attn.o_proj, zeroed.model.layers[2].mlp.down_proj):
        nn.init.zeros_(projection.weight)
    found = find_sublayers(llama)
    bypass(llama, [found[0], found[5]])
    dropped = evaluate_quality(llama, batches)
    check(dropped, plain_quality(zeroed, rows_of(batches)))
    assert dropped.loss != pytest.approx(dense.loss, rel=1e-3)


def test_quality_ignores_sequences_of_one_token(llama):
    batches = [make_batch(0, 3, 1), make_batch(1, 2, 5), make_batch(2, 1, 1)]
    check(evaluate_quality(llama, batches), plain_quality(llama, rows_of(batches)))


def test_max_batches_limits_the_batches_taken_from_a_stream(llama):
    taken = []

    def stream():
        for seed in range(1000):
            taken.append(seed)
            yield make_batch(seed, 1, 6)

    quality = evaluate_quality(llama, stream(), max_batches=2)
    check(quality, plain_quality(llama, rows_of([make_batch(seed, 1, 6) for seed in range(2)])))
    assert taken == [0, 1]


def test_quality_is_measured_of_the_named_transformer(llama):
    holder = nn.ModuleDict({"student": llama, "teacher": build_model("gpt2")})
    batches = [make_batch(0, 2, 6)]
    check(evaluate_quality(holder, batches, name="student"), plain_quality(llama, rows_of(batches)))


def test_bare_token_ids_are_accepted_as_a_batch(llama):
    batch = make_batch(0, 2, 6)
    check(evaluate_quality(llama, [batch["input_ids"]]), plain_quality(llama, rows_of([batch])))


def test_quality_ignores_other_entries_of_a_batch(llama):
    batch = make_batch(0, 2, 6)
    noisy = {**batch, "text": ["a", "b"], "token_type_ids": torch.zeros(2, 6)}
    assert evaluate_quality(llama, [noisy]) == evaluate_quality(llama, [batch])


def test_quality_of_bfloat16_logits_is_summed_in_float32(llama):
    model = llama.to(torch.bfloat16)
    batches = [make_batch(i, 2, 12) for i in range(2)]
    total = 0.0
    for batch in batches:
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits[:, :-1].double()
        total -= logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).sum().item()
    assert evaluate_quality(model, batches).loss == pytest.approx(total / (2 * 2 * 11), rel=1e-5)


def test_quality_leaves_training_flags_random_state_and_gradients_unchanged(make_model):
    model = make_model(attention_dropout=0.5)
    model.train()
    model.model.layers[1].eval()
    batch = make_batch(0, 2, 6)
    model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss.backward()
    modes = [module.training for module in model.modules()]
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    random_state = torch.get_rng_state()
    quality = evaluate_quality(model, [batch])
    check(quality, plain_quality(model, rows_of([batch])))  # no dropout
    assert torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), gradients, strict=True))


def test_quality_error_leaves_training_flags_unchanged(llama):
    llama.train()
    with pytest.raises(MeasurementError, match="input_ids"):
        evaluate_quality(llama, [make_batch(0, 1, 4), {"tokens": 3}])
    assert all(module.training for module in llama.modules())


@pytest.mark.parametrize(
    "batches",
    [
        [],
        [make_batch(0, 3, 1)],
        [make_batch(0, 1, 4, (3,))],
        [make_batch(0, 2, 4, labels=torch.full((2, 4), -100))],
    ],
    ids=["no batch", "one token", "one token and padding", "every label ignored"],
)
def test_batches_without_a_token_to_predict_are_refused(llama, batches):
    with pytest.raises(MeasurementError, match="no token to predict"):
        evaluate_quality(llama, batches)


@pytest.mark.parametrize(
    "batch", [torch.ones(2, 3), [1, 2], {"labels": torch.ones(2, 3)}], ids=["floats", "list", "labels"]
)
def test_invalid_batch_is_refused(llama, batch):
    with pytest.raises(MeasurementError, match="mapping with input_ids"):
        evaluate_quality(llama, [batch])


def test_quality_of_a_model_without_a_head_is_refused(llama):
    model = AutoModel.from_config(llama.config)
    with pytest.raises(MeasurementError, match="LlamaModel does not predict the next token"):
        evaluate_quality(model, [make_batch(0, 1, 4)])


def test_nan_loss_of_one_batch_makes_the_mean_nan(llama):
    good, bad = make_batch(0, 2, 6), make_batch(1, 2, 6)
    good["input_ids"][good["input_ids"] == 50] = 51
    bad["input_ids"][0, 0] = 50
    with torch.no_grad():
        llama.model.embed_tokens.weight[50] = math.nan
    assert math.isfinite(evaluate_quality(llama, [good]).loss)
    assert math.isnan(evaluate_quality(llama, [good, bad]).loss)
