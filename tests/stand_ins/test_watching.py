"""A dropped model to its callers and to hooks of others: extra outputs in place, outputs that may be written to."""

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    SwitchTransformersConfig,
    dynamic_module_utils,
)
from transformers import SwitchTransformersForConditionalGeneration as Switch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from layershed.discovery.find import find_sublayers
from layershed.saving.load_model import load_pretrained
from layershed.saving.pretrained import save_pretrained
from layershed.surgery import bypass, dense, remove, restore
from tests.support.architectures import tiny_model
from tests.support.conformance import Case, reference
from tests.support.models import build_model
from tests.support.thinned import crossed

TRUSTED = {"trust_remote_code": True}
TOKENS = torch.arange(1, 9)[None]
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])


def eager(family="llama", **options):
    model = build_model(family, **options)
    model.set_attn_implementation("eager")
    return model


def of_kind(model, kind):
    return [sublayer for sublayer in find_sublayers(model) if sublayer.kind == kind]


def zeroed(model, sublayer):
    """A copy whose branch has zero weights."""
    copied = copy.deepcopy(model)
    for parameter in copied.get_submodule(sublayer.path).parameters():
        parameter.data.zero_()
    return copied


def gaps(entries):
    return [place for place, entry in enumerate(entries) if entry is None]


def assert_equal_but_for(entries, expected, dropped):
    assert len(entries) == len(expected)
    assert gaps(entries) == list(dropped)
    for entry, other in zip(entries, expected, strict=True):
        assert entry is None or torch.allclose(entry, other, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "surgery"), crossed(["llama", "gpt2", "mixtral", "phi", "gemma3_text"], [bypass, remove])
)
def test_attention_weights_and_hidden_states_stay_in_place(family, surgery):
    model = eager(family)
    sublayer = of_kind(model, "attention")[2]
    expected = zeroed(model, sublayer)(TOKENS, output_attentions=True, output_hidden_states=True)
    surgery(model, [sublayer])
    found = model(TOKENS, output_attentions=True, output_hidden_states=True)
    assert_equal_but_for(found.attentions, expected.attentions, [2])
    assert_equal_but_for(found.hidden_states, expected.hidden_states, [])
    assert gaps(model.base_model(TOKENS, output_attentions=True).attentions) == [2]
    parts = model(TOKENS, output_attentions=True, return_dict=False)
    assert [gaps(part) for part in parts if type(part) is tuple and None in part] == [[2]]


@pytest.mark.default_cases(5)
@pytest.mark.parametrize("load", [None, load_pretrained, partial(AutoModelForCausalLM.from_pretrained, **TRUSTED)])
@pytest.mark.parametrize("family", ["openai-gpt", "xlnet", "cpmant"])
def test_weights_of_modules_that_return_more_when_asked_stay_in_place(family, load, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    case = Case(tiny_model(family))
    given = {**case.inputs, "output_attentions": True}
    dropped = [branch for branch in case.anatomy.branches if branch.sublayer.kind == "attention"][1:2]
    model, expected = copy.deepcopy(case.model), reference(case, dropped)
    bypass(model, [branch.sublayer for branch in dropped])
    if load is not None:
        save_pretrained(model, tmp_path / "saved", standalone=True)
        model = load(tmp_path / "saved")
    assert_equal_but_for(model(**given).attentions, expected(**given).attentions, [1])
    restored = copy.deepcopy(case.model)
    bypass(restored, [branch.sublayer for branch in dropped])
    restore(restored)
    assert gaps(restored(**given).attentions) == []


@pytest.mark.parametrize("family", ["llama", "openai-gpt", "cpmant"])
def test_attention_weights_stay_in_place_in_every_step_of_generation(family):
    model = eager() if family == "llama" else tiny_model(family, blocks=4)
    bypass(model, of_kind(model, "attention")[1:3])
    options = {"max_new_tokens": 3, "output_attentions": True, "return_dict_in_generate": True, "do_sample": False}
    steps = model.generate(TOKENS, **options).attentions
    assert [gaps(step) for step in steps] == [[1, 2]] * 3
    assert len(steps[0]) == 4


def test_attention_that_gives_no_weights_gives_no_entries_after_a_drop_either():
    model = build_model()
    model.set_attn_implementation("sdpa")
    bypass(model, of_kind(model, "attention")[:1])
    assert model(TOKENS, output_attentions=True).attentions == ()


def test_entries_are_complete_again_after_restore_and_within_dense():
    model = eager()
    bypass(model, of_kind(model, "attention")[:2])
    with dense(model):
        assert gaps(model(TOKENS, output_attentions=True).attentions) == []
    assert gaps(model(TOKENS, output_attentions=True).attentions) == [0, 1]
    restore(model)
    assert gaps(model(TOKENS, output_attentions=True).attentions) == []
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_attention_weights_stay_in_place_in_both_stacks_of_an_encoder_decoder():
    sizes = {"encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = BartConfig(vocab_size=97, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, **sizes)
    model = BartForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")
    paths = ("model.encoder.layers.1.self_attn", "model.decoder.layers.0.self_attn")
    bypass(model, [sublayer for sublayer in find_sublayers(model) if sublayer.path in paths])
    output = model(TOKENS, output_attentions=True)
    assert [len(entries) for entries in (output.encoder_attentions, output.decoder_attentions)] == [3, 3]
    assert gaps(output.encoder_attentions) == [1]
    assert gaps(output.decoder_attentions) == [0]
    assert gaps(output.cross_attentions) == []


@pytest.mark.parametrize("loader", [None, load_pretrained, partial(AutoModelForCausalLM.from_pretrained, **TRUSTED)])
def test_entries_stay_in_place_in_copies_and_loaded_folders(loader, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = eager("mixtral", num_local_experts=4)
    bypass(model, [of_kind(model, "attention")[1], of_kind(model, "mlp")[2]])
    if loader is not None:
        save_pretrained(model, tmp_path / "saved", standalone=True)
        model = loader(tmp_path / "saved")
        model.set_attn_implementation("eager")
    output = copy.deepcopy(model)(TOKENS, output_attentions=True, output_router_logits=True)
    assert gaps(output.attentions) == [1]
    assert gaps(output.router_logits) == [2]
    model.model.layers[2].mlp.register_forward_hook(in_place)
    assert torch.equal(model(TOKENS).logits, output.logits)


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("surgery", [bypass, remove])
def test_router_loss_is_that_of_the_kept_routers(surgery, mask):
    model = eager("mixtral", num_local_experts=4)
    sublayer = of_kind(model, "mlp")[1]
    given = {"attention_mask": mask, "output_router_logits": True}
    expected = zeroed(model, sublayer)(TOKENS, **given).router_logits
    surgery(model, [sublayer])
    found = model(TOKENS, **given)
    assert_equal_but_for(found.router_logits, expected, [1])
    kept = (*expected[:1], *expected[2:])
    assert torch.allclose(found.aux_loss, load_balancing_loss_func(kept, 4, 2, mask))
    assert gaps(model.model(TOKENS, **given).router_logits) == [1]


@pytest.mark.parametrize("mask", [None, MASK])
def test_router_loss_without_any_router_is_that_of_zero_weights(mask):
    model = eager("mixtral", num_local_experts=4)
    given = {"attention_mask": mask, "output_router_logits": True, "labels": TOKENS}
    expected = copy.deepcopy(model)
    for sublayer in of_kind(model, "mlp"):
        expected = zeroed(expected, sublayer)
    bypass(model, of_kind(model, "mlp"))
    found = model(TOKENS, **given)
    assert found.router_logits == (None,) * 4
    assert torch.allclose(found.loss, expected(TOKENS, **given).loss)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("count", [1, 2])
def test_router_logits_stay_in_place_in_both_stacks_of_switch_transformers(count):
    sizes = {"num_layers": 4, "num_decoder_layers": 4, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2}
    config = SwitchTransformersConfig(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_experts=4, **sizes)
    model = Switch(config).eval()
    routers = [path.removesuffix(".mlp.router") for path, _ in model.named_modules() if path.endswith(".router")]
    sparse = [sublayer for sublayer in of_kind(model, "mlp") if sublayer.path in routers]
    assert len(sparse) == 4
    dropped = [s for stack in ("encoder", "decoder") for s in [s for s in sparse if stack in s.path][:count]]
    bypass(model, dropped)
    output = model(TOKENS, decoder_input_ids=TOKENS, labels=TOKENS, output_router_logits=True, use_cache=False)
    assert torch.isfinite(output.loss)
    for entries in (output.encoder_router_logits, output.decoder_router_logits):
        assert len(entries) == 2
        assert gaps(entries) == list(range(count))


def test_failed_forward_pass_leaves_no_trace_in_the_outputs_of_the_next():
    model = eager("mixtral", num_local_experts=4)
    bypass(model, of_kind(model, "mlp")[:1])
    with pytest.raises(ValueError, match="batch"):
        model(TOKENS, output_router_logits=True, labels=TOKENS[:, :3].repeat(2, 1))
    assert gaps(model(TOKENS, output_router_logits=True).router_logits) == [0]
    assert gaps(model.model(TOKENS, output_router_logits=True).router_logits) == [0]


def test_entries_stay_in_place_in_passes_of_several_threads_at_once():
    model = eager("mixtral", num_local_experts=4)
    bypass(model, [of_kind(model, "attention")[2], of_kind(model, "mlp")[1]])
    model = pickle.loads(pickle.dumps(model))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as threads:
            asked = {"output_attentions": True, "output_router_logits": True}
            found = list(threads.map(lambda _: model(TOKENS, **asked), range(24)))
    finally:
        sys.setswitchinterval(interval)
    alone = model(TOKENS, **asked)
    for output in found:
        assert_equal_but_for(output.attentions, alone.attentions, [2])
        assert_equal_but_for(output.router_logits, alone.router_logits, [1])
        assert torch.equal(output.aux_loss, alone.aux_loss)


def test_interrupted_forward_pass_leaves_no_trace_in_the_outputs_of_the_next(monkeypatch):
    model = eager("mixtral", num_local_experts=4)
    bypass(model, of_kind(model, "mlp")[:1])
    with monkeypatch.context() as patched:
        patched.setattr(model.lm_head, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(TOKENS, output_router_logits=True)
    assert gaps(model(TOKENS, output_router_logits=True).router_logits) == [0]


def interrupt(*_args, **_kwargs):
    raise KeyboardInterrupt


def in_place(_module, _args, output):
    (output[0] if isinstance(output, tuple | list) else output).mul_(2.0)


@pytest.mark.parametrize(
    ("family", "surgery"), crossed(["llama", "gpt2", "falcon", "bloom", "bert", "opt"], [bypass, remove])
)
def test_hooks_may_write_to_what_dropped_modules_and_their_aliases_return(family, surgery):
    case = Case(tiny_model(family))
    dropped = case.several
    model, expected = copy.deepcopy(case.model), reference(case, dropped)
    places = {place for branch in dropped for path, s in branch.stand_ins for place in (path, *s.aliases)}
    surgery(model, [branch.sublayer for branch in dropped])
    for place in sorted(places):
        for each in (model, expected):
            each.get_submodule(place).register_forward_hook(in_place)
    assert torch.allclose(case.logits(model), case.logits(expected), atol=1e-5)


def test_hook_that_writes_to_a_dropped_norm_does_not_change_the_stream():
    model = build_model()
    bypass(model, of_kind(model, "mlp")[1:2])
    expected = model(TOKENS, output_hidden_states=True).hidden_states
    model.model.layers[1].post_attention_layernorm.register_forward_hook(in_place)
    found = model(TOKENS, output_hidden_states=True).hidden_states
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("surgery", [bypass, remove])
def test_global_hook_may_write_to_what_a_stand_in_returns(surgery):
    model = build_model()
    surgery(model, find_sublayers(model)[:4])
    expected = model(TOKENS).logits
    touched = []

    def write(module, _args, output):
        if module in (model.model.layers[0].mlp, model.model.layers[1].self_attn):
            in_place(module, _args, output)
            touched.append(module)

    handle = register_module_forward_hook(write)
    try:
        assert torch.equal(model(TOKENS).logits, expected)
    finally:
        handle.remove()
    assert len(touched) == 2


def test_hooks_get_gradients_of_a_dropped_module_and_change_no_other_gradient():
    model = build_model()
    plain = copy.deepcopy(model)
    for each in (model, plain):
        bypass(each, of_kind(each, "mlp")[1:2])
    seen = []
    module = model.model.layers[1].mlp
    module.register_forward_hook(lambda _module, _args, output: output.retain_grad() or seen.append(output))
    module.register_full_backward_hook(lambda _module, _inputs, outputs: seen.append(outputs[0]))
    for each in (model, plain):
        each(TOKENS, labels=TOKENS).loss.backward()
    assert len(seen) == 2
    assert torch.equal(seen[0].grad, seen[1])
    assert seen[1].abs().sum() > 0
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None)
        assert parameter.grad is None or torch.equal(parameter.grad, other.grad)


def test_stand_in_allocates_nothing_where_only_hooks_of_transformers_listen():
    model = eager()
    bypass(model, of_kind(model, "mlp")[:1])
    bypass(model, of_kind(model, "attention")[:1])
    model(TOKENS, output_attentions=True)  # transformers leaves its hooks
    module, hidden = model.model.layers[0].self_attn, torch.ones(1, 8, 32)
    assert len(module._forward_hooks) == 2
    assert module(hidden_states=hidden)[0].untyped_storage().nbytes() == hidden.element_size()
    module.register_forward_hook(lambda *_: None)
    assert module(hidden_states=hidden)[0].untyped_storage().nbytes() == hidden.nbytes


def write_in_place(_module, _args, output):
    (output[0] if isinstance(output, tuple) else output).mul_(1.0)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_hook_that_writes_in_place_before_a_drop_hides_no_sublayer(model_type):
    model = build_model(model_type)
    found = find_sublayers(model)
    for sublayer in found:
        model.get_submodule(sublayer.path).register_forward_hook(write_in_place)
    assert find_sublayers(model) == found
