"""LoRA after a drop, against weights that are altered by hand and against the model without any adapter."""

import copy
import re

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import layershed as ls
from layershed.discovery import registry as adapter
from layershed.errors import RecoveryError, UnknownNameError
from layershed.recovery.lora import adapted_modules, adapters_off, inject_lora, lora_settings, merge_lora, remove_lora
from tests.support.hand_written import GPT
from tests.support.lora import ARCHITECTURES, MAPS, WHERE, dropped, learn, logits, maps, pick, values
from tests.support.models import build_model
from tests.support.runs import (
    same,
)
from tests.support.thinned import crossed, one_of
from tests.support.trainable import backward, frozen_with_gradient, trainable


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.mark.default_cases(2)
def test_injection_keeps_the_logits_and_adapts_all_linear_maps_that_run(architecture, tokens):
    model = dropped(architecture, (1, "attention"), (2, "mlp"))
    before, found = logits(model, tokens), ls.find_sublayers(model)
    config = inject_lora(model)
    assert torch.equal(logits(model, tokens), before)
    expected = maps(architecture, attention=(0, 2, 3), mlp=(0, 1, 3))
    assert set(adapted_modules(model)) == config.target_modules == expected
    assert ls.find_sublayers(model) == found


def test_all_linear_targets_every_linear_map_but_the_head(architecture):
    plain = build_model(architecture)
    paths = {path for path, module in plain.named_modules() if isinstance(module, nn.Linear | Conv1D)} - {"lm_head"}
    inject_lora(plain)
    assert set(adapted_modules(plain)) == paths == maps(architecture, attention=range(4), mlp=range(4))


def test_only_adapters_outside_dropped_sublayers_are_trainable(architecture):
    model = dropped(architecture, (1, "attention"), (2, "mlp"))
    inject_lora(model)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        f"{path}.{part}.recovery.weight"
        for path in maps(architecture, attention=(0, 2, 3), mlp=(0, 1, 3))
        for part in ("lora_A", "lora_B")
    }
    ls.restore(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable


def test_head_is_adapted_if_named_as_target(llama, tokens):
    before = logits(llama, tokens)
    inject_lora(llama, target_modules=["lm_head"])
    assert set(adapted_modules(llama)) == {"lm_head"}
    assert torch.equal(logits(llama, tokens), before)
    learn(llama)
    expected = logits(llama, tokens)
    merge_lora(llama)
    torch.testing.assert_close(logits(llama, tokens), expected, rtol=1e-4, atol=1e-4)


def test_head_and_transposed_maps_can_be_adapted_together(tokens):
    model = build_model("gpt2", tie_word_embeddings=False)
    inject_lora(model, target_modules=["c_attn", "lm_head"])
    expected = logits(learn(model), tokens)
    merge_lora(model)
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)


def test_tied_head_is_refused_as_lora_target():
    """Merging would change the embedding as well, and with it the model."""
    model = build_model("gpt2")
    with pytest.raises(RecoveryError, match="tied"):
        inject_lora(model, target_modules=["lm_head"])
    assert adapted_modules(model) == {}


@pytest.mark.parametrize("ends", [["q_proj"], ["self_attn.q_proj", "down_proj"]])
def test_lora_targets_are_chosen_by_the_ends_of_their_paths(ends):
    model = dropped("llama", (1, "attention"))
    inject_lora(model, target_modules=ends)
    running = maps("llama", attention=(0, 2, 3), mlp=range(4))
    assert set(adapted_modules(model)) == {path for path in running if path.split(".")[-1] in ("q_proj", *ends)}


@pytest.mark.parametrize(
    ("gone", "attention", "mlp"),
    [
        ([(1, "attention"), (2, "attention")], (), (0, 1, 2)),
        ([(0, "attention")], (), (0,)),
        ([(3, "mlp")], (3,), ()),
        ([(1, "attention"), (1, "mlp"), (2, "attention")], (), (0, 2)),
    ],
)
@pytest.mark.parametrize("architecture", one_of(["llama", "opt", "gpt2"]))
def test_neighbours_placement_adapts_the_nearest_sublayers_that_run(architecture, gone, attention, mlp):
    model = dropped(architecture, *gone)
    inject_lora(model, placement="neighbours")
    assert set(adapted_modules(model)) == maps(architecture, attention, mlp)


def test_neighbours_placement_is_the_same_after_remove():
    model = build_model("llama")
    ls.remove(model, pick(model, (1, "attention"), (2, "attention")))
    inject_lora(model, placement="neighbours")
    assert set(adapted_modules(model)) == maps("llama", (), (0, 1, 2))


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_second_injection_adds_missing_adapters_and_keeps_the_others(architecture, tokens):
    model = dropped(architecture, (1, "attention"))
    inject_lora(model, placement="neighbours")
    first = values(learn(model))
    ls.bypass(model, pick(model, (3, "attention")))
    before = logits(model, tokens)
    config = inject_lora(model, placement="neighbours")
    expected = maps(architecture, (), (0, 1, 2, 3))
    assert set(adapted_modules(model)) == config.target_modules == expected
    second = values(model)
    assert len(second) == 2 * len(expected) > len(first)
    assert all(torch.equal(second[name], value) for name, value in first.items())
    assert torch.equal(logits(model, tokens), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(second)


def test_second_injection_keeps_adapters_of_sublayers_dropped_meanwhile():
    model = build_model("llama")
    inject_lora(model)
    first = values(learn(model))
    ls.bypass(model, pick(model, (1, "attention")))
    inject_lora(model)
    second = values(model)
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name], value) for name, value in first.items())


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_adapters_of_dropped_sublayers_train_only_after_restore(architecture):
    model = build_model(architecture)
    first = MAPS[architecture][0][0]
    inject_lora(model, target_modules=[first])
    ls.bypass(model, pick(model, (1, "attention")))
    inject_lora(model)
    trainable = {name.partition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == maps(architecture, (0, 2, 3), range(4))
    ls.restore(model)
    trainable = {name.partition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    own = WHERE[architecture][0].format(1) + first
    assert trainable == {*maps(architecture, (0, 2, 3), range(4)), own}


def test_injection_depends_on_its_seed_and_keeps_the_global_random_state(architecture):
    drawn = []
    for seed, noise in ((3, 0), (3, 99), (4, 0)):
        model = build_model(architecture)
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        inject_lora(model, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(values(model))
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert not any(torch.equal(drawn[0][name], drawn[2][name]) for name in drawn[0] if "lora_A" in name)
    assert not any(value.any() for name, value in drawn[0].items() if "lora_B" in name)


@pytest.mark.default_cases(2)
@pytest.mark.parametrize(("architecture", "rslora"), crossed(ARCHITECTURES, [True, False]))
def test_lora_equals_a_low_rank_change_of_the_weights(architecture, rslora, tokens):
    scale = 6 / 4**0.5 if rslora else 6 / 4
    model, by_hand = (dropped(architecture, (1, "attention")) for _ in range(2))
    inject_lora(model, rank=4, alpha=6, rslora=rslora)
    learned = values(learn(model))
    with torch.no_grad():
        for path in maps(architecture, attention=(0, 2, 3), mlp=range(4)):
            weight = by_hand.get_submodule(path).weight
            a, b = (learned[f"{path}.{part}.recovery.weight"] for part in ("lora_A", "lora_B"))
            assert a.shape[0] == b.shape[1] == 4
            change = scale * b @ a
            weight.add_(change.T if architecture == "gpt2" else change)
    before = logits(dropped(architecture, (1, "attention")), tokens)
    expected = logits(by_hand, tokens)
    assert not torch.allclose(before, expected, atol=1e-2)
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)
    merge_lora(model)
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_dora_starts_as_the_model_and_merges(architecture, tokens):
    model = dropped(architecture, (1, "attention"))
    before = logits(model, tokens)
    inject_lora(model, dora=True)
    torch.testing.assert_close(logits(model, tokens), before, rtol=1e-4, atol=1e-4)
    learn(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                assert parameter.requires_grad
                parameter.mul_(1.1)
    expected = logits(model, tokens)
    assert not torch.allclose(expected, before, atol=1e-2)
    merge_lora(model)
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("architecture", "end"), crossed(ARCHITECTURES, [merge_lora, remove_lora]))
def test_merged_or_removed_lora_leaves_a_plain_model(architecture, end, tokens):
    model = dropped(architecture, (1, "attention"), (2, "mlp"))
    plain, bypassed = logits(model, tokens), ls.bypassed_sublayers(model)
    classes, keys = [(path, type(m)) for path, m in model.named_modules()], list(model.state_dict())
    inject_lora(model)
    adapted = logits(learn(model), tokens)
    assert not torch.allclose(adapted, plain, atol=1e-2)
    end(model)
    if end is merge_lora:
        torch.testing.assert_close(logits(model, tokens), adapted, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(logits(model, tokens), plain)
    assert [(path, type(m)) for path, m in model.named_modules()] == classes
    assert list(model.state_dict()) == keys
    assert ls.bypassed_sublayers(model) == bypassed
    assert not hasattr(model, "peft_config")
    assert lora_settings(model) is None
    inject_lora(model)
    assert set(adapted_modules(model)) == maps(architecture, attention=(0, 2, 3), mlp=(0, 1, 3))


def test_adapters_off_gives_plain_logits_and_ends_after_an_error(architecture, tokens):
    model = dropped(architecture, (1, "attention"))
    plain = logits(model, tokens)
    inject_lora(model)
    adapted = logits(learn(model), tokens)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    with adapters_off(model):
        assert torch.equal(logits(model, tokens), plain)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
        with adapters_off(model):
            pass
        assert torch.equal(logits(model, tokens), plain)
    assert torch.equal(logits(model, tokens), adapted)
    with pytest.raises(KeyError), adapters_off(model):
        raise KeyError
    assert torch.equal(logits(model, tokens), adapted)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable


def test_dense_model_with_adapters_off_equals_the_original(architecture, tokens):
    model = build_model(architecture)
    original = logits(model, tokens)
    ls.bypass(model, pick(model, (1, "attention"), (2, "mlp")))
    inject_lora(model)
    learn(model)
    with ls.dense(model), adapters_off(model):
        assert torch.equal(logits(model, tokens), original)


@pytest.mark.parametrize(
    ("architecture", "path"), [("opt", "model.decoder.layers.1.fc2"), ("gpt2", "transformer.h.1.mlp.c_proj")]
)
@pytest.mark.parametrize("with_kwargs", [False, True])
def test_forward_hooks_on_adapted_maps_see_the_adapted_output(architecture, path, with_kwargs, tokens):
    model, seen = build_model(architecture), []
    module = model.get_submodule(path)

    def hook(_module, args, *rest):
        seen.append((args[0], rest[-1]))

    handle = module.register_forward_hook(hook, with_kwargs=with_kwargs)
    counted = []
    other = module.register_forward_pre_hook(lambda *_: counted.append(1))
    weight, bias = module.weight.detach().clone(), module.bias.detach().clone()
    weight = weight.T if architecture == "gpt2" else weight
    inject_lora(model, rank=4, alpha=8)
    learned = values(learn(model))
    a, b = (learned[f"{path}.{part}.recovery.weight"] for part in ("lora_A", "lora_B"))
    for end in (lambda _: None, merge_lora):
        end(model)
        seen.clear()
        logits(model, tokens)
        [(given, output)] = seen
        expected = given @ (weight + 2 * b @ a).T + bias
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert len(counted) == 2
    handle.remove()
    other.remove()
    logits(model, tokens)
    assert len(seen) == 1
    assert len(counted) == 2


def test_hook_can_be_removed_from_an_adapted_map(tokens):
    model, seen = build_model("opt"), []
    handle = model.model.decoder.layers[0].fc2.register_forward_hook(lambda *_: seen.append(1))
    inject_lora(model)
    logits(model, tokens)
    handle.remove()
    logits(model, tokens)
    assert seen == [1]


def test_hook_on_an_adapted_module_survives_merging(tokens):
    model, seen = build_model("opt"), []
    inject_lora(model)
    handle = model.model.decoder.layers[0].fc2.register_forward_hook(lambda *_: seen.append(1))
    merge_lora(model)
    logits(model, tokens)
    handle.remove()
    logits(model, tokens)
    assert seen == [1]


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(("architecture", "end"), crossed(ARCHITECTURES, [merge_lora, remove_lora]))
def test_sublayers_dropped_after_injection_stay_dropped_after_merge_or_remove(architecture, end, tokens):
    model = build_model(architecture)
    inject_lora(model)
    learn(model)
    gone = pick(model, (1, "mlp"), (2, "attention"))
    ls.bypass(model, gone)
    expected = logits(model, tokens)
    if end is remove_lora:
        expected = logits(dropped(architecture, (1, "mlp"), (2, "attention")), tokens)
    end(model)
    assert ls.bypassed_sublayers(model) == tuple(gone)
    tolerance = 1e-4 if end is merge_lora else 0
    torch.testing.assert_close(logits(model, tokens), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.default_cases(2)
def test_sublayer_dropped_with_its_adapters_is_restored_with_them(architecture, tokens):
    model = build_model(architecture)
    inject_lora(model)
    adapted = logits(learn(model), tokens)
    trainable = [p.requires_grad for p in model.parameters()]
    ls.bypass(model, pick(model, (1, "mlp"), (2, "attention")))
    assert not torch.allclose(logits(model, tokens), adapted, atol=1e-2)
    ls.restore(model)
    assert torch.equal(logits(model, tokens), adapted)
    assert [p.requires_grad for p in model.parameters()] == trainable


@pytest.mark.default_cases(2)
def test_sublayer_restored_after_merging_has_merged_weights(architecture, tokens):
    model = build_model(architecture)
    inject_lora(model)
    adapted = logits(learn(model), tokens)
    ls.bypass(model, pick(model, (1, "mlp"), (2, "attention")))
    merge_lora(model)
    ls.restore(model)
    torch.testing.assert_close(logits(model, tokens), adapted, rtol=1e-4, atol=1e-4)


def test_lora_dropout_follows_the_training_mode(tokens):
    model, without = build_model("llama"), build_model("llama")
    inject_lora(model, dropout=0.5)
    inject_lora(without)
    learn(model)
    learn(without)
    assert torch.equal(logits(model, tokens), logits(without, tokens))
    model.train()
    assert not torch.equal(logits(model, tokens), logits(model, tokens))
    late = build_model("llama").train()
    inject_lora(late, dropout=0.5)
    learn(late)
    assert not torch.equal(logits(late, tokens), logits(late, tokens))


def test_copied_model_has_its_own_adapters(architecture, tokens):
    model = dropped(architecture, (1, "attention"))
    inject_lora(model)
    adapted = logits(learn(model), tokens)
    twin = copy.deepcopy(model)
    remove_lora(model)
    assert torch.equal(logits(twin, tokens), adapted)
    merge_lora(twin)
    torch.testing.assert_close(logits(twin, tokens), adapted, rtol=1e-4, atol=1e-4)


@pytest.mark.default_cases(2)
def test_training_with_lora_changes_only_the_adapters(architecture, tokens):
    model = dropped(architecture, (1, "attention"))
    inject_lora(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    # A's gradient is B^T times something, and B is zero yet
    assert moved == {f"{path}.lora_B.recovery.weight" for path in maps(architecture, (0, 2, 3), range(4))}


def test_injection_freezes_only_the_transformer_of_a_module(llama):
    outer = nn.ModuleDict({"net": llama, "probe": nn.Linear(2, 2)})
    inject_lora(outer)
    assert len(adapted_modules(llama)) == 28
    assert all(p.requires_grad for p in outer["probe"].parameters())
    assert type(outer["probe"]) is nn.Linear


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, RecoveryError, "rank=0.*at least 1"),
        ({"alpha": 0}, RecoveryError, "alpha=0.*at least 1"),
        ({"dropout": 1}, RecoveryError, r"dropout=1: it must be in \[0, 1\)"),
        ({"dropout": -0.1}, RecoveryError, "dropout=-0.1"),
        ({"placement": "neighbors"}, UnknownNameError, "placement.*Did you mean 'neighbours'"),
        ({"target_modules": "q_proj"}, RecoveryError, "give 'all-linear', or a list"),
        ({"target_modules": []}, RecoveryError, "give 'all-linear', or a list"),
        (
            {"target_modules": ["q_proj", "c_attn"]},
            RecoveryError,
            "named 'c_attn'\\. Available: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj",
        ),
        ({"target_modules": ["proj"]}, RecoveryError, "named 'proj'"),
        ({"placement": "neighbours"}, RecoveryError, "nothing is dropped"),
    ],
)
def test_invalid_lora_options_are_refused_and_change_nothing(llama, options, error, message):
    names = [name for name, p in llama.named_parameters() if p.requires_grad]
    with pytest.raises(error, match=message):
        inject_lora(llama, **options)
    assert [name for name, p in llama.named_parameters() if p.requires_grad] == names


def test_lora_target_that_is_dropped_everywhere_is_refused():
    model = build_model("llama")
    ls.bypass(model, [s for s in ls.find_sublayers(model) if s.kind == "attention"])
    with pytest.raises(RecoveryError, match=r"named 'q_proj'\. Available: down_proj, gate_proj, lm_head, up_proj"):
        inject_lora(model, target_modules=["q_proj"])


def test_injection_without_any_target_is_refused():
    model = dropped("mixtral", *((i, "attention") for i in range(4)))
    with pytest.raises(RecoveryError, match="nothing to adapt in MixtralForCausalLM"):
        inject_lora(model)


def test_injection_over_foreign_adapters_is_refused(llama):
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), llama)
    with pytest.raises(RecoveryError, match=r"carries adapters of peft already \(default\)"):
        inject_lora(llama)
    assert adapted_modules(llama) == {}


def test_injection_into_a_model_outside_hugging_face_keeps_its_outputs_and_trains_only_lora(monkeypatch):
    monkeypatch.setattr(adapter, "_REGISTERED", {})
    ls.register_adapter(GPT, ls.SublayerAdapter(lambda model: {"idx": torch.arange(4)[None]}))
    model, ids = GPT(), torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(0))
    before = model(ids)[0]
    config = inject_lora(model)
    assert torch.equal(model(ids)[0], before)
    linear = {path for path, module in GPT().named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(config.target_modules) == linear
    model(ids)[0].sum().backward()
    assert all(("lora_" in name) == (parameter.grad is not None) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("end", [merge_lora, remove_lora])
def test_merge_and_remove_without_lora_are_refused(llama, end):
    with pytest.raises(RecoveryError, match=f"{end.__name__}: LlamaForCausalLM carries no LoRA adapters"):
        end(llama)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_adapter_with_nan_is_not_merged_and_no_other_is(architecture, tokens):
    model = build_model(architecture)
    plain = logits(model, tokens)
    inject_lora(model)
    learn(model)
    path, last = list(adapted_modules(model).items())[-1]
    with torch.no_grad():
        last.lora_B["recovery"].weight[0, 0] = float("nan")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RecoveryError, match=f"adapter of {re.escape(path)} holds NaN"):
        merge_lora(model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0, equal_nan=True)
    remove_lora(model)
    assert torch.equal(logits(model, tokens), plain)


def test_injection_clears_gradients_of_frozen_weights(llama, tokens):
    backward(llama, tokens)
    assert all(parameter.grad is not None for parameter in llama.parameters())
    ls.inject_lora(llama)
    assert trainable(llama)
    assert frozen_with_gradient(llama) == set()


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("undo", [ls.merge_lora, ls.remove_lora])
@pytest.mark.parametrize("bypassed", ["never", "before", "after"])
def test_merge_and_remove_restore_exactly_the_trainable_parameters(undo, bypassed):
    model, plain = build_model(), build_model()
    for own in (model, plain):
        own.model.embed_tokens.requires_grad_(False)
        own.model.layers[1].mlp.up_proj.requires_grad_(False)
    before = trainable(model)
    some = ls.find_sublayers(model)[2:4]  # block 1, part of which is frozen anyway
    if bypassed == "before":
        ls.bypass(model, some)
    ls.inject_lora(model)
    if bypassed == "after":
        ls.bypass(model, some)
    assert all(".lora_" in name for name in trainable(model))
    undo(model)
    if bypassed != "never":
        ls.bypass(plain, ls.find_sublayers(plain)[2:4])
        assert not any(name.startswith("model.layers.1.") for name in trainable(model))
    assert trainable(model) == trainable(plain)
    if bypassed != "never":
        ls.restore(model)
    assert trainable(model) == before


@pytest.mark.parametrize("options", [{"alpha": 32}, {"rank": 2}])
def test_second_injection_with_other_options_is_refused_and_changes_nothing(llama, options):
    ls.inject_lora(llama, target_modules=["q_proj"])
    before = copy.deepcopy(dict(llama.state_dict())), lora_settings(llama), trainable(llama)
    with pytest.raises(RecoveryError, match="other settings"):
        ls.inject_lora(llama, **options)
    assert same(dict(llama.state_dict()), before[0])
    assert (lora_settings(llama), trainable(llama)) == before[1:]


@pytest.mark.parametrize("change", [ls.quantize, ls.inject_lora])
def test_backward_hook_on_an_adapted_map_is_still_called(llama, tokens, change):
    calls = []
    llama.model.layers[1].mlp.down_proj.register_full_backward_hook(lambda *_: calls.append(1))
    change(llama)
    backward(llama.train(), tokens)
    assert calls == [1]
