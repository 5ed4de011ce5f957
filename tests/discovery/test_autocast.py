"""Discovery does not depend on an autocast, neither around the model's forward nor around the caller."""

import copy
from contextlib import nullcontext

import pytest
import torch

from layershed.discovery.find import find_left_alone, find_sublayers
from layershed.surgery import bypass
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


def half_of_all(model):
    for number, parameter in enumerate(model.parameters()):
        parameter.data = parameter.data.bfloat16() if number % 2 else parameter.data


def blocks(model):
    model.base_model.layers.bfloat16()


def all_but_embeddings(model):
    model.bfloat16().get_input_embeddings().float()


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "autocast around the model"])
@pytest.mark.parametrize(
    ("model_type", "lower"), crossed(["llama", "mixtral"], [half_of_all, blocks, all_but_embeddings])
)
def test_model_of_mixed_dtypes_that_only_runs_under_autocast_is_proven_and_dropped(model_type, lower, wrapped):
    model, tokens = build_model(model_type), torch.arange(3, 11)[None]
    expected = find_sublayers(model)
    lower(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="dtype"):
        model(tokens)
    if wrapped:
        around_model(model)
    assert find_sublayers(model) == expected
    assert find_sublayers(model) == expected  # from the known proof
    zeroed = copy.deepcopy(model) if not wrapped else None
    bypass(model, expected[1:4])
    after = {name: tensor for name, tensor in model.state_dict().items() if name in before}
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )
    if zeroed is not None:
        for sublayer in expected[1:4]:
            for parameter in zeroed.get_submodule(sublayer.path).parameters():
                parameter.data.zero_()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(tokens).logits, zeroed(tokens).logits)
