"""Batches in other forms become tensors, and batches that no model can read are refused in a sentence."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import layershed as ls
from layershed.errors import BatchError, CalibrationError, LayershedError, MeasurementError
from tests.support.models import build_model

IDS = torch.arange(1, 17).view(2, 8)
MASK = torch.ones_like(IDS).index_fill(1, torch.tensor([0, 1]), 0)
FORMS = {
    "lists": {"input_ids": IDS.tolist(), "attention_mask": MASK.tolist()},
    "arrays": {"input_ids": IDS.numpy(), "attention_mask": MASK.numpy()},
    "small integers": {"input_ids": IDS.int(), "attention_mask": MASK.bool()},
    "rows": {"input_ids": list(IDS), "attention_mask": list(MASK), "text": ["a", "b"]},
}
READERS = {
    "importance": lambda model, batches: ls.estimate_importance(model, batches),
    "quality": lambda model, batches: ls.evaluate_quality(model, batches),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("form", FORMS)
def test_batch_in_another_form_is_read_as_its_tensors(form, reader):
    read, model = READERS[reader], build_model()
    assert read(model, [FORMS[form]]) == read(model, [{"input_ids": IDS, "attention_mask": MASK}])


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("form", [IDS.tolist(), IDS.numpy()], ids=["lists", "array"])
def test_token_ids_alone_may_be_lists_or_an_array(form, reader):
    read, model = READERS[reader], build_model()
    assert read(model, [form]) == read(model, [IDS])


WRONG = {
    "one batch": ({"input_ids": IDS}, "not an iterable of batches"),
    "a path": ("text.txt", "not an iterable of batches"),
    "nothing": (None, "cannot be iterated"),
    "a number": (3, "cannot be iterated"),
    "tensor of one batch": (IDS, "token ids of shape"),
    "texts": (["a text"], "got a str"),
    "items of a dataset": ([{"input_ids": IDS[0]}], "Batch the items of a dataset with a DataLoader"),
    "ragged lists": ([{"input_ids": [[1, 2], [3]]}], "Pad the rows"),
    "text for ids": ([{"input_ids": ["a", "b"]}], "input_ids of a batch must be a tensor"),
    "floats": ([{"input_ids": IDS.float()}], "must be integers"),
    "unknown ids": ([{"input_ids": IDS + 90}], "has 97 embeddings"),
    "negative ids": ([{"input_ids": IDS - 2}], "hold -1"),
    "ragged mask": (
        [{"input_ids": IDS, "attention_mask": [[1], [1, 1]]}],
        "attention_mask of a batch must be",
    ),
    "another key": ([{"ids": IDS}], "a mapping with the keys ids"),
    "a loader of tuples": (DataLoader(TensorDataset(IDS, IDS), batch_size=2), "A batch must be a mapping"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("what", WRONG)
def test_wrong_batches_are_refused_in_a_sentence(what, reader):
    batches, words = WRONG[what]
    with pytest.raises(BatchError, match=words):
        READERS[reader](build_model(), batches)


LABELS = {
    "of classes": (torch.tensor([0, 1]), "labels of a batch must have the shape of input_ids"),
    "shorter": (IDS[:, :-1], "labels of a batch must have the shape of input_ids"),
    "too high": (IDS + 90, r"labels of a batch must be -100 or in \[0, 97\)"),
    "ragged": ([[1], [1, 2]], "labels of a batch must be a tensor"),
}


@pytest.mark.parametrize("what", LABELS)
def test_labels_that_do_not_fit_are_refused(what):
    labels, words = LABELS[what]
    with pytest.raises(BatchError, match=words):
        ls.evaluate_quality(build_model(), [{"input_ids": IDS, "labels": labels}])


def test_mask_of_another_shape_is_refused():
    with pytest.raises(LayershedError, match="attention_mask"):
        ls.evaluate_quality(build_model(), [{"input_ids": IDS, "attention_mask": MASK[:, :-1]}])


def test_generator_that_was_used_up_says_so():
    batches = (batch for batch in [IDS])
    model = build_model()
    ls.estimate_importance(model, batches)
    with pytest.raises(CalibrationError, match="A generator can be read only once"):
        ls.estimate_importance(model, batches)
    with pytest.raises(MeasurementError, match="a generator can be read only once"):
        ls.evaluate_quality(model, batches)
