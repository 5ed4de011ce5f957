"""Discovery against written-out module paths, and against models that are wrong on purpose."""

import re
import types

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from layershed.discovery import Branch, find_branches, find_sublayers, find_transformer
from layershed.errors import AmbiguousModelError, NoSublayersFoundError, UnprovenStructureError
from layershed.plan import Sublayer
from layershed.surgery import bypass, remove
from tests.conftest import MODEL_TYPES, SIZES, build_model

# list of blocks, then per branch: module, norm (entry), tail, and the length of the tuple it returns
LLAMA_LIKE = ("model.layers", ("self_attn", "input_layernorm", ()), ("mlp", "post_attention_layernorm", ()))
KNOWN = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "gpt2": ("transformer.h", ("attn", "ln_1", ()), ("mlp", "ln_2", ())),
    "gpt_neox": (
        "gpt_neox.layers",
        ("attention", "input_layernorm", ("post_attention_dropout",)),
        ("mlp", "post_attention_layernorm", ("post_mlp_dropout",)),
    ),
    "phi": ("model.layers", ("self_attn", "input_layernorm", ()), ("mlp", "input_layernorm", ())),
    "gemma3_text": (
        "model.layers",
        ("self_attn", "input_layernorm", ("post_attention_layernorm",)),
        ("mlp", "pre_feedforward_layernorm", ("post_feedforward_layernorm",)),
    ),
    "olmo2": (
        "model.layers",
        ("self_attn", None, ("post_attention_layernorm",)),
        ("mlp", None, ("post_feedforward_layernorm",)),
    ),
}
PARALLEL = {"gpt_neox", "phi"}
families = pytest.mark.parametrize("family", KNOWN)


def expected_branches(family, blocks=4):
    prefix, *kinds = KNOWN[family]
    return tuple(
        Branch(
            Sublayer(i, kind, f"{prefix}.{i}.{module}"),
            norm and f"{prefix}.{i}.{norm}",
            tuple(f"{prefix}.{i}.{name}" for name in tail),
            "parallel" if family in PARALLEL else "sequential",
            2 if kind == "attention" else 0,
        )
        for i in range(blocks)
        for kind, (module, norm, tail) in zip(("attention", "mlp"), kinds, strict=True)
    )


def on_meta(family):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES))


def everything(model):
    """All that discovery must not touch."""
    return {
        "training": {name: module.training for name, module in model.named_modules()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "grad": {name: parameter.grad for name, parameter in model.named_parameters()},
        "hooks": {
            name: (list(module._forward_hooks), list(module._forward_pre_hooks))
            for name, module in model.named_modules()
        },
        "instance attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "random state": torch.get_rng_state().tolist(),
        "weights": {name: tensor.tolist() for name, tensor in model.state_dict().items()},
    }


def changed(before, after):
    """Names of what differs; pytest would take minutes to print how."""
    return [name for name in before if before[name] != after[name]]


def mixed_up(model):
    """Some modules in train mode, some frozen, one with a gradient, some with hooks."""
    model.train()
    model.model.layers[1].eval()
    model.model.layers[2].mlp.eval()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    model.model.layers[0].register_forward_hook(lambda *_: None)
    return model


@families
def test_branches_of_known_models(family):
    branches = find_branches(build_model(family))
    assert branches == expected_branches(family)


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_sublayers_of_known_models(family):
    prefix, (attention, *_), (mlp, *_) = KNOWN[family]
    assert find_sublayers(build_model(family)) == tuple(
        Sublayer(i, kind, f"{prefix}.{i}.{module}")
        for i in range(4)
        for kind, module in (("attention", attention), ("mlp", mlp))
    )


def test_entry_is_the_norm_or_the_module_and_exit_the_end_of_the_tail():
    block = "model.layers.0"
    assert [(b.entry, b.exit) for b in find_branches(build_model("llama"))[:2]] == [
        (f"{block}.input_layernorm", f"{block}.self_attn"),
        (f"{block}.post_attention_layernorm", f"{block}.mlp"),
    ]
    assert [(b.entry, b.exit) for b in find_branches(build_model("olmo2"))[:2]] == [
        (f"{block}.self_attn", f"{block}.post_attention_layernorm"),
        (f"{block}.mlp", f"{block}.post_feedforward_layernorm"),
    ]


@families
def test_a_skeleton_without_weights_has_the_same_branches(family):
    skeleton = on_meta(family)
    assert find_branches(skeleton) == expected_branches(family)
    assert all(tensor.is_meta for tensor in (*skeleton.parameters(), *skeleton.buffers()))


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.bfloat16), ("llama", torch.float64), ("gpt2", torch.float16), ("gemma3_text", torch.bfloat16)],
)
def test_the_proof_holds_in_any_precision(family, dtype):
    assert find_branches(build_model(family).to(dtype)) == expected_branches(family)


def test_gpt_neox_can_be_sequential():
    branches = find_branches(build_model("gpt_neox", use_parallel_residual=False))
    assert {branch.topology for branch in branches} == {"sequential"}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_experts_is_one_mlp(family):
    sizes = {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
    assert find_branches(build_model(family, **sizes)) == expected_branches("llama")


def test_nothing_is_touched(llama):
    model = mixed_up(llama)
    before = everything(model)
    find_branches(model)
    assert changed(before, everything(model)) == []


def test_nothing_is_touched_when_it_fails(llama):
    model = mixed_up(llama)
    model.model.layers[3].mlp.forward = types.MethodType(lambda self, x: x[:, :, :7], model.model.layers[3].mlp)
    before = everything(model)
    with pytest.raises(UnprovenStructureError):
        find_branches(model)
    assert changed(before, everything(model)) == []


def test_bypassed_sublayers_are_still_found_and_removed_ones_are_not(llama):
    found = find_branches(llama)
    bypass(llama, [found[0].sublayer, found[3].sublayer])
    assert find_branches(llama) == found
    remove(llama)
    assert find_branches(llama) == (*found[1:3], *found[4:])


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_what_is_left_is_found_once_every_sublayer_of_the_other_kind_is_removed(llama, kind):
    found = find_sublayers(llama)
    remove(llama, [s for s in found if s.kind == kind])
    assert find_sublayers(llama) == tuple(s for s in found if s.kind != kind)


def test_a_model_without_a_sublayer_left_says_so(llama):
    remove(llama, find_sublayers(llama))
    with pytest.raises(NoSublayersFoundError, match="every one was removed"):
        find_sublayers(llama)


@pytest.mark.parametrize(("family", "projections"), [("llama", ("o_proj", "down_proj")), ("gpt2", ("c_proj",))])
def test_zero_initialised_output_projections_are_proven_all_the_same(family, projections):
    model = build_model(family)
    for name, parameter in model.named_parameters():
        if any(f".{projection}." in name for projection in projections):
            nn.init.zeros_(parameter)
    assert find_branches(model) == expected_branches(family)


def test_zero_initialised_output_projections_do_not_hide_a_wrong_structure():
    model = build_model("granite", residual_multiplier=0.5)
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    with pytest.raises(UnprovenStructureError, match=r"model\.layers\.0"):
        find_sublayers(model)


def test_granite_scales_its_branches_unless_by_one():
    with pytest.raises(UnprovenStructureError, match=r"model\.layers\.0: Y = X \+ f\(norm\(X\)\) does not hold"):
        find_sublayers(build_model("granite", residual_multiplier=0.5))
    assert find_branches(build_model("granite", residual_multiplier=1.0)) == expected_branches("llama")


def attention_of(layer, hidden, kwargs):
    return layer.self_attn(hidden_states=layer.input_layernorm(hidden), **kwargs)[0]


class ScaledMlp(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + attention_of(self, hidden_states, kwargs)
        return hidden_states + 0.9 * self.mlp(self.post_attention_layernorm(hidden_states))


class XFromElsewhere(LlamaDecoderLayer):
    """The MLP's residual comes from before the attention."""

    def forward(self, hidden_states, **kwargs):
        after = hidden_states + attention_of(self, hidden_states, kwargs)
        return hidden_states + self.mlp(self.post_attention_layernorm(after))


class ScaledX(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        hidden_states = 1.01 * hidden_states
        hidden_states = hidden_states + attention_of(self, hidden_states, kwargs)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class NormTwice(LlamaDecoderLayer):
    """X is not what the norm before the attention read."""

    def forward(self, hidden_states, **kwargs):
        after = hidden_states + attention_of(self, self.post_attention_layernorm(hidden_states), kwargs)
        return after + self.mlp(self.post_attention_layernorm(after))


class MlpTwice(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + attention_of(self, hidden_states, kwargs)
        for _ in range(2):
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class WithoutMlp(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return hidden_states + attention_of(self, hidden_states, kwargs)


class Faithful(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + attention_of(self, hidden_states, kwargs)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def with_layer(model, layer_class):
    for layer in model.model.layers:
        layer.__class__ = layer_class
    return model


def test_a_block_written_by_hand_is_proven_by_what_it_does(llama):
    assert find_branches(with_layer(llama, Faithful)) == expected_branches("llama")


@pytest.mark.parametrize("layer_class", [ScaledMlp, XFromElsewhere, ScaledX, NormTwice])
def test_a_block_that_does_something_else_is_refused(llama, layer_class):
    with pytest.raises(UnprovenStructureError, match=r"model\.layers\.0: .* does not hold for .*self_attn and .*mlp"):
        find_sublayers(with_layer(llama, layer_class))


@pytest.mark.parametrize("layer_class", [MlpTwice, WithoutMlp])
def test_a_branch_that_runs_twice_or_never_is_refused(llama, layer_class):
    with pytest.raises(UnprovenStructureError, match=r"model\.layers\.0\.mlp did not run exactly once"):
        find_sublayers(with_layer(llama, layer_class))


def test_the_one_block_that_is_different_is_named(llama):
    llama.model.layers[2].register_forward_hook(lambda _module, _args, output: output * 1.5)
    with pytest.raises(UnprovenStructureError, match=r"^model\.layers\.2: "):
        find_sublayers(llama)


class Shift(nn.Module):
    """An MLP by its name, yet every token reads the one before it."""

    def __init__(self, hidden):
        super().__init__()
        self.mix = nn.Linear(hidden, hidden)

    def forward(self, hidden_states):
        return self.mix(hidden_states + hidden_states.roll(1, dims=1))


def test_an_mlp_that_mixes_tokens_is_refused(llama):
    llama.model.layers[1].mlp = Shift(32)
    with pytest.raises(UnprovenStructureError, match=r"model\.layers\.1\.mlp mixes tokens"):
        find_sublayers(llama)


def test_a_second_mlp_in_a_block_is_refused(llama):
    class Adapted(Faithful):
        def forward(self, hidden_states, **kwargs):
            hidden_states = super().forward(hidden_states, **kwargs)
            return hidden_states + self.adapter(hidden_states)

    for layer in llama.model.layers:
        layer.adapter = nn.Linear(32, 32)
    with pytest.raises(
        UnprovenStructureError, match=r"more than one mlp module: .*layers\.0\.mlp, .*layers\.0\.adapter"
    ):
        find_sublayers(with_layer(llama, Adapted))


def test_a_branch_of_another_width_is_refused(llama):
    llama.model.layers[0].mlp.down_proj = nn.Linear(48, 1)  # would be broadcast over the residual stream
    with pytest.raises(UnprovenStructureError, match=r"layers\.0\.mlp turns shape \(1, 4, 32\) into \(1, 4, 1\)"):
        find_sublayers(llama)


def test_a_model_whose_forward_pass_fails_says_why(llama):
    def fail(*_):
        raise RuntimeError("out of luck\nand of memory")

    llama.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(
        UnprovenStructureError,
        match=r"LlamaForCausalLM: a forward pass over 4 tokens failed \(RuntimeError: out of luck\)",
    ) as caught:
        find_sublayers(llama)
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("family", ["gptj", "codegen"])
def test_an_attention_that_insists_on_positions_is_no_crash(family):
    """Parallel with a shared norm, like Phi."""
    branches = find_branches(build_model(family, rotary_dim=4))
    assert [b.sublayer.path for b in branches[:2]] == ["transformer.h.0.attn", "transformer.h.0.mlp"]
    assert {(b.topology, b.norm) for b in branches[:2]} == {("parallel", "transformer.h.0.ln_1")}


@pytest.mark.parametrize("family", ["opt", "bert"])
def test_an_mlp_in_two_modules_is_refused(family):
    with pytest.raises(UnprovenStructureError, match=r"layers?\.0\.\w+ turns shape"):
        find_sublayers(build_model(family))


def test_a_model_without_attention_is_refused():
    with pytest.raises(NoSublayersFoundError, match="MambaForCausalLM has no list of equal blocks with attention"):
        find_sublayers(build_model("mamba"))


def test_what_is_no_transformer_is_refused():
    with pytest.raises(NoSublayersFoundError, match="Linear holds no Hugging Face transformer"):
        find_sublayers(nn.Linear(2, 2))


class Holder(nn.Module):
    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def test_through_a_lightning_module(llama):
    from lightning.pytorch import LightningModule

    class Task(LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = Holder(network=llama, head=nn.Linear(2, 2))

    assert find_transformer(Task()) is llama
    assert find_branches(Task()) == expected_branches("llama")  # paths start at the transformer


def test_through_torch_compile(llama):
    compiled = torch.compile(llama, backend="eager")
    assert find_transformer(compiled) is llama
    assert find_branches(compiled) == expected_branches("llama")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_through_peft():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build_model("llama"), peft.LoraConfig(r=2, target_modules="all-linear"))
    assert find_branches(model) == expected_branches("llama")
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_" not in name)


def test_a_transformer_without_its_head_is_one_too(llama):
    found = find_sublayers(llama.model)
    assert [s.path for s in found[:2]] == ["layers.0.self_attn", "layers.0.mlp"]


def test_two_transformers_must_be_told_apart(llama):
    gpt2 = build_model("gpt2")
    both = Holder(student=llama, teachers=Holder(first=gpt2))
    with pytest.raises(AmbiguousModelError, match=r"2 transformers: student, teachers\.first"):
        find_sublayers(both)
    assert find_transformer(both, name="student") is llama
    assert find_branches(both, name="teachers.first") == expected_branches("gpt2")
    assert find_transformer(both, name="teachers") is gpt2


@pytest.mark.parametrize("name", ["pupil", "student.layers.99", "student.lm_head"])
def test_a_wrong_name_is_refused(llama, name):
    with pytest.raises(NoSublayersFoundError, match=f"no module named '{re.escape(name)}'|Linear holds no"):
        find_sublayers(Holder(student=llama), name=name)


def test_one_transformer_held_twice_is_not_ambiguous(llama):
    assert find_transformer(Holder(model=llama, loss=Holder(model=llama))) is llama
