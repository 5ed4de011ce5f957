"""Discovery does not depend on an autocast, neither around the model's forward nor around the caller."""

from contextlib import nullcontext

import pytest
import torch

from layershed.discovery.find import find_left_alone, find_sublayers
from tests.support.models import build_model
from tests.support.thinned import crossed


def around_model(model):
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)


def around_body(model):
    model.base_model.forward = torch.autocast("cpu", torch.bfloat16)(model.base_model.forward)


def around_mlp(model):
    for module in model.modules():
        if type(module).__name__.endswith("MLP"):
            module.forward = torch.autocast("cpu", torch.bfloat16)(module.forward)


def nowhere(model):
    """Leaves the model as it is."""


@pytest.mark.parametrize(
    ("model_type", "place", "outside"),
    crossed(("llama", "gpt2"), (around_model, around_body, around_mlp, nowhere), (True, False)),
)
def test_same_sublayers_are_found_under_any_autocast(model_type, place, outside):
    expected = find_sublayers(build_model(model_type))
    model = build_model(model_type)
    place(model)
    with torch.autocast("cpu", torch.bfloat16) if outside else nullcontext():
        assert find_sublayers(model) == expected
        assert find_left_alone(model) == ()


def test_autocast_works_again_after_a_probe():
    before = torch.autocast.__enter__
    model = build_model("llama")
    around_model(model)
    find_sublayers(model)
    assert torch.autocast.__enter__ is before
    assert model(input_ids=torch.arange(3, 9)[None]).logits.dtype is torch.bfloat16
