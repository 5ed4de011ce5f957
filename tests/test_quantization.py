"""Quantized weights against bitsandbytes' own functions on the dense ones, and the traps around training them."""

import copy
import warnings

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

import layershed as ls
from layershed.discovery import registry as adapter
from layershed.discovery.bnb_layers import Linear4bit, Linear8bitLt, dequantized_weight, secure
from layershed.errors import QuantizationError, UnknownNameError
from layershed.quantization import Quantized, dequantize, quantization_of, quantize, quantize_as
from layershed.recovery.lora import adapted_modules, inject_lora, merge_lora, remove_lora
from tests.support.hand_written import GPT
from tests.support.lora import ARCHITECTURES, dropped, learn, logits, maps, pick
from tests.support.models import build_model
from tests.support.rounding import EVEN, rounded
from tests.support.thinned import crossed

MODES = ["nf4", "fp4", "int8"]


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


on_each = pytest.mark.parametrize(("architecture", "mode"), crossed(ARCHITECTURES, MODES))


def by_hand(architecture, mode, *gone, **overrides):
    """The dense model with rounded weights in its linear maps."""
    model = dropped(architecture, *gone, **overrides) if gone else build_model(architecture, **overrides)
    for path in maps(architecture, range(4), range(4)):
        weight = model.get_submodule(path).weight
        transposed = architecture == "gpt2"
        new = rounded(weight.detach().T.contiguous() if transposed else weight.detach(), mode)
        weight.data = new.T.contiguous() if transposed else new
    return model


def quantized_paths(model):
    return {path for path, module in model.named_modules() if isinstance(module, Linear4bit | Linear8bitLt)}


def gradients(model, tokens):
    model.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def kept(state):
    return {name: value.clone() for name, value in state.items()}


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in state.items())


@pytest.mark.parametrize(("architecture", "mode", "double_quant"), crossed(ARCHITECTURES, MODES, [True, False]))
def test_quantized_weights_are_stored_as_bitsandbytes_rounds_them(architecture, mode, double_quant):
    plain, model = build_model(architecture), build_model(architecture)
    done = quantize(model, mode, double_quant=double_quant)
    assert done.double_quant == (double_quant and mode != "int8")
    for path in maps(architecture, range(4), range(4)):
        weight, module = plain.get_submodule(path).weight.detach(), model.get_submodule(path)
        expected = rounded(weight.T.contiguous() if architecture == "gpt2" else weight, mode, double_quant)
        assert module.weight.dtype == (torch.int8 if mode == "int8" else torch.uint8)
        torch.testing.assert_close(dequantized_weight(module), expected, rtol=1e-6 if mode == "int8" else 0, atol=0)
        assert (module.in_features, module.out_features) == expected.shape[::-1]
        if mode != "int8":
            assert module.weight.quant_state.nested == double_quant


@on_each
def test_quantize_changes_and_freezes_only_linear_maps_without_the_head(architecture, mode):
    plain, model = build_model(architecture), build_model(architecture)
    quantize(model, mode)
    expected = maps(architecture, range(4), range(4))
    assert quantized_paths(model) == expected
    untouched = {name for name, _ in plain.named_parameters() if name.removesuffix(".weight") not in expected}
    assert all(torch.equal(model.get_parameter(name), plain.get_parameter(name)) for name in untouched)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == untouched
    assert [path for path, _ in model.named_modules()] == [path for path, _ in plain.named_modules()]


@pytest.mark.parametrize(
    ("architecture", "skip", "left"),
    [
        ("llama", ["down_proj"], {f"model.layers.{i}.mlp.down_proj" for i in range(4)}),
        ("llama", ["model.layers.2"], maps("llama", [2], [2])),
        ("opt", ["fc2"], {f"model.decoder.layers.{i}.fc2" for i in range(4)}),
        ("gpt2", ["c_fc", "mlp.c_proj"], maps("gpt2", (), range(4))),
    ],
    ids=["one map", "block", "opt", "transposed maps"],
)
def test_skipped_modules_keep_their_class_and_weights(architecture, skip, left):
    plain, model = build_model(architecture), build_model(architecture)
    quantize(model, skip_modules=skip)
    assert quantized_paths(model) == maps(architecture, range(4), range(4)) - left
    for path in left:
        assert type(model.get_submodule(path)) is type(plain.get_submodule(path))
        assert torch.equal(model.get_submodule(path).weight, plain.get_submodule(path).weight)


@pytest.mark.parametrize(("architecture", "mode"), crossed(ARCHITECTURES, ["nf4", "fp4"]))
def test_4_bit_model_computes_as_with_rounded_weights(architecture, mode, tokens):
    model = build_model(architecture)
    quantize(model, mode)
    torch.testing.assert_close(logits(model, tokens), logits(by_hand(architecture, mode), tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_8_bit_model_computes_nearly_as_with_rounded_weights(architecture, tokens):
    model = build_model(architecture)
    quantize(model, "int8")
    expected = logits(by_hand(architecture, "int8"), tokens)
    # what goes in is rounded, too, to 8 bits
    assert (logits(model, tokens) - expected).norm() < 0.05 * expected.norm()


ODD = {
    "llama": {"hidden_size": 36, "intermediate_size": 49},
    "gpt2": {"hidden_size": 36, "n_inner": 25},
    "opt": {"hidden_size": 36, "ffn_dim": 29},
}


@pytest.mark.parametrize(("architecture", "mode"), crossed(list(ODD), MODES))
def test_quantized_sizes_that_are_no_multiple_of_a_block_work(architecture, mode, tokens):
    sizes = ODD[architecture]
    model = build_model(architecture, **sizes)
    quantize(model, mode)
    expected = logits(by_hand(architecture, mode, **sizes), tokens)
    assert (logits(model, tokens) - expected).norm() < (0.05 if mode == "int8" else 1e-4) * expected.norm()
    inject_lora(model)
    assert all(gradient.isfinite().all() for gradient in gradients(model, tokens).values())


@on_each
def test_quantize_keeps_sublayers_and_bypass(architecture, mode, tokens):
    model = dropped(architecture, (1, "attention"), (2, "mlp"))
    found, bypassed = ls.find_sublayers(model), ls.bypassed_sublayers(model)
    quantize(model, mode)
    assert ls.find_sublayers(model) == found
    assert ls.bypassed_sublayers(model) == bypassed
    late = build_model(architecture)
    quantize(late, mode)
    dense = logits(late, tokens)
    assert ls.find_sublayers(late) == found
    ls.bypass(late, bypassed)
    assert torch.equal(logits(model, tokens), logits(late, tokens))
    assert not torch.allclose(logits(model, tokens), dense, atol=1e-2)
    ls.restore(model)
    assert torch.equal(logits(model, tokens), dense)


def test_restoring_and_removing_work_on_quantized_weights(mode, tokens):
    model = build_model("llama")
    quantize(model, mode)
    gone = pick(model, (1, "attention"), (2, "mlp"))
    before = logits(model, tokens)
    ls.bypass(model, gone)
    expected = logits(model, tokens)
    ls.restore(model)
    assert torch.equal(logits(model, tokens), before)
    ls.remove(model, gone)
    assert torch.equal(logits(model, tokens), expected)
    assert quantized_paths(model) == maps("llama", (0, 2, 3), (0, 1, 3))


def test_sublayers_removed_before_quantize_stay_removed(mode, tokens):
    model, bypassed = build_model("llama"), build_model("llama")
    gone = pick(model, (1, "attention"), (2, "mlp"))
    ls.remove(model, gone)
    ls.bypass(bypassed, gone)
    for each in (model, bypassed):
        quantize(each, mode)
    assert torch.equal(logits(model, tokens), logits(bypassed, tokens))
    assert ls.removed_sublayers(model) == tuple(gone)


def test_quantize_and_dequantize_keep_training_modes_and_hooks(mode, tokens):
    model, seen = build_model("opt").train(), []
    model.model.decoder.layers[0].eval()
    modes = [module.training for module in model.modules()]
    handle = model.model.decoder.layers[0].fc2.register_forward_hook(lambda *_: seen.append(1))
    quantize(model, mode)
    assert [module.training for module in model.modules()] == modes
    logits(model, tokens)
    dequantize(model)
    assert [module.training for module in model.modules()] == modes
    logits(model, tokens)
    handle.remove()
    logits(model, tokens)
    assert len(seen) == 2


@pytest.mark.parametrize("mode", MODES)
def test_evaluating_a_quantized_model_keeps_gradients_and_state(mode, tokens):
    """bitsandbytes repacks 4-bit weights then, on CPUs with AVX512-BF16, and backpropagates through what is packed."""
    model = dropped("llama", (1, "attention"), **EVEN)
    quantize(model, mode)
    inject_lora(model)
    learn(model)
    state, before, first = kept(model.state_dict()), gradients(model, tokens), logits(model, tokens)
    assert torch.equal(logits(model, tokens), first)
    assert same(model.state_dict(), state)
    after = gradients(model, tokens)
    assert len(before) == 2 * len(adapted_modules(model))
    assert same(before, after)
    assert all(gradient.any() for gradient in after.values())
    packed = [getattr(m.weight, "quant_state", None) for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(packed) == (0 if mode == "int8" else 28)
    assert not any(getattr(state, "packing_format_for_cpu", False) for state in packed)


def test_gradients_through_4_bit_weights_are_those_through_rounded_ones(tokens):
    model, reference = dropped("llama", (1, "attention"), **EVEN), by_hand("llama", "nf4", (1, "attention"), **EVEN)
    quantize(model, "nf4")
    for each in (model, reference):
        inject_lora(each)
        learn(each)
    logits(model, tokens)
    expected = gradients(reference, tokens)
    for name, gradient in gradients(model, tokens).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not functional.has_avx512bf16(), reason="this CPU has no AVX512-BF16")
def test_secure_prevents_the_repacking_of_stock_layers():
    stock, ours = nn.Sequential(bnb.nn.Linear4bit(64, 64)).eval(), nn.Sequential(bnb.nn.Linear4bit(64, 64)).eval()
    secure(ours)
    for model in (stock, ours):
        model.to("cpu")
        with torch.no_grad():
            model(torch.ones(2, 64))
    assert stock[0].weight.quant_state.packing_format_for_cpu
    assert not getattr(ours[0].weight.quant_state, "packing_format_for_cpu", False)


def with_stock_layers(model, mode):
    """As transformers quantizes: bitsandbytes' own classes."""
    for path in maps("llama", range(4), range(4)):
        old = model.get_submodule(path)
        sizes = (old.in_features, old.out_features)
        if mode == "int8":
            new = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, threshold=6.0)
        else:
            new = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, quant_type=mode)
        new.load_state_dict({"weight": old.weight.detach().clone()})
        model.set_submodule(path, new.to("cpu").eval())
    return model


def test_secured_stock_layers_equal_our_quantized_ones(mode, tokens):
    ours = build_model("llama", **EVEN)
    quantize(ours, mode)
    stock = with_stock_layers(build_model("llama", **EVEN), mode)
    secure(stock)
    assert quantized_paths(stock) == quantized_paths(ours)
    assert {type(stock.get_submodule(path)) for path in quantized_paths(stock)} == {
        Linear8bitLt if mode == "int8" else Linear4bit
    }
    assert torch.equal(logits(stock, tokens), logits(ours, tokens))
    assert same(stock.state_dict(), ours.state_dict())
    assert ls.find_sublayers(stock) == ls.find_sublayers(ours)


@pytest.fixture
def loaded(mode, tmp_path):
    """A model that transformers quantized while it loaded it."""
    build_model("llama", **EVEN).save_pretrained(tmp_path)
    options = {"bnb_4bit_quant_type": mode, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32"}
    config = (
        BitsAndBytesConfig(load_in_8bit=True) if mode == "int8" else BitsAndBytesConfig(load_in_4bit=True, **options)
    )
    return AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu").eval()


def test_quantize_equals_quantization_by_transformers_on_loading(loaded, mode, tokens):
    model = build_model("llama", **EVEN)
    done = quantize(model, mode)
    assert same(loaded.state_dict(), model.state_dict())
    told = quantization_of(loaded)
    assert (told.mode, told.double_quant, told.compute_dtype) == (done.mode, done.double_quant, done.compute_dtype)
    with pytest.raises(QuantizationError, match="quantized already"):
        quantize(loaded)


def test_find_sublayers_changes_no_weight_of_a_model_quantized_on_loading(loaded, mode):
    dense = build_model("llama", **EVEN)
    before = [module.weight.detach().clone() for module in loaded.modules() if isinstance(module, nn.Linear)]
    assert ls.find_sublayers(loaded) == ls.find_sublayers(dense)
    after = [module.weight for module in loaded.modules() if isinstance(module, nn.Linear)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("mode", ["nf4"])
def test_lora_gradients_in_a_model_quantized_on_loading_are_right_after_an_evaluation(loaded, tokens):
    reference = by_hand("llama", "nf4", **EVEN)
    for each in (loaded, reference):
        inject_lora(each)
        learn(each)
    logits(loaded, tokens)
    expected, found = gradients(reference, tokens), gradients(loaded, tokens)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not functional.has_avx512bf16(), reason="this CPU has no AVX512-BF16")
@pytest.mark.parametrize("double_quant", [True, False])
def test_stock_layers_that_have_run_are_unpacked_by_secure(double_quant, tokens):
    ours = build_model("llama", **EVEN)
    quantize(ours, double_quant=double_quant)
    stock = copy.deepcopy(ours)
    for module in stock.modules():
        if type(module) is Linear4bit:
            module.__class__, module.support_avx512bf16_for_cpu = bnb.nn.Linear4bit, True
    logits(stock, tokens)
    secure(stock)
    for path in quantized_paths(ours):
        found, expected = (dequantized_weight(model.get_submodule(path)).float() for model in (stock, ours))
        # packing rounds the scales to bfloat16
        assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize(
    ("architecture", "mode", "source_ran", "target_ran"), crossed(ARCHITECTURES, MODES, [True, False], [True, False])
)
def test_quantized_state_loads_strictly_into_another_quantized_model(
    architecture, mode, source_ran, target_ran, tokens
):
    source, target = build_model(architecture), build_model(architecture)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.mul_(0.5)
    quantize(source, mode)
    quantize(target, mode)
    if source_ran:
        logits(source, tokens)
    if target_ran:
        assert not torch.allclose(logits(target, tokens), logits(copy.deepcopy(source), tokens), atol=1e-2)
    state = copy.deepcopy(source.state_dict())
    before = kept(state)
    keys = target.load_state_dict(state, strict=True)
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    assert torch.equal(logits(target, tokens), logits(source, tokens))
    assert same(target.state_dict(), before)
    assert same(state, before)


def test_loaded_quantized_weights_share_no_memory_with_the_state(mode, tokens):
    source, target = build_model("llama"), build_model("llama")
    quantize(source, mode)
    quantize(target, mode)
    state = copy.deepcopy(source.state_dict())
    target.load_state_dict(state)
    before = logits(target, tokens)
    for value in state.values():
        value.zero_()
    assert torch.equal(logits(target, tokens), before)


def test_quantized_model_refuses_a_state_that_lacks_a_weight(mode):
    model = build_model("llama")
    quantize(model, mode)
    state = dict(model.state_dict())
    del state["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*model.layers.0.mlp.up_proj.weight"):
        model.load_state_dict(state)


@pytest.mark.parametrize(("architecture", "mode", "ran"), crossed(ARCHITECTURES, MODES, [True, False]))
def test_copied_quantized_model_computes_the_same(architecture, mode, ran, tokens):
    model = dropped(architecture, (1, "attention"))
    quantize(model, mode)
    if ran:
        logits(model, tokens)
    twin = copy.deepcopy(model)
    expected = logits(model, tokens)
    assert torch.equal(logits(twin, tokens), expected)
    dequantize(model)
    assert torch.equal(logits(twin, tokens), expected)
    assert quantization_of(twin).mode == mode


@on_each
def test_lora_in_a_quantized_model_starts_at_its_logits(architecture, mode, tokens):
    model = dropped(architecture, (1, "attention"), (2, "mlp"))
    quantize(model, mode)
    before = logits(model, tokens)
    inject_lora(model)
    assert torch.equal(logits(model, tokens), before)
    assert set(adapted_modules(model)) == maps(architecture, (0, 2, 3), (0, 1, 3))
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    learn(model)
    assert not torch.allclose(logits(model, tokens), before, atol=1e-2)
    with ls.adapters_off(model):
        assert torch.equal(logits(model, tokens), before)
    remove_lora(model)
    assert torch.equal(logits(model, tokens), before)
    assert ls.bypassed_sublayers(model) == tuple(pick(build_model(architecture), (1, "attention"), (2, "mlp")))


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_merging_into_quantized_weights_is_refused_unless_forced(mode, tokens):
    model = build_model("llama")
    quantize(model, mode)
    inject_lora(model)
    learn(model)
    adapted = logits(model, tokens)
    with pytest.raises(QuantizationError, match="dequantize"):
        merge_lora(model)
    assert torch.equal(logits(model, tokens), adapted)
    change = {
        path: dequantized_weight(layer.base_layer).float() + layer.get_delta_weight("recovery").detach()
        for path, layer in adapted_modules(model).items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft says the same as we do
        merge_lora(model, force=True)
    assert adapted_modules(model) == {}
    assert quantized_paths(model) == set(change)
    for path, weight in change.items():
        got, expected = dequantized_weight(model.get_submodule(path)), rounded(weight, mode)
        # 8 bit: one step apart where peft's own dequantization rounds otherwise
        assert (got - expected).abs().max() <= (weight.abs().max() / 127 if mode == "int8" else 1e-6)
    assert not torch.allclose(logits(model, tokens), adapted, atol=1e-2)


@pytest.mark.parametrize(
    ("architecture", "mode", "dora"),
    [*((name, "nf4", False) for name in ARCHITECTURES), ("llama", "fp4", False), ("llama", "nf4", True)],
)
def test_dequantized_and_merged_model_equals_the_quantized_one_with_lora(architecture, mode, dora, tokens):
    model = dropped(architecture, (1, "attention"), (2, "mlp"))
    bypassed = ls.bypassed_sublayers(model)
    quantize(model, mode)
    inject_lora(model, rank=4, alpha=6, rslora=True, dora=dora)
    learn(model)
    expected = logits(model, tokens)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    dequantize(model)
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert ls.bypassed_sublayers(model) == bypassed
    merge_lora(model)
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-4, atol=1e-4)
    assert [(p, type(m)) for p, m in model.named_modules()] == [
        (p, type(m)) for p, m in build_model(architecture).named_modules()
    ]


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("mode", MODES)
def test_sublayer_dropped_with_its_adapters_survives_dequantize_and_merge(mode, tokens):
    model, reference = build_model("llama"), by_hand("llama", mode)
    quantize(model, mode)
    for each in (model, reference):
        inject_lora(each)
        learn(each)
        ls.bypass(each, pick(each, (1, "attention"), (2, "mlp")))
    dequantize(model)
    gone = maps("llama", [1], [2])
    trainable = {name.partition(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == maps("llama", range(4), range(4)) - gone
    torch.testing.assert_close(logits(model, tokens), logits(reference, tokens), rtol=1e-4, atol=1e-4)
    for end in (merge_lora, ls.restore):
        end(model)
        if end is ls.restore:
            end(reference)
        torch.testing.assert_close(logits(model, tokens), logits(reference, tokens), rtol=1e-4, atol=1e-4)


def test_dequantize_of_an_8_bit_model_keeps_trained_lora(tokens):
    model, reference = build_model("llama"), by_hand("llama", "int8")
    quantize(model, "int8")
    for each in (model, reference):
        inject_lora(each)
        learn(each)
    dequantize(model)
    merge_lora(model)
    torch.testing.assert_close(logits(model, tokens), logits(reference, tokens), rtol=1e-4, atol=1e-4)


@on_each
def test_dequantized_model_is_plain_with_rounded_weights(architecture, mode, tokens):
    plain, model = build_model(architecture), build_model(architecture)
    quantize(model, mode)
    logits(model, tokens)
    dequantize(model)
    assert [(p, type(m)) for p, m in model.named_modules()] == [(p, type(m)) for p, m in plain.named_modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert {type(model.get_submodule(path)) for path in maps(architecture, range(4), range(4))} == {
        Conv1D if architecture == "gpt2" else nn.Linear
    }
    reference = by_hand(architecture, mode)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name], rtol=1e-6, atol=1e-7)
    assert quantization_of(model) is None
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")
    quantize(model, mode)
    assert quantization_of(model).mode == mode


@pytest.mark.parametrize(("mode", "dtype"), crossed(MODES, [torch.bfloat16, torch.float16]))
def test_dequantized_model_has_its_former_dtype(mode, dtype, tokens):
    model = build_model("llama").to(dtype)
    done = quantize(model, mode)
    if mode != "int8":
        assert done.compute_dtype == str(dtype).removeprefix("torch.")
    assert logits(model, tokens).dtype == dtype
    dequantize(model)
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize(("mode", "double_quant"), crossed(MODES, [True, False]))
def test_quantization_of_a_model_can_be_read_and_repeated(mode, double_quant, tokens):
    model, other = build_model("llama"), build_model("llama")
    assert quantization_of(model) is None
    dtype = None if mode == "int8" else "bfloat16"
    done = quantize(model, mode, double_quant=double_quant, compute_dtype=dtype, skip_modules=["down_proj"])
    told = quantization_of(model)
    assert (told.mode, told.double_quant) == (done.mode, done.double_quant) == (mode, double_quant and mode != "int8")
    assert set(told.skip_modules) == {"down_proj", "lm_head"}
    assert told.compute_dtype == ("float32" if mode == "int8" else "bfloat16")
    quantize_as(other, told)
    assert quantization_of(other) == told
    assert Quantized(**{**told.to_dict(), "skip_modules": tuple(told.to_dict()["skip_modules"])}) == told
    assert same(other.state_dict(), model.state_dict())
    assert torch.equal(logits(other, tokens), logits(model, tokens))


def test_quantized_products_use_the_compute_dtype(tokens):
    model, reference = build_model("llama"), by_hand("llama", "nf4")
    quantize(model, compute_dtype="bfloat16")
    expected = logits(reference, tokens)
    for path in maps("llama", range(4), range(4)):
        module = reference.get_submodule(path)
        module.forward = lambda x, own=module: nn.functional.linear(x.bfloat16(), own.weight.bfloat16()).float()
    rounding = logits(reference, tokens)
    assert not torch.allclose(rounding, expected, atol=1e-4)
    torch.testing.assert_close(logits(model, tokens), rounding, rtol=1e-3, atol=1e-3)


def test_quantizing_twice_is_refused(llama, mode):
    quantize(llama, mode)
    state = kept(llama.state_dict())
    with pytest.raises(QuantizationError, match=r"quantized already; call layershed\.dequantize"):
        quantize(llama)
    assert same(llama.state_dict(), state)


def test_quantizing_a_model_with_lora_is_refused(llama):
    inject_lora(llama)
    with pytest.raises(QuantizationError, match="carries adapters, but the order is drop, quantize, LoRA"):
        quantize(llama)
    assert quantized_paths(llama) == set()


def test_unknown_quantization_mode_is_refused(llama):
    with pytest.raises(UnknownNameError, match=r"quantization mode 'nf5'\. Did you mean 'nf4'.*fp4, int8, nf4"):
        quantize(llama, "nf5")
    assert quantized_paths(llama) == set()


def test_quantizing_nothing_is_refused_and_leaves_the_model_plain(llama, tokens):
    before = logits(llama, tokens)
    with pytest.raises(QuantizationError, match="LlamaForCausalLM has no linear map to quantize"):
        quantize(llama, skip_modules=["model"])
    assert quantization_of(llama) is None
    assert torch.equal(logits(llama, tokens), before)


def test_dequantizing_a_plain_model_is_refused(llama):
    with pytest.raises(QuantizationError, match="dequantize: LlamaForCausalLM is not quantized"):
        dequantize(llama)


def test_quantize_refuses_a_model_outside_hugging_face(monkeypatch):
    monkeypatch.setattr(adapter, "_REGISTERED", {})
    ls.register_adapter(GPT, ls.SublayerAdapter(lambda model: {"idx": torch.arange(4)[None]}))
    with pytest.raises(QuantizationError, match="GPT is not a Hugging Face model"):
        quantize(GPT())
    assert quantization_of(GPT()) is None
