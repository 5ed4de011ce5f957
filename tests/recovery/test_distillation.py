"""The loss against a plain formula with two separate models: a copy from before the drop, and the dropped one."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForMaskedLM, BertModel

import layershed as ls
from layershed.errors import (
    PlanError,
    RecoveryError,
    UnknownNameError,
)
from layershed.recovery.distillation import Distillation, check_teacher, self_distillation, self_distillation_loss
from layershed.recovery.lora import adapted_modules, inject_lora
from tests.support.lora import ARCHITECTURES, learn, pick
from tests.support.models import build_model
from tests.support.thinned import crossed

GONE = ((1, "attention"), (2, "mlp"))


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture
def batch(tokens):
    """Labels with holes, and the second row padded on the right."""
    labels, mask = tokens.clone(), torch.ones_like(tokens)
    labels[0, [1, 5]] = -100
    mask[1, 8:] = 0
    return {"input_ids": tokens, "labels": labels, "attention_mask": mask}


def pair(architecture="llama", **overrides):
    """Teacher and student."""
    teacher = build_model(architecture, **overrides)
    student = copy.deepcopy(teacher)
    ls.bypass(student, pick(student, *GONE))
    return teacher, student


def plain(teacher, student, batch, weight=0.5, temperature=1.0, kind="kl"):
    """The formula, place by place."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    with torch.no_grad():
        p = teacher(**inputs, use_cache=False, output_hidden_states=True)
    q = student(**inputs, use_cache=False, output_hidden_states=True)
    ids = batch["input_ids"]
    labels, mask = batch.get("labels", ids), batch.get("attention_mask", torch.ones_like(ids))
    places = [
        (row, place)
        for row in range(ids.shape[0])
        for place in range(ids.shape[1] - 1)
        if labels[row, place + 1] != -100 and mask[row, place + 1] == 1
    ]
    lm = torch.stack([cross_entropy(q.logits[r, i], labels[r, i + 1]) for r, i in places]).mean()
    divergence = torch.zeros(())
    if kind in ("kl", "both"):
        kl = []
        for r, i in places:
            own = torch.softmax(p.logits[r, i] / temperature, -1)
            other = torch.softmax(q.logits[r, i] / temperature, -1)
            kl.append((own * (own.log() - other.log())).sum() * temperature**2)
        divergence = divergence + torch.stack(kl).mean()
    if kind in ("hidden", "both"):
        blocks = []
        for own, other in zip(p.hidden_states[1:], q.hidden_states[1:], strict=True):
            error = sum((other[r, i] - own[r, i]).square().sum() for r, i in places)
            blocks.append(error / sum(own[r, i].square().sum() for r, i in places))
        assert len(blocks) == 4
        divergence = divergence + torch.stack(blocks).mean()
    return (1 - weight) * lm + weight * divergence, lm, divergence


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def snapshot(model):
    return (
        [module.training for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
        ls.bypassed_sublayers(model),
        [layer.disable_adapters for layer in adapted_modules(model).values()],
        [module.p for module in model.modules() if isinstance(module, nn.Dropout)],
    )


@pytest.mark.parametrize(("kind", "temperature", "weight"), crossed(["both", "kl", "hidden"], [2.0, 1.0], [0.3, 1.0]))
def test_distillation_loss_and_gradients_follow_the_formula(kind, temperature, weight, batch):
    teacher, student = pair()
    reference = copy.deepcopy(student)
    settings = {"weight": weight, "temperature": temperature, "kind": kind}
    expected, *_ = plain(teacher, reference, batch, **settings)
    loss = self_distillation_loss(student, batch, **settings)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    expected.backward()
    loss.backward()
    found, wanted = gradients(student), gradients(reference)
    assert any(gradient.any() for gradient in wanted.values())
    assert {name for name, g in found.items() if g.any()} == {name for name, g in wanted.items() if g.any()}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "left_out"),
    crossed(ARCHITECTURES, [(), ("labels",), ("attention_mask",), ("labels", "attention_mask")]),
)
def test_distillation_uses_labels_and_mask_if_given(architecture, left_out, batch):
    teacher, student = pair(architecture)
    given = {name: value for name, value in batch.items() if name not in left_out}
    found = self_distillation(student, given, Distillation(0.3, 2.0, "both"))
    expected = plain(teacher, student, given, 0.3, 2.0, "both")
    for own, other in zip(found[:3], expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
    assert found.loss.requires_grad
    assert not found.lm.requires_grad
    assert not found.divergence.requires_grad
    assert found.teacher_seconds > 0


def test_distillation_ignores_the_content_of_padding(batch):
    _, student = pair()
    padded = batch["attention_mask"] == 0
    other = {**batch, **{name: batch[name].masked_fill(padded, 50) for name in ("input_ids", "labels")}}
    assert not torch.equal(other["input_ids"], batch["input_ids"])
    for kind in ("kl", "hidden"):
        losses = [self_distillation_loss(student, each, kind=kind) for each in (batch, other)]
        torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)


def test_distillation_takes_plain_token_ids(architecture, tokens):
    teacher, student = pair(architecture)
    before = tokens.clone()
    expected, *_ = plain(teacher, student, {"input_ids": tokens})
    torch.testing.assert_close(self_distillation_loss(student, tokens), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(tokens, before)


def test_distillation_does_not_change_the_batch(batch):
    _, student = pair()
    before = copy.deepcopy(batch)
    self_distillation_loss(student, batch)
    assert batch.keys() == before.keys()
    assert all(torch.equal(batch[name], before[name]) for name in before)


@pytest.mark.default_cases(2)
@pytest.mark.parametrize(("architecture", "kind"), crossed(ARCHITECTURES, ["both", "kl"]))
def test_teacher_is_the_original_model_while_lora_is_trained(architecture, kind, batch):
    teacher, student = pair(architecture)
    inject_lora(student)
    learn(student)
    reference = copy.deepcopy(student)
    expected, _, divergence = plain(teacher, reference, batch, 0.3, 1.0, kind)
    found = self_distillation(student, batch, Distillation(0.3, 1.0, kind))
    assert divergence > 0.01
    torch.testing.assert_close(found.divergence, divergence.detach(), rtol=1e-4, atol=1e-5)
    expected.backward()
    found.loss.backward()
    wanted = gradients(reference)
    assert gradients(student).keys() == wanted.keys()
    assert all("lora_" in name for name in wanted)
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5)


def test_lora_without_a_drop_has_the_original_model_as_teacher(llama, batch):
    teacher = copy.deepcopy(llama)
    inject_lora(llama)
    learn(llama)
    expected, *_ = plain(teacher, llama, batch, 0.5, 1.0, "kl")
    torch.testing.assert_close(self_distillation_loss(llama, batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("architecture", "kind"), crossed(ARCHITECTURES, ["both", "kl", "hidden"]))
def test_distillation_without_drop_or_lora_is_the_plain_loss(architecture, kind, batch):
    model = build_model(architecture)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    found = self_distillation(model, batch, Distillation(0.7, 2.0, kind))
    assert len(calls) == 1
    labels = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    expected = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(found.loss, expected, rtol=1e-6, atol=1e-6)
    assert found.divergence == 0
    assert found.loss.requires_grad


@pytest.mark.default_cases(2)
@pytest.mark.parametrize(("architecture", "adapted"), crossed(ARCHITECTURES, [True, False]))
def test_distillation_leaves_the_model_as_it_was(architecture, adapted, batch):
    _, model = pair(architecture)
    if adapted:
        inject_lora(model, dropout=0.1)
    model.train()
    model.get_submodule(ls.find_sublayers(model)[0].path).eval()
    before = snapshot(model)
    self_distillation_loss(model, batch, kind="both")
    assert snapshot(model) == before


@pytest.mark.parametrize("failing", [1, 2])
def test_distillation_leaves_the_model_as_it_was_after_an_error(failing, batch):
    _, model = pair("gpt2")
    inject_lora(model, dropout=0.1)
    model.train()
    before, calls = snapshot(model), []

    def fail(*_):
        calls.append(1)
        if len(calls) == failing:
            raise KeyError("on purpose")

    model.lm_head.register_forward_hook(fail)
    with pytest.raises(KeyError, match="on purpose"):
        self_distillation_loss(model, batch)
    assert len(calls) == failing
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("architecture", "dropout"),
    [
        ("gpt2", {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5}),
        ("opt", {"dropout": 0.5}),
        ("llama", {"attention_dropout": 0.5}),
    ],
)
def test_only_the_student_has_dropout(architecture, dropout, tokens):
    teacher, student = pair(architecture, **dropout)
    student.train()
    with torch.no_grad():
        expected = teacher(input_ids=tokens, use_cache=False).logits
    seen = []
    student.lm_head.register_forward_hook(lambda _module, _args, output: seen.append(output.detach()))
    for seed in (0, 1):
        torch.manual_seed(seed)
        self_distillation_loss(student, tokens)
    assert torch.equal(seen[0], expected)
    assert torch.equal(seen[2], expected)
    assert not torch.allclose(seen[1], seen[3], atol=1e-2)


def test_teacher_draws_no_random_numbers(tokens):
    _, student = pair("gpt2", resid_pdrop=0.5)
    student.train()
    torch.manual_seed(0)
    found = self_distillation(student, tokens, Distillation())
    torch.manual_seed(0)
    alone = student(input_ids=tokens, labels=tokens, use_cache=False).loss
    assert torch.equal(found.lm, alone)


@pytest.mark.parametrize(("architecture", "kind"), crossed(ARCHITECTURES, ["both", "kl"]))
def test_distillation_sends_no_gradient_to_bypassed_sublayers(architecture, kind, batch):
    _, student = pair(architecture)
    frozen = {name for name, p in student.named_parameters() if not p.requires_grad}
    assert any("layers.1." in name or "h.1." in name for name in frozen)
    self_distillation_loss(student, batch, weight=1.0, kind=kind).backward()
    reached = gradients(student)
    assert not reached.keys() & frozen
    assert reached.keys() == {name for name, _ in student.named_parameters()} - frozen


def test_student_that_follows_its_gradient_approaches_the_teacher(batch):
    teacher, student = pair()
    inject_lora(student)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2)
    before = plain(teacher, student, batch, 1.0)[0].item()
    for _ in range(5):
        optimizer.zero_grad()
        self_distillation_loss(student, batch, weight=1.0).backward()
        optimizer.step()
    assert plain(teacher, student, batch, 1.0)[0].item() < 0.9 * before


def test_distillation_finds_the_transformer_by_its_name(batch):
    teacher, student = pair()
    outer = nn.ModuleDict({"net": student, "other": build_model("gpt2")})
    expected, *_ = plain(teacher, student, batch)
    found = self_distillation_loss(outer, batch, name="net")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_quantized_model_is_its_own_teacher(batch):
    teacher = build_model("llama")
    ls.quantize(teacher)
    student = build_model("llama")
    ls.bypass(student, pick(student, *GONE))
    ls.quantize(student)
    inject_lora(student)
    learn(student)
    expected, *_ = plain(teacher, student, batch, 0.3, 2.0, "both")
    found = self_distillation_loss(student, batch, weight=0.3, temperature=2.0, kind="both")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_distillation_of_a_bfloat16_model_compares_in_float32(tokens):
    teacher, student = (model.bfloat16() for model in pair())
    with torch.no_grad():
        outputs = (model(input_ids=tokens, use_cache=False).logits for model in (teacher, student))
        p, q = (output[:, :-1].float().softmax(-1) for output in outputs)
    found = self_distillation(student, tokens, Distillation(1.0))
    torch.testing.assert_close(found.divergence, (p * (p / q).log()).sum(-1).mean(), rtol=1e-4, atol=1e-5)


NEEDS_A_TEACHER = pytest.mark.parametrize(
    "check",
    [check_teacher, lambda model: self_distillation_loss(model, torch.ones(1, 4).long())],
    ids=["check_teacher", "self_distillation_loss"],
)


@NEEDS_A_TEACHER
def test_model_with_removed_sublayers_has_no_teacher(llama, check):
    ls.remove(llama, pick(llama, *GONE))
    with pytest.raises(PlanError, match=r"attention\.1, mlp\.2 were removed and have no weights"):
        check(llama)


@pytest.mark.parametrize("model_class", [BertModel, BertForMaskedLM])
@NEEDS_A_TEACHER
def test_distillation_refuses_a_model_without_next_token_prediction(model_class, check):
    config = BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    model = model_class(config)
    ls.bypass(model, ls.find_sublayers(model)[:1])
    with pytest.raises(RecoveryError, match=f"{model_class.__name__} does not predict the next token"):
        check(model)


def test_bypassed_model_passes_the_check_of_its_teacher(architecture):
    _, student = pair(architecture)
    before = snapshot(student)
    assert check_teacher(student) is None
    assert snapshot(student) == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight": 0}, RecoveryError, r"weight=0 must be in \(0, 1\]; leave it out for none"),
        ({"weight": 1.5}, RecoveryError, "weight=1.5"),
        ({"weight": float("nan")}, RecoveryError, "weight=nan"),
        ({"temperature": 0}, RecoveryError, "temperature=0 must be above 0"),
        ({"temperature": -1.0}, RecoveryError, "temperature=-1.0"),
        ({"temperature": float("nan")}, RecoveryError, "temperature=nan"),
        ({"kind": "hiden"}, UnknownNameError, "kind of distillation 'hiden'. Did you mean 'hidden'"),
    ],
)
def test_invalid_distillation_settings_are_refused(options, error, message, llama, tokens):
    with pytest.raises(error, match=message):
        Distillation(**options)
    with pytest.raises(error, match=message):
        self_distillation_loss(llama, tokens, **options)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"pixels": torch.ones(1)}, "a mapping with the keys pixels"),
        (torch.ones(2, 3), r"a tensor of shape \(2, 3\) and type torch.float32"),
        (["a text"], "a list"),
    ],
    ids=["other mapping", "floats", "list"],
)
def test_distillation_refuses_a_batch_without_token_ids(batch, message, llama):
    with pytest.raises(RecoveryError, match=message):
        self_distillation_loss(llama, batch)


def test_token_types_reach_the_model_in_distillation(tokens):
    model = build_model("gpt2")
    batch = {"input_ids": tokens, "labels": tokens, "token_type_ids": tokens % 2}
    with torch.no_grad():
        found, wanted = self_distillation_loss(model, batch), model(**batch).loss
        assert not torch.allclose(wanted, model(input_ids=tokens, labels=tokens).loss)
    torch.testing.assert_close(found, wanted)
