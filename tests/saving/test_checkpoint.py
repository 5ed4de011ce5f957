"""A drop inside a run, against optimizers and models that never saw one."""

import copy
import io
import json
import math

import pytest
import torch
from lightning import LightningModule
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from layershed.discovery.find import find_sublayers
from layershed.errors import AmbiguousModelError, CheckpointError, LayershedError
from layershed.recovery.optimizer_groups import forget_parameters
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


def split(model):
    """Parameters that go and parameters that stay."""
    named = dict(model.named_parameters())
    return (
        [p for name, p in named.items() if name.startswith(GONE)],
        [p for name, p in named.items() if not name.startswith(GONE)],
    )


def fill_gradients(model, seed):
    """A gradient for every parameter, so that only the optimizer decides what moves."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def two_groups(model, **settings):
    """Norms in one group, everything else in another, as weight decay wants it."""
    norms = [p for p in model.parameters() if p.ndim == 1]
    others = [p for p in model.parameters() if p.ndim > 1]
    return AdamW([{"params": others, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}], lr=0.01, **settings)


def stepped(model, make=two_groups):
    optimizer = make(model)
    fill_gradients(model, 0)
    optimizer.step()
    return optimizer


def identities(parameters):
    return [id(parameter) for parameter in parameters]


def test_group_objects_and_their_lists_stay_the_very_same(llama):
    optimizer = stepped(llama)
    groups, lists = list(optimizer.param_groups), [group["params"] for group in optimizer.param_groups]
    owner = optimizer.param_groups
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    bypass(llama, some(llama))
    forget_parameters([optimizer], llama)
    assert optimizer.param_groups is owner
    assert all(now is before for now, before in zip(optimizer.param_groups, groups, strict=True))
    assert all(group["params"] is before for group, before in zip(groups, lists, strict=True))
    assert [{key: value for key, value in group.items() if key != "params"} for group in groups] == settings


def test_only_what_is_bypassed_is_forgotten_and_the_rest_keeps_its_order_and_state(llama):
    optimizer = stepped(llama)
    gone, kept = split(llama)
    state = {id(p): copy.deepcopy(optimizer.state[p]) for p in kept}
    bypass(llama, some(llama))
    forget_parameters([optimizer], llama)
    others, norms = (group["params"] for group in optimizer.param_groups)
    assert identities(others) == identities(p for p in kept if p.ndim > 1)
    assert identities(norms) == identities(p for p in kept if p.ndim == 1)
    assert set(identities(optimizer.state)) == set(identities(kept))
    assert gone
    for parameter in kept:
        for key, value in state[id(parameter)].items():
            assert torch.equal(optimizer.state[parameter][key], value)


def test_twice_is_the_same_as_once(llama):
    optimizer = stepped(llama)
    bypass(llama, some(llama))
    forget_parameters([optimizer], llama)
    groups = [identities(group["params"]) for group in optimizer.param_groups]
    state = copy.deepcopy(optimizer.state_dict())
    forget_parameters([optimizer], llama)
    assert [identities(group["params"]) for group in optimizer.param_groups] == groups
    again = optimizer.state_dict()
    assert again["param_groups"] == state["param_groups"]
    assert list(again["state"]) == list(state["state"])


def test_nothing_bypassed_forgets_nothing(llama):
    optimizer = stepped(llama)
    forget_parameters([optimizer], llama)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(llama.parameters()))
    assert len(optimizer.state) == len(list(llama.parameters()))


def test_the_next_steps_move_what_is_kept_as_ever_and_nothing_else(llama):
    untouched = copy.deepcopy(llama)
    optimizer, reference = stepped(llama), stepped(untouched)
    bypass(llama, some(llama))
    forget_parameters([optimizer], llama)
    gone, _ = split(llama)
    frozen = [parameter.detach().clone() for parameter in gone]
    for seed in (1, 2):
        fill_gradients(llama, seed)
        fill_gradients(untouched, seed)
        optimizer.step()
        reference.step()
    assert all(torch.equal(now, before) for now, before in zip(gone, frozen, strict=True))
    moved = dict(untouched.named_parameters())
    for name, parameter in llama.named_parameters():
        assert torch.equal(parameter, moved[name]) == (not name.startswith(GONE)), name


def test_the_learning_rate_goes_on_as_if_nothing_had_happened(llama):
    optimizer = stepped(llama)
    schedule = CosineAnnealingLR(optimizer, T_max=10)
    rates = []
    for step in range(10):
        rates.append([group["lr"] for group in optimizer.param_groups])
        if step == 4:
            bypass(llama, some(llama))
            forget_parameters([optimizer], llama)
        optimizer.step()
        schedule.step()
    expected = [0.01 * (1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)]
    for step, pair in enumerate(rates):
        assert pair == pytest.approx([expected[step]] * 2)


def test_every_optimizer_forgets(llama):
    halves = [[p for p in llama.parameters() if (p.ndim == 1) == norm] for norm in (True, False)]
    optimizers = [SGD(halves[0], lr=0.1, momentum=0.9), AdamW(halves[1])]
    fill_gradients(llama, 0)
    for optimizer in optimizers:
        optimizer.step()
    gone, kept = split(llama)
    bypass(llama, some(llama))
    forget_parameters(iter(optimizers), llama)
    for optimizer, norm in zip(optimizers, (True, False), strict=True):
        expected = identities(p for p in kept if (p.ndim == 1) == norm)
        assert identities(optimizer.param_groups[0]["params"]) == expected
        assert set(identities(optimizer.state)) == set(expected)
    assert {p.ndim for p in gone} == {1, 2}


def test_a_group_may_become_empty(llama):
    gone, kept = split(llama)
    optimizer = AdamW([{"params": gone}, {"params": kept}])
    bypass(llama, some(llama))
    forget_parameters([optimizer], llama)
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, len(kept)]
    fill_gradients(llama, 0)
    optimizer.step()


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


def test_what_is_bypassed_is_noted_as_plain_json(checkpoint):
    content = checkpoint[CHECKPOINT_KEY]
    assert json.loads(json.dumps(content)) == content
    assert [(drop["block"], drop["kind"], drop["path"]) for drop in content["dropped"]["drops"]] == [
        (0, "attention", "model.layers.0.self_attn"),
        (2, "mlp", "model.layers.2.mlp"),
    ]


def test_a_checkpoint_brings_back_the_bypass(checkpoint, tokens):
    dropped = build_model()
    bypass(dropped, some(dropped))
    run = Run(net=build_model())
    apply_structure(checkpoint, run)
    run.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(logits(run.net, tokens), logits(dropped, tokens))


@pytest.mark.parametrize("earlier", [[], ["attention.0"], ["attention.3"], ["attention.0", "mlp.2", "mlp.3"]], ids=str)
def test_exactly_what_is_noted_is_bypassed_whatever_was_before(checkpoint, earlier, tokens):
    model, reference = build_model(), build_model()
    before = [s for s in find_sublayers(model) if s.name in earlier]
    if before:
        bypass(model, before)
    apply_structure(checkpoint, Run(net=model))
    bypass(reference, some(reference))
    assert [s.name for s in bypassed_sublayers(model)] == ["attention.0", "mlp.2"]
    assert torch.equal(logits(model, tokens), logits(reference, tokens))
    assert all(p.requires_grad == (not name.startswith(GONE)) for name, p in model.named_parameters())


def test_a_checkpoint_that_notes_nothing_restores_everything(llama, tokens):
    checkpoint, dense = noted(Run(net=llama)), logits(llama, tokens)
    assert CHECKPOINT_KEY not in checkpoint
    bypass(llama, some(llama))
    apply_structure(checkpoint, Run(net=llama))
    assert bypassed_sublayers(llama) == ()
    assert torch.equal(logits(llama, tokens), dense)
    assert all(parameter.requires_grad for parameter in llama.parameters())


def test_applying_twice_is_the_same_as_once(checkpoint):
    run = Run(net=build_model())
    apply_structure(checkpoint, run)
    forwards = {path: id(m.__dict__.get("forward")) for path, m in run.named_modules() if "forward" in m.__dict__}
    apply_structure(checkpoint, run)
    assert forwards
    assert {p: id(m.__dict__.get("forward")) for p, m in run.named_modules() if "forward" in m.__dict__} == forwards


def test_one_of_two_transformers_is_meant_by_its_name(checkpoint):
    run = Run(student=build_model(), teacher=build_model())
    with pytest.raises(AmbiguousModelError):
        apply_structure(checkpoint, run)
    apply_structure(checkpoint, run, name="student")
    assert len(bypassed_sublayers(run.student)) == 2
    assert bypassed_sublayers(run.teacher) == ()


@pytest.mark.parametrize(
    "other", [{"model_type": "gpt2"}, {"num_hidden_layers": 2}], ids=["another family", "fewer blocks"]
)
def test_a_checkpoint_of_another_model_is_refused(checkpoint, other):
    model = build_model(**other)
    with pytest.raises(CheckpointError, match=r"(attention\.0|mlp\.2).*another model"):
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
def test_a_malformed_note_is_refused_and_changes_nothing(llama, content):
    bypass(llama, some(llama))
    with pytest.raises(LayershedError):
        apply_structure({CHECKPOINT_KEY: content}, Run(net=llama))
    assert bypassed_sublayers(llama) == tuple(some(llama))
