"""A model is proven once, until something changes that its answer depends on."""

import copy
import gc
import io
import pickle
import types
import weakref

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from layershed.discovery import find, registry
from layershed.discovery.find import dissect, find_left_alone, find_sublayers
from layershed.discovery.probe import evaluating
from layershed.discovery.registry import SublayerAdapter, register_adapter
from layershed.errors import UnprovenStructureError
from layershed.performance.speedup_target import drop_to_speedup
from layershed.performance.stopwatch import SpeedSettings
from layershed.planning.plan import ImportanceScores
from layershed.recovery.lora import adapters_off, inject_lora, merge_lora, remove_lora
from layershed.surgery import bypass, dense, remove, restore
from tests.support.models import build_model
from tests.support.ticking import Ticking, install


@pytest.fixture
def proofs(monkeypatch):
    """A list that grows by the model of each proof."""
    made = []

    def counted(transformer):
        made.append(transformer)
        return run_probe(transformer)

    run_probe = find.run_probe
    monkeypatch.setattr(find, "run_probe", counted)
    return made


def lora(model):
    return inject_lora(model, rank=2)


def exchange_mlp(model):
    """By one of another width: no branch that could be dropped."""
    model.model.layers[0].mlp.down_proj = nn.Linear(48, 1)


def scale_mlp(model):
    mlp = model.model.layers[1].mlp
    mlp.forward = types.MethodType(lambda self, x: 2 * self.down_proj(self.up_proj(x)), mlp)


def scale_block(model):
    model.model.layers[2].register_forward_hook(lambda _module, _args, output: output * 1.5)


def scale_input(model):
    model.model.layers[2].mlp.register_forward_pre_hook(lambda _module, args: (args[0] * 2,))


def set_residual_scale(model):
    model.model.layers[1].residual_multiplier = 0.5


def set_scale_buffer(model):
    with torch.no_grad():
        model.model.layers[1].mlp.factor.fill_(0.25)


def tie_mlps(model):
    model.model.layers[1].mlp = model.model.layers[0].mlp


def share_a_weight(model):
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def make_meta(model):
    model.to("meta")


def quantized(model):
    pytest.importorskip("bitsandbytes")
    from layershed.quantization import quantize  # here: the module that it quantizes with prints on import

    quantize(model, "int8")


def load_other_tensors(model):
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)


CHANGES = {
    "remove": lambda model: remove(model, find_sublayers(model)[1:2]),
    "add adapters": lora,
    "quantize": quantized,
    "exchange a module": exchange_mlp,
    "exchange a forward": scale_mlp,
    "hook that scales a block": scale_block,
    "hook on an input": scale_input,
    "another dtype": lambda model: model.to(torch.float64),
    "to the meta device": make_meta,
    "resize the embedding": lambda model: model.resize_token_embeddings(131, mean_resizing=False),
    "another attention": lambda model: model.set_attn_implementation("eager"),
    "a config field": lambda model: setattr(model.config, "use_cache", False),
    "tie two modules": tie_mlps,
    "share a weight": share_a_weight,
    "other tensors of the same shape": load_other_tensors,
    "delete a block": lambda model: model.model.layers.__delitem__(3),
    "reorder two blocks": lambda model: model.model.layers.insert(0, model.model.layers.pop(2)),
}


def uncached(model):
    """The answer that a copy without a history gives."""
    return dissect(copy.deepcopy(model))


def proven_anew(proofs, model):
    """Whether asking proves; the answer is compared with that of a copy, and with that of asking again."""
    before = len(proofs)
    answer = dissect(model)
    proved = len(proofs) - before
    assert dissect(model) == answer
    assert len(proofs) - before == proved, "asked twice in one state, it was proven twice"
    assert answer == uncached(model)
    return proved == 1


def test_model_is_proven_once_for_all_functions(llama, proofs):
    first = dissect(llama)
    assert dissect(llama) == first
    assert find_sublayers(llama) == tuple(branch.sublayer for branch in first.branches)
    assert find_left_alone(nn.ModuleDict({"net": llama}), name="net") == ()
    assert proofs == [llama]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_model_is_proven_again(llama, proofs, change):
    assert proven_anew(proofs, llama)
    CHANGES[change](llama)
    assert proven_anew(proofs, llama)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("back", [remove_lora, merge_lora])
def test_model_that_loses_its_adapters_is_proven_again(llama, proofs, back):
    lora(llama)
    assert proven_anew(proofs, llama)
    back(llama)
    assert proven_anew(proofs, llama)


def test_model_with_disabled_adapters_is_proven_again(llama, proofs):
    lora(llama)
    assert proven_anew(proofs, llama)
    with adapters_off(llama):
        assert proven_anew(proofs, llama)
    assert not proven_anew(proofs, llama)


def test_autocast_of_the_caller_needs_no_new_proof(llama, proofs):
    """A probe runs without it (test_autocast.py)."""
    assert proven_anew(proofs, llama)
    with torch.autocast("cpu", torch.bfloat16):
        assert not proven_anew(proofs, llama)


def test_model_is_proven_again_after_a_write_to_a_scale_buffer(proofs):
    model = build_model("llama")
    for layer in model.model.layers:
        layer.mlp.register_buffer("factor", torch.tensor(0.5))
        layer.mlp.forward = types.MethodType(lambda self, x: self.down_proj(self.up_proj(x)), layer.mlp)
        layer.mlp.register_forward_hook(lambda module, _args, output: output * module.factor)
    assert proven_anew(proofs, model)
    set_scale_buffer(model)
    assert proven_anew(proofs, model)


def test_model_is_proven_again_after_a_change_of_a_scale_attribute(proofs):
    model = build_model("granite", residual_multiplier=0.75)
    assert {branch.scale for branch in dissect(model).branches} == {0.75}
    set_residual_scale(model)
    assert {branch.scale for branch in dissect(model).branches if branch.sublayer.block == 1} == {0.5}
    assert proofs == [model, model]
    assert not proven_anew(proofs, model)


def test_model_is_proven_again_after_a_change_of_a_class_forward(llama, proofs, monkeypatch):
    assert proven_anew(proofs, llama)
    kind = type(llama.model.layers[0].mlp)
    monkeypatch.setattr(kind, "forward", lambda self, x: self.down_proj(self.up_proj(x)))
    assert proven_anew(proofs, llama)


def test_model_is_proven_again_after_a_change_of_the_registered_attention_function(llama, proofs, monkeypatch):
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert proven_anew(proofs, llama)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", lambda *args, **kw: attend(*args, **kw))
    assert proven_anew(proofs, llama)


class Tiny(nn.Module):
    """A transformer that nobody knows but the adapter for it."""

    def __init__(self):
        super().__init__()
        self.llama = build_model("llama")

    def forward(self, tokens):
        return self.llama(input_ids=tokens, use_cache=False).logits


def test_model_is_proven_again_after_another_adapter_is_registered(proofs, monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", {})
    register_adapter(Tiny, SublayerAdapter(lambda _model: {"tokens": torch.arange(4)[None]}))
    model = Tiny()
    assert proven_anew(proofs, model)
    register_adapter(Tiny, SublayerAdapter(lambda _model: {"tokens": torch.arange(5)[None]}, ("llama.model.layers",)))
    assert proven_anew(proofs, model)


# What a probe undoes before it looks: no other answer, so no other proof


def test_bypass_does_not_change_the_sublayers_found_or_their_proof(llama, proofs):
    sublayers = find_sublayers(llama)
    for dropped in (sublayers[:1], sublayers[1:4], sublayers):
        bypass(llama, dropped)
        assert not proven_anew(proofs, llama)
        with dense(llama):
            assert not proven_anew(proofs, llama)
    restore(llama, sublayers[2:])
    assert not proven_anew(proofs, llama)
    restore(llama)
    assert not proven_anew(proofs, llama)


def test_model_is_proven_again_after_a_change_of_a_forward_hidden_by_a_bypass(llama, proofs):
    dissect(llama)
    bypass(llama, find_sublayers(llama)[3:4])
    llama.model.layers[1].mlp.__dict__["forward"].own["forward"] = nn.Identity()
    assert proven_anew(proofs, llama)
    assert "model.layers.1.mlp" not in [sublayer.path for sublayer in find_sublayers(llama)]


def test_train_mode_does_not_change_the_sublayers_found_or_their_proof(llama, proofs):
    dissect(llama)
    llama.train()
    assert not proven_anew(proofs, llama)
    with evaluating(llama):
        assert not proven_anew(proofs, llama)


def test_inference_mode_does_not_change_the_sublayers_found_or_their_proof(llama, proofs):
    dissect(llama)
    with torch.inference_mode():
        assert not proven_anew(proofs, llama)
        assert find_sublayers(build_model("llama")) == find_sublayers(llama)


def test_frozen_parameters_and_gradients_do_not_change_the_sublayers_found_or_their_proof(llama, proofs):
    dissect(llama)
    llama(input_ids=torch.arange(5)[None]).logits.sum().backward()
    llama.requires_grad_(False)
    assert not proven_anew(proofs, llama)


# Numbers


def test_new_finite_weights_need_no_new_proof(llama, proofs):
    dissect(llama)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=0.1)
    llama(input_ids=torch.arange(5)[None]).logits.sum().backward()
    optimizer.step()
    assert not proven_anew(proofs, llama)


@pytest.mark.parametrize(
    ("how", "value"), [("write", torch.nan), ("load", torch.nan), ("assign", torch.nan), ("write", torch.inf)]
)
def test_weights_that_are_not_finite_are_refused_by_name_after_a_proof(llama, how, value):
    find_sublayers(llama)
    finite = copy.deepcopy(llama.state_dict())
    broken = copy.deepcopy(finite)
    broken["model.layers.2.mlp.up_proj.weight"][3] = value
    if how == "write":
        with torch.no_grad():
            llama.model.layers[2].mlp.up_proj.weight[3] = value
    else:
        llama.load_state_dict(broken, assign=how == "assign")
    with pytest.raises(UnprovenStructureError) as fresh:
        uncached(llama)
    for _ in range(2):
        with pytest.raises(UnprovenStructureError) as known:
            find_sublayers(llama)
        assert str(known.value) == str(fresh.value)
        assert "in model.layers.2.mlp.up_proj.weight." in str(known.value)
    llama.load_state_dict(finite)
    assert dissect(llama) == uncached(llama)


def test_weights_that_overflow_are_refused_after_a_proof(proofs):
    model = build_model("llama").half()
    dissect(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(6e4)
        model.model.layers[0].mlp.up_proj.weight.fill_(6e4)
    with pytest.raises(UnprovenStructureError, match="NaN or infinite values, though its parameters hold none"):
        dissect(model)
    assert len(proofs) == 1


def test_model_with_zero_branches_is_proven_again_after_its_weights_change(llama, proofs):
    with torch.no_grad():
        llama.model.layers[0].mlp.down_proj.weight.zero_()
    for number in (1, 2):  # it is not remembered: numbers may show that the branch mixes tokens
        dissect(llama)
        assert len(proofs) == number
    with torch.no_grad():
        llama.model.layers[0].mlp.down_proj.weight.fill_(0.1)
    assert proven_anew(proofs, llama)


# What the memory may not do


def test_equal_models_are_proven_separately(proofs):
    one, other = build_model("llama"), build_model("llama")
    assert dissect(one) == dissect(other)
    assert proofs == [one, other]
    clone = copy.deepcopy(one)
    assert dissect(clone) == dissect(one)
    assert proofs == [one, other, clone]


def test_proof_leaves_no_attribute_on_the_model(llama):
    before = {name: sorted(vars(module)) for name, module in llama.named_modules()}
    dissect(llama)
    assert {name: sorted(vars(module)) for name, module in llama.named_modules()} == before
    pickled = pickle.loads(pickle.dumps(llama))
    assert list(find._PROOFS._known.get(pickled, {})) == []
    stream = io.BytesIO()
    torch.save(llama, stream)
    assert b"proofs" not in stream.getvalue()


def test_proof_does_not_keep_a_model_in_memory(proofs):
    model = build_model("llama")
    scale_mlp(model)
    dissect(model)
    proofs.clear()
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_proof_does_not_keep_a_replaced_module_in_memory(llama):
    dissect(llama)
    gone = weakref.ref(llama.model.layers[0].mlp.down_proj)
    exchange_mlp(llama)
    gc.collect()
    assert gone() is None


def test_changing_a_returned_anatomy_does_not_change_later_ones(llama):
    first = dissect(llama)
    for branch in first.branches:
        for _, stand_in in (*branch.stand_ins, *branch.support):
            stand_in.zero, stand_in.frozen, stand_in.layer_idx = None, ("weight",), 77
            stand_in.own["forward"] = llama.forward
    assert dissect(llama) == uncached(llama)


def test_number_of_proofs_kept_for_a_model_is_bounded(llama):
    for _ in range(12):
        llama.model.layers[0].mlp.register_forward_hook(lambda *_: None)
        dissect(llama)
    assert len(find._PROOFS._known[llama]) < 12


def test_model_under_a_torch_function_mode_is_proven_each_time(llama, proofs):
    with torch.device("cpu"):
        dissect(llama)
        dissect(llama)
    assert len(proofs) == 2


@pytest.mark.parametrize("target", [1.2, 1.6])
def test_drop_to_speedup_proves_the_model_once(monkeypatch, llama, proofs, target):
    clock = install(monkeypatch, Ticking())
    clock.watch(llama)
    sublayers = find_sublayers(llama)
    asked = []
    monkeypatch.setattr(find, "refuse_strangers", asked.append)
    scores = ImportanceScores({s: float(i) for i, s in enumerate(sublayers)}, blocks={}, metric="angular")
    plan, _ = drop_to_speedup(
        llama, scores, target, settings=SpeedSettings(prompt_tokens=3, new_tokens=2, runs=1, warmup=0)
    )
    assert 0 < len(plan) < len(sublayers)
    assert len(asked) > 5
    assert proofs == [llama]


@pytest.mark.parametrize("how", ["fused", "data", "numpy"])
def test_weights_that_became_nan_by_an_uncounted_write_are_refused(llama, how):
    dissect(llama)
    weight = llama.model.layers[1].mlp.up_proj.weight
    if how == "fused":
        optimizer = torch.optim.AdamW(llama.parameters(), lr=float("inf"), fused=True)
        llama(input_ids=torch.arange(5)[None]).logits.sum().backward()
        optimizer.step()
    elif how == "data":
        weight.data.fill_(torch.nan)
    else:
        weight.detach().numpy()[:] = float("nan")
    with pytest.raises(UnprovenStructureError, match="NaN or infinite values"):
        dissect(llama)
