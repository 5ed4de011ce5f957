"""What is dropped stays dropped when others replace modules, replace blocks, or wrap and overwrite forwards."""

import copy
import functools
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers import AutoModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import layershed as ls
from layershed.discovery import registry
from layershed.errors import RevivedSublayerError
from layershed.stand_ins.carried import stand_ins_of
from layershed.stand_ins.install import MARK
from tests.support.hand_written import GPT
from tests.support.models import build_model

OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32}
# peft asks transformers for what that will rename
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
CHOSEN = {(1, "attention"), (2, "mlp")}


def chosen(model):
    return [sublayer for sublayer in ls.find_sublayers(model) if (sublayer.block, sublayer.kind) in CHOSEN]


def bypassed(model_type="llama"):
    """A bypassed model, what was dropped, and its logits."""
    model = build_model(model_type, **OPT) if model_type == "opt" else build_model(model_type)
    dropped = chosen(model)
    ls.bypass(model, dropped)
    return model, tuple(dropped), run(model)


def run(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 15)[None]).logits


@pytest.mark.parametrize("targets", [["fc1", "fc2"], "all-linear"], ids=["fc1 and fc2", "all linear"])
@pytest.mark.parametrize("first", ["peft", "bypass"])
def test_merging_of_peft_leaves_sublayers_dropped(first, targets):
    model = build_model("opt", **OPT)
    dropped = chosen(model)
    config = LoraConfig(target_modules=targets, r=2)
    if first == "peft":
        wrapped = get_peft_model(model, config)
        ls.bypass(wrapped, dropped)
    else:
        ls.bypass(model, dropped)
        expected = run(model)
        wrapped = get_peft_model(model, config)
        assert torch.equal(run(wrapped), expected), "new adapters add nothing"
    assert ls.dropped_sublayers(wrapped) == tuple(dropped)
    before = run(wrapped)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(run(merged), before)
    assert ls.dropped_sublayers(merged) == tuple(dropped)


def test_adapters_that_peft_puts_on_dropped_modules_are_frozen():
    model, *_ = bypassed("opt")
    wrapped = get_peft_model(model, LoraConfig(target_modules=["fc1", "fc2"], r=2))
    run(wrapped)
    trained = {name.rsplit(".lora", 1)[0] for name, p in model.named_parameters() if p.requires_grad}
    layers = range(model.config.num_hidden_layers)
    assert trained == {f"model.decoder.layers.{i}.fc{n}" for i in layers for n in (1, 2) if (i, "mlp") not in CHOSEN}


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_module_replaced_by_hand_gets_its_stand_in_back_before_it_runs(model_type):
    model, dropped, expected = bypassed(model_type)
    for path, stand_in in stand_ins_of(model).items():
        if stand_in.core:
            new = copy.deepcopy(model.get_submodule(path))
            new.__dict__.pop("forward")
            model.set_submodule(path, new)
    assert torch.equal(run(model), expected)
    assert ls.dropped_sublayers(model) == dropped


def test_inner_model_called_by_hand_runs_replaced_modules_dropped():
    model, _, _ = bypassed()
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = model.model(input_ids=ids).last_hidden_state
        model.model.layers[1].self_attn = type(model.model.layers[1].self_attn)(model.config, 1)
        assert torch.equal(model.model(input_ids=ids).last_hidden_state, expected)


def replace_one(model):
    model.model.layers[2] = build_model("llama").model.layers[2]


def replace_all(model):
    model.model.layers = build_model("llama").model.layers


def replace_body(model):
    model.model = build_model("llama").model


@pytest.mark.parametrize("replace", [replace_one, replace_all, replace_body])
def test_replaced_block_does_not_run_dense_and_is_bypassed_again_with_a_warning(replace):
    model, dropped, expected = bypassed()
    replace(model)
    with pytest.raises(RevivedSublayerError, match=r"(attention\.1|mlp\.2): dropped, but .* was replaced by another"):
        run(model)
    with pytest.warns(UserWarning, match=r"mlp\.2: recorded as dropped in the model's config, but would have run"):
        assert ls.dropped_sublayers(model) == dropped
    assert torch.equal(run(model), expected)


def test_block_inside_a_wrapper_stays_dropped():
    model, _, expected = bypassed()
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, LlamaDecoderLayer))
    assert torch.equal(run(model), expected)
    assert {(s.block, s.kind) for s in ls.dropped_sublayers(model)} == CHOSEN


def test_hand_written_model_with_a_replaced_block_is_an_error(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    ls.register_adapter(GPT, ls.SublayerAdapter(lambda _: {"idx": torch.arange(6)[None]}))
    model = GPT()
    ls.bypass(model, ls.find_sublayers(model)[1:2])
    model.h[0] = GPT().h[0]
    for look in (lambda: model(torch.arange(6)[None]), lambda: ls.dropped_sublayers(model)):
        with pytest.raises(RevivedSublayerError, match="was replaced by another module"):
            look()
    ls.restore(model)
    model(torch.arange(6)[None])


def test_model_with_fewer_blocks_than_its_record_is_an_error():
    model, *_ = bypassed()
    del model.model.layers[2:]
    model.config.num_hidden_layers = 2
    with pytest.raises(RevivedSublayerError, match=r"mlp\.2: recorded as dropped .* no such sublayer now"):
        ls.dropped_sublayers(model)
    ls.restore(model)
    assert ls.dropped_sublayers(model) == ()


def test_forward_overwritten_by_a_stranger_is_an_error_that_names_the_sublayer():
    model, *_ = bypassed()
    model.model.layers[2].mlp.forward = lambda x: x
    with pytest.raises(RevivedSublayerError, match=r"mlp\.2 is dropped, but its forward was replaced by <function"):
        run(model)
    with pytest.raises(RevivedSublayerError, match=r"mlp\.2 is dropped"):
        ls.dropped_sublayers(model)


def test_forward_deleted_or_set_back_stays_dropped():
    model, dropped, expected = bypassed()
    del model.model.layers[2].mlp.forward
    attention = model.model.layers[1].self_attn
    attention.forward = type(attention).forward.__get__(attention)
    assert torch.equal(run(model), expected)
    assert ls.dropped_sublayers(model) == dropped


def by_wraps(forward):
    @functools.wraps(forward)
    def wrapper(*args, **kwargs):
        return forward(*args, **kwargs)

    return wrapper


def by_closure(forward):
    return lambda *args, **kwargs: forward(*args, **kwargs)


@pytest.mark.parametrize("wrap", [by_wraps, by_closure, functools.partial], ids=["wraps", "closure", "partial"])
def test_wrapped_forward_is_seen_through_and_restored(wrap):
    dense = run(build_model("llama"))
    model, dropped, expected = bypassed()
    for module in (model.model.layers[1].self_attn, model.model.layers[2].mlp):
        module.forward = wrap(module.forward)
    assert ls.dropped_sublayers(model) == dropped
    assert torch.equal(run(model), expected)
    with ls.dense(model):
        assert torch.equal(run(model), dense)
    assert torch.equal(run(model), expected)
    ls.restore(model)
    assert torch.equal(run(model), dense)
    assert ls.dropped_sublayers(model) == ()
    ls.bypass(model, dropped)
    assert torch.equal(run(model), expected)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_have_a_record_of_their_own(how):
    model, dropped, expected = bypassed()
    other = how(model)
    ls.restore(model)
    other.model.layers[2].mlp = type(other.model.layers[2].mlp)(other.config)
    assert torch.equal(run(other), expected)
    assert ls.dropped_sublayers(other) == dropped
    assert ls.dropped_sublayers(model) == ()


def test_restore_leaves_no_record_behind():
    model = build_model("llama")
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}, dict(model.config.__dict__)
    ls.bypass(model, chosen(model))
    ls.restore(model)
    after = {name: dict(module.__dict__) for name, module in model.named_modules()}, dict(model.config.__dict__)
    assert before[1] == after[1]
    for name, attributes in before[0].items():
        assert attributes.keys() == after[0][name].keys(), name
        for key in ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks"):
            assert len(attributes[key]) == len(after[0][name][key]) == 0, (name, key)


@pytest.mark.parametrize("prefix", ["", "model.", "model.layers.", "model.layers.2."])
def test_state_dict_with_any_prefix_cut_off_is_refused_by_the_dense_model(prefix):
    model, *_ = bypassed()
    weights = {name[len(prefix) :]: tensor for name, tensor in model.state_dict().items() if name.startswith(prefix)}
    target = build_model("llama").get_submodule(prefix.rstrip("."))
    with pytest.raises(RuntimeError, match=r"mlp\.dropped, load with layershed"):
        target.load_state_dict(weights)


def test_state_dict_loads_into_the_same_bypass_and_a_dense_one_too():
    model, dropped, expected = bypassed()
    other = build_model("llama", initializer_range=0.5)
    ls.bypass(other, dropped)
    other.load_state_dict(model.state_dict())
    assert torch.equal(run(other), expected)
    other.load_state_dict(build_model("llama").state_dict())
    assert torch.equal(run(other), expected)


def test_marks_are_in_the_state_dict_of_every_wrapper():
    model, *_ = bypassed()
    names = [name for name in nn.Sequential(model).state_dict() if name.endswith(MARK)]
    assert names == [f"0.model.layers.1.self_attn.{MARK}", f"0.model.layers.2.mlp.{MARK}"]


def test_hooks_of_others_survive_a_second_bypass_and_restore():
    model = build_model("llama")
    calls = []
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: calls.append(1))
        module.register_forward_hook(lambda *_: calls.append(2))
    before = {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()}
    for sublayer in chosen(model):
        ls.bypass(model, [sublayer])
    ls.restore(model)
    assert {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()} == before


def test_models_that_share_a_config_object_are_dropped_one_by_one():
    config = build_model("llama").config
    teacher, student = (type(build_model("llama"))(config).eval() for _ in range(2))
    dense = run(teacher)
    ls.bypass(student, chosen(student))
    expected = run(student)
    assert ls.dropped_sublayers(teacher) == ()
    ls.restore(teacher)
    assert torch.equal(run(teacher), dense)
    assert torch.equal(run(student), expected)
    assert len(student.config.dropped_modules) == 4
    ls.remove(student)
    assert ls.dropped_sublayers(teacher) == ()
    assert torch.equal(run(teacher), dense)


def test_inner_model_and_the_model_around_it_know_the_same_drop():
    model, dropped, expected = bypassed()
    assert [s.name for s in ls.dropped_sublayers(model.model)] == [s.name for s in dropped]
    more = [s for s in ls.find_sublayers(model.model) if s.name == "attention.3"]
    ls.bypass(model.model, more)
    assert [s.name for s in ls.dropped_sublayers(model)] == ["attention.1", "mlp.2", "attention.3"]
    assert not torch.equal(run(model), expected)


def test_model_saved_by_others_after_a_drop_in_its_body_is_loaded_dropped(tmp_path):
    model = build_model("llama")
    ls.bypass(model.model, chosen(model.model))
    model.save_pretrained(tmp_path)
    loaded = ls.load_pretrained(tmp_path)
    assert torch.equal(run(loaded), run(model))
    assert ls.dropped_sublayers(loaded) == tuple(chosen(build_model("llama")))


def test_body_of_a_folder_that_others_saved_is_bypassed_again_with_a_warning(tmp_path):
    model, dropped, _ = bypassed()
    model.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="recorded as dropped"):
        assert [s.name for s in ls.dropped_sublayers(body)] == [s.name for s in dropped]


def test_copied_blocks_stay_dropped():
    model, dropped, expected = bypassed()
    model.model.layers = nn.ModuleList(copy.deepcopy(layer) for layer in model.model.layers)
    assert torch.equal(run(model), expected)
    assert ls.dropped_sublayers(model) == dropped


def test_blocks_cut_off_are_named_as_gone():
    model, *_ = bypassed()
    model.model.layers = model.model.layers[:2]
    with pytest.raises(RevivedSublayerError, match=r"mlp\.2: dropped, but layers\.2 of LlamaModel is gone"):
        run(model)


def test_restore_runs_a_forward_that_a_stranger_put_there():
    model, *_ = bypassed()
    mlp = model.model.layers[2].mlp
    mlp.forward = lambda x: x
    ls.restore(model)
    assert ls.dropped_sublayers(model) == ()
    assert torch.equal(mlp(torch.ones(2)), torch.ones(2))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_restored_weights_are_trainable_after_a_stand_in_was_put_back():
    model, *_ = bypassed()
    del model.model.layers[2].mlp.forward
    run(model)
    ls.restore(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


class Timer:
    """A wrapper that is an object."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args, **kwargs):
        return self.function(*args, **kwargs)

    def method(self, *args, **kwargs):
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("wrap", [Timer, lambda f: Timer(f).method], ids=["object", "method of an object"])
def test_wrapper_objects_are_seen_through(wrap):
    model, dropped, expected = bypassed()
    model.model.layers[2].mlp.forward = wrap(model.model.layers[2].mlp.forward)
    assert torch.equal(run(model), expected)
    assert ls.dropped_sublayers(model) == dropped


def test_average_of_state_dicts_by_hand_works():
    model, *_ = bypassed()
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in model.state_dict().items():
        average[name].mul_(0.9).add_(tensor, alpha=0.1)
    model.load_state_dict(average)
