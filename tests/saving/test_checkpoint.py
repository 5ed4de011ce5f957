"""The structure in a Lightning checkpoint, against models that were bypassed by hand."""

import io
import json

import pytest
import torch
from lightning import LightningModule

from layershed.discovery.find import find_sublayers
from layershed.errors import AmbiguousModelError, CheckpointError, LayershedError
from layershed.saving.checkpoint import CHECKPOINT_KEY, apply_structure, write_structure
from layershed.surgery import bypass, bypassed_sublayers
from tests.support.models import build_model

# what attention.0 and mlp.2 of a llama hold
GONE = (
    "model.layers.0.self_attn.",
    "model.layers.0.input_layernorm.",
    "model.layers.2.mlp.",
    "model.layers.2.post_attention_layernorm.",
)


def some(model):
    return [s for s in find_sublayers(model) if s.name in {"attention.0", "mlp.2"}]


class Run(LightningModule):
    def __init__(self, **models):
        super().__init__()
        for name, model in models.items():
            self.add_module(name, model)


def through_a_file(checkpoint):
    """What comes back from disk when no pickle may run."""
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def noted(model):
    checkpoint = {"state_dict": model.state_dict()}
    write_structure(checkpoint, model)
    return through_a_file(checkpoint)


@pytest.fixture
def checkpoint():
    model = build_model()
    bypass(model, some(model))
    return noted(Run(net=model))


def test_structure_in_a_checkpoint_is_plain_json(checkpoint):
    content = checkpoint[CHECKPOINT_KEY]
    assert json.loads(json.dumps(content)) == content
    assert [(drop["block"], drop["kind"], drop["path"]) for drop in content["dropped"]["drops"]] == [
        (0, "attention", "model.layers.0.self_attn"),
        (2, "mlp", "model.layers.2.mlp"),
    ]


def test_checkpoint_structure_restores_the_bypass(checkpoint, tokens):
    dropped = build_model()
    bypass(dropped, some(dropped))
    run = Run(net=build_model())
    apply_structure(checkpoint, run)
    run.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(logits(run.net, tokens), logits(dropped, tokens))


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("earlier", [[], ["attention.0"], ["attention.3"], ["attention.0", "mlp.2", "mlp.3"]], ids=str)
def test_checkpoint_structure_replaces_an_earlier_bypass(checkpoint, earlier, tokens):
    model, reference = build_model(), build_model()
    before = [s for s in find_sublayers(model) if s.name in earlier]
    if before:
        bypass(model, before)
    apply_structure(checkpoint, Run(net=model))
    bypass(reference, some(reference))
    assert [s.name for s in bypassed_sublayers(model)] == ["attention.0", "mlp.2"]
    assert torch.equal(logits(model, tokens), logits(reference, tokens))
    assert all(p.requires_grad == (not name.startswith(GONE)) for name, p in model.named_parameters())


def test_checkpoint_without_structure_restores_all_sublayers(llama, tokens):
    checkpoint, dense = noted(Run(net=llama)), logits(llama, tokens)
    assert CHECKPOINT_KEY not in checkpoint
    bypass(llama, some(llama))
    apply_structure(checkpoint, Run(net=llama))
    assert bypassed_sublayers(llama) == ()
    assert torch.equal(logits(llama, tokens), dense)
    assert all(parameter.requires_grad for parameter in llama.parameters())


def test_applying_a_structure_twice_equals_once(checkpoint):
    run = Run(net=build_model())
    apply_structure(checkpoint, run)
    forwards = {path: id(m.__dict__.get("forward")) for path, m in run.named_modules() if "forward" in m.__dict__}
    apply_structure(checkpoint, run)
    assert forwards
    assert {p: id(m.__dict__.get("forward")) for p, m in run.named_modules() if "forward" in m.__dict__} == forwards


def test_structure_goes_to_the_transformer_of_the_given_name(checkpoint):
    run = Run(student=build_model(), teacher=build_model())
    with pytest.raises(AmbiguousModelError):
        apply_structure(checkpoint, run)
    apply_structure(checkpoint, run, name="student")
    assert len(bypassed_sublayers(run.student)) == 2
    assert bypassed_sublayers(run.teacher) == ()


@pytest.mark.parametrize(
    "other", [{"model_type": "gpt2"}, {"num_hidden_layers": 2}], ids=["another family", "fewer blocks"]
)
def test_structure_of_another_model_is_refused(checkpoint, other):
    model = build_model(**other)
    with pytest.raises(CheckpointError, match=r"made for LlamaForCausalLM with 4 blocks.* but this model is"):
        apply_structure(checkpoint, Run(net=model))
    assert bypassed_sublayers(model) == ()


@pytest.mark.parametrize(
    "content",
    [
        {"format": "layershed.drop_plan.v1", "drops": []},
        "attention.0",
        {"dropped": {"format": "layershed.drop_plan.v0", "drops": []}, "quantized": None, "adapters": None},
        {"dropped": {"format": "layershed.drop_plan.v1", "scope": "joint", "drops": [{"block": "0"}]}}
        | {"quantized": None, "adapters": None},
        {"dropped": None, "quantized": {"mode": "nf3"}, "adapters": None},
        {"dropped": None, "quantized": None, "adapters": {"targets": 3}},
    ],
    ids=["another version", "no mapping", "another plan", "broken drop", "broken quantization", "broken adapters"],
)
def test_malformed_structure_is_refused_and_changes_nothing(llama, content):
    bypass(llama, some(llama))
    with pytest.raises(LayershedError):
        apply_structure({CHECKPOINT_KEY: content}, Run(net=llama))
    assert bypassed_sublayers(llama) == tuple(some(llama))
