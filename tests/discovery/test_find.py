"""Discovery against written-out module paths. Layers written by hand: test_written_layers.py."""

import types
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from layershed.discovery.branches import Tap
from layershed.discovery.find import dissect, find_left_alone, find_sublayers
from layershed.errors import NoSublayersFoundError, UnprovenStructureError
from layershed.planning.plan import Sublayer
from layershed.surgery import bypass, remove
from tests.support.model_types import MODEL_TYPES
from tests.support.models import SIZES, build_model
from tests.support.thinned import some_of
from tests.support.versions import older

# list of blocks, then per branch: its module, where X and its output can be read, and what goes along with it
LLAMA_LIKE = (
    "model.layers",
    ("self_attn", "input_layernorm", "self_attn", {"input_layernorm"}),
    ("mlp", "post_attention_layernorm", "mlp", {"post_attention_layernorm"}),
)
KNOWN = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "granite": LLAMA_LIKE,
    "gpt2": ("transformer.h", ("attn", "ln_1", "attn", {"ln_1"}), ("mlp", "ln_2", "mlp", {"ln_2"})),
    "gpt_neox": (
        "gpt_neox.layers",
        ("attention", "input_layernorm", "post_attention_dropout", {"input_layernorm"}),
        ("mlp", "post_attention_layernorm", "post_mlp_dropout", {"post_attention_layernorm"}),
    ),
    "phi": (
        "model.layers",
        ("self_attn", "input_layernorm", "self_attn", {"input_layernorm"}),
        ("mlp", "input_layernorm", "mlp", {"input_layernorm"}),
    ),
    "gemma3_text": (
        "model.layers",
        ("self_attn", "input_layernorm", "post_attention_layernorm", {"input_layernorm", "post_attention_layernorm"}),
        (
            "mlp",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
            {"pre_feedforward_layernorm", "post_feedforward_layernorm"},
        ),
    ),
    "olmo2": (
        "model.layers",
        ("self_attn", "self_attn", "post_attention_layernorm", {"post_attention_layernorm"}),
        ("mlp", "mlp", "post_feedforward_layernorm", {"post_feedforward_layernorm"}),
    ),
    "opt": (
        "model.decoder.layers",
        ("self_attn", "self_attn_layer_norm", "self_attn", {"self_attn_layer_norm"}),
        ("fc2", "final_layer_norm", "fc2", {"final_layer_norm", "fc1", "activation_fn"}),
    ),
    "bert": (
        "bert.encoder.layer",
        ("attention", "attention", "attention", set()),
        ("output", "intermediate", "output", {"intermediate"}),
    ),
}
PARALLEL = {"gpt_neox", "phi"}
SCALES = {"granite": 0.5, "bert": None}  # BERT's norm stands in the stream: what can be read is Y
OPTIONS = {"granite": {"residual_multiplier": 0.5}, "bert": {"is_decoder": True}}
families = pytest.mark.parametrize("family", KNOWN)


def build(family):
    return build_model(family, **OPTIONS.get(family, {}))


def expected_branches(family, blocks=4):
    prefix, *kinds = KNOWN[family]
    return [
        (
            Sublayer(i, kind, f"{prefix}.{i}.{module}"),
            f"{prefix}.{i}.{entry}",
            f"{prefix}.{i}.{leave}",
            "parallel" if family in PARALLEL else "sequential",
            SCALES.get(family, 1.0),
            {f"{prefix}.{i}.{name}" for name in support},
        )
        for i in range(blocks)
        for kind, (module, entry, leave, support) in zip(("attention", "mlp"), kinds, strict=True)
    ]


def found_branches(model):
    return [
        (b.sublayer, b.entry.path, b.exit.path, b.topology, b.scale, {path for path, _ in b.support})
        for b in dissect(model).branches
    ]


def on_meta(family):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **{**SIZES, **OPTIONS.get(family, {})})
        ).eval()


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


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
    """Names of the differing entries; pytest would take minutes to print the differences."""
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
def test_branches_found_equal_those_of_known_models(family):
    model = build(family)
    assert found_branches(model) == expected_branches(family)
    assert find_left_alone(model) == ()


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_sublayers_found_equal_those_of_known_models(family):
    assert find_sublayers(build_model(family)) == tuple(branch[0] for branch in expected_branches(family))


@pytest.mark.default_cases(3)
@pytest.mark.parametrize("family", some_of(KNOWN, 2))
def test_model_without_weights_has_the_same_branches(family):
    if family in ("gpt2", "opt", "bert") and older("transformers", "5.0"):
        pytest.skip("transformers < 5.0: their masks read numbers, which a model without weights lacks")
    skeleton = on_meta(family)
    assert found_branches(skeleton) == expected_branches(family)
    assert all(tensor.is_meta for tensor in (*skeleton.parameters(), *skeleton.buffers()))


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.bfloat16), ("llama", torch.float64), ("gpt2", torch.float16), ("gemma3_text", torch.bfloat16)],
)
def test_model_is_proven_in_any_precision(family, dtype):
    assert found_branches(build_model(family).to(dtype)) == expected_branches(family)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_eager_attention_is_found_as_attention(family):
    model = build_model(family)
    model.set_attn_implementation("eager")
    assert found_branches(model) == expected_branches(family)


def test_sequential_gpt_neox_has_sequential_branches():
    branches = dissect(build_model("gpt_neox", use_parallel_residual=False)).branches
    assert {branch.topology for branch in branches} == {"sequential"}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_mixture_of_experts_is_found_as_one_mlp(family):
    sizes = {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
    model = build_model(family, **sizes)
    name = next(name for name, _ in model.model.layers[0].named_children() if name in ("mlp", "block_sparse_moe"))
    assert found_branches(model) == [
        (replace(s, path=s.path.replace("mlp", name)), norm, core.replace("mlp", name), *more)
        for s, norm, core, *more in expected_branches("llama")
    ]


def test_anatomy_says_where_every_block_takes_x():
    anatomy = dissect(build_model("llama"))
    assert anatomy.blocks == tuple(Tap(f"model.layers.{i}", 0) for i in range(4))
    assert not anatomy.tokens_first


@pytest.mark.parametrize(("family", "plain"), [("llama", True), ("phi", True), ("granite", True), ("bert", False)])
def test_block_is_plain_unless_its_stream_has_a_norm(family, plain):
    assert dissect(build(family)).plain == (frozenset(range(4)) if plain else frozenset())


def test_discovery_leaves_the_model_untouched(llama):
    model = mixed_up(llama)
    before = everything(model)
    dissect(model)
    assert changed(before, everything(model)) == []


def test_failed_discovery_leaves_the_model_untouched(llama):
    model = mixed_up(llama)
    model.model.layers[3].mlp.forward = types.MethodType(lambda self, x: x[:, :, :7], model.model.layers[3].mlp)
    before = everything(model)
    with pytest.raises(UnprovenStructureError, match="a forward pass over 4 tokens failed"):
        dissect(model)
    assert changed(before, everything(model)) == []


@pytest.mark.parametrize("family", ["llama", "opt", "bert", "phi"])
def test_bypassed_sublayers_are_still_found_and_removed_ones_are_not(family):
    model = build(family)
    found = dissect(model).branches
    bypass(model, [found[0].sublayer, found[3].sublayer])
    assert [replace(b, stand_ins=(), support=()) for b in dissect(model).branches] == [
        replace(b, stand_ins=(), support=()) for b in found
    ]
    remove(model)
    assert find_sublayers(model) == tuple(b.sublayer for b in (*found[1:3], *found[4:]))


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_sublayers_of_one_kind_are_found_after_the_other_kind_is_removed(llama, kind):
    found = find_sublayers(llama)
    remove(llama, [s for s in found if s.kind == kind])
    assert find_sublayers(llama) == tuple(s for s in found if s.kind != kind)


def test_model_without_any_sublayer_left_is_refused(llama):
    remove(llama, find_sublayers(llama))
    with pytest.raises(NoSublayersFoundError, match="every one was removed"):
        find_sublayers(llama)


@pytest.mark.parametrize("family", ["llama", "gpt2", "granite"])
def test_branches_with_zero_output_are_found(family):
    model = build(family)
    for name, parameter in model.named_parameters():
        if any(f".{projection}." in name for projection in ("o_proj", "down_proj", "c_proj")):
            nn.init.zeros_(parameter)
    assert found_branches(model) == expected_branches(family)


def test_granite_branches_have_their_scale_unless_it_is_one():
    assert found_branches(build_model("granite", residual_multiplier=1.0)) == expected_branches("llama")


def test_block_that_differs_from_the_others_is_refused_by_name(llama):
    llama.model.layers[2].register_forward_hook(lambda _module, _args, output: output.tanh())
    with pytest.raises(UnprovenStructureError, match=r"^model\.layers\.2: "):
        find_sublayers(llama)


def test_block_scaled_by_a_hook_is_the_only_one_not_plain(llama):
    llama.model.layers[2].register_forward_hook(lambda _module, _args, output: output * 1.5)
    assert found_branches(llama) == expected_branches("llama")
    assert dissect(llama).plain == {0, 1, 3}


def test_branch_of_another_width_is_left_alone(llama):
    """It is broadcast over the stream; zeros of the stream's own width would be something else."""
    llama.model.layers[0].mlp.down_proj = nn.Linear(48, 1)
    assert Sublayer(0, "mlp", "model.layers.0.mlp") not in find_sublayers(llama)
    assert find_left_alone(llama)[0].path == "model.layers.0.mlp"


def test_model_whose_forward_pass_fails_is_refused_with_the_cause(llama):
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
def test_attention_that_requires_position_embeddings_is_found(family):
    """Parallel with a shared norm, like Phi."""
    first, second = found_branches(build_model(family, rotary_dim=4))[:2]
    norm = "transformer.h.0.ln_1"
    assert first == (Sublayer(0, "attention", "transformer.h.0.attn"), norm, first[0].path, "parallel", 1.0, {norm})
    assert second == (Sublayer(0, "mlp", "transformer.h.0.mlp"), norm, second[0].path, "parallel", 1.0, {norm})


CULPRITS = [
    ("model.layers.0.mlp.up_proj.weight",),
    ("model.layers.2.self_attn.v_proj.weight",),
    ("model.layers.3.mlp.down_proj.weight",),
    ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"),
]


@pytest.mark.parametrize(
    ("find", "value", "culprits"),
    [
        *((find_sublayers, torch.nan, culprits) for culprits in CULPRITS),
        (find_sublayers, torch.inf, CULPRITS[0]),
        (find_left_alone, torch.nan, CULPRITS[0]),
    ],
)
def test_weights_that_are_not_finite_are_refused_by_name(llama, culprits, value, find):
    """Of the first MLP they would look as if it mixed tokens, and of most others as if nothing were the matter."""
    with torch.no_grad():
        for name in culprits:
            llama.get_parameter(name)[:, 0] = value
    more = " and 1 more" if len(culprits) == 2 else ""
    with pytest.raises(UnprovenStructureError) as caught:
        find(llama)
    told = f"The weights of LlamaForCausalLM hold NaN or infinite values, in {culprits[0]}{more}. Load finite"
    assert str(caught.value).startswith(told)


EIGHT_BITS = [name for name in dir(torch) if name.startswith("float8_")]  # newer ones have more of them


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("broken", [True, False])
def test_weights_that_are_not_finite_are_named_among_weights_of_eight_bits(llama, dtype, broken):
    scale = torch.ones(2, dtype=getattr(torch, dtype))
    if broken:
        scale.view(torch.uint8)[:] = 0xFF if "e8m0" in dtype else 0x80 if "uz" in dtype else 0x7F  # their NaN
    assert scale.float().isnan().any() == broken
    llama.model.layers[0].mlp.scale = torch.nn.Parameter(scale, requires_grad=False)
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[:, 0] = torch.nan
    first = "layers.0.mlp.scale and 1 more" if broken else "layers.1.mlp.up_proj.weight"
    with pytest.raises(UnprovenStructureError, match=f"hold NaN or infinite values, in model.{first}. Load finite"):
        find_sublayers(llama)


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="an older torch")
def test_weights_that_are_not_finite_are_named_beside_weights_of_four_bits(llama):
    packed = torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    llama.model.layers[0].mlp.scale = torch.nn.Parameter(packed, requires_grad=False)
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[:, 0] = torch.nan
    with pytest.raises(UnprovenStructureError, match=r"values, in model.layers.1.mlp.up_proj.weight. Load finite"):
        find_sublayers(llama)


def test_overflowing_activations_are_refused_with_their_cause(llama):
    llama.half()
    with torch.no_grad():
        llama.model.layers[0].mlp.down_proj.weight.fill_(6e4)
        llama.model.layers[0].mlp.up_proj.weight.fill_(6e4)
    with pytest.raises(UnprovenStructureError, match=r"NaN or infinite values.* parameters hold none\. .* wider"):
        find_sublayers(llama)


def test_nan_in_an_unused_embedding_row_is_accepted(llama):
    with torch.no_grad():
        llama.get_input_embeddings().weight[-1] = torch.nan
    assert len(find_sublayers(llama)) == 2 * llama.config.num_hidden_layers


@pytest.mark.filterwarnings("ignore")
def test_model_without_attention_is_refused():
    with pytest.raises(NoSublayersFoundError, match="MambaForCausalLM has no list of blocks with attention in them"):
        find_sublayers(build_model("mamba"))
