"""Predicted costs against torch's FLOP counter, the real KV cache and formulas by hand."""

import copy
import inspect

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.models.auto.configuration_auto import AutoConfig

from layershed.discovery.find import find_sublayers
from layershed.errors import CostError
from layershed.performance.costs import CostModel
from layershed.performance.model_size import weight_sizes
from layershed.performance.roofline import Ceilings, Cost
from layershed.performance.stopwatch import SpeedSettings, Stopwatch, cache_bytes
from layershed.planning.plan import Sublayer
from layershed.quantization import quantize
from layershed.recovery.lora import inject_lora
from layershed.spellings import cache_in, cache_name
from layershed.surgery import bypass, remove
from tests.support.models import SIZES, build_model, hooks_of
from tests.support.thinned import one_of, some_of

MLA = {
    **{"kv_lora_rank": 12, "q_lora_rank": 20, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 10},
    **{
        "num_key_value_heads": 4,
        "head_dim": 4,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
    },
    **{"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "moe_intermediate_size": 24},
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
MODELS = [
    *(
        (name, {})
        for name in ("llama", "mistral", "qwen3", "gpt2", "opt", "gpt_neox", "gemma3_text", "phi", "bloom", "mixtral")
    ),
    ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 20, "mlp_only_layers": [1]}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("mistral", {"sliding_window": 8}),
    ("deepseek_v3", MLA),
    ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 0, **EXPERTS, "use_mamba_kernels": False}),
    ("bart", {"d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 48, "decoder_attention_heads": 4}),
]
ids = [f"{name}{'-' if own else ''}{next(iter(own), '')}" for name, own in MODELS]
EXACT = [(name, own) for name, own in MODELS if name != "jamba"]
exact_ids = [i for i in ids if not i.startswith("jamba")]


def countable(model_type, **overrides):
    """A model whose products torch can count: no flash attention on a CPU, no grouped products."""
    model = build_model(model_type, **overrides)
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation") and model_type in ("mixtral", "qwen2_moe", "deepseek_v3"):
        model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def counted(model, batch_size, tokens):
    """FLOP counters of a prefill and of the cached step after it."""
    words = torch.randint(3, 97, (batch_size, tokens), generator=torch.Generator().manual_seed(0))
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with FlopCounterMode(display=False) as prefill:
        cache = cache_in(model(input_ids=words, use_cache=True, **last))
    with FlopCounterMode(display=False) as decode:
        model(input_ids=words[:, :1], **{cache_name(model.forward): cache}, use_cache=True, **last)
    return prefill, decode


def passes(costs, batch_size, tokens):
    return (
        costs.of_pass(batch_size=batch_size, tokens=tokens),
        costs.of_pass(batch_size=batch_size, tokens=1, context=tokens),
    )


def flops(pieces):
    return sum(piece.flops for piece in pieces)


@pytest.mark.default_cases(8)
@pytest.mark.parametrize(("batch_size", "tokens"), one_of([(1, 12), (3, 7)]))
@pytest.mark.parametrize(("model_type", "overrides"), EXACT, ids=exact_ids)
def test_flops_equal_torch_flop_counter_dense_and_dropped(model_type, overrides, batch_size, tokens):
    model = countable(model_type, **overrides)
    costs = CostModel(model)
    real = counted(model, batch_size, tokens)
    for own, counter in zip(passes(costs, batch_size, tokens), real, strict=True):
        assert flops(own.without(())) == pytest.approx(counter.get_total_flops(), rel=1e-12)
    bypass(model, find_sublayers(model)[1:4])  # an attention between two MLPs
    dropped = CostModel(model)
    assert dropped.dropped == tuple(sorted(find_sublayers(model)[1:4]))
    for own, counter in zip(passes(dropped, batch_size, tokens), counted(model, batch_size, tokens), strict=True):
        assert flops(own.without(dropped.dropped)) == pytest.approx(counter.get_total_flops(), rel=1e-12)
        assert flops(own.without(())) > flops(own.without(dropped.dropped))
    assert passes(dropped, batch_size, tokens) == passes(
        costs, batch_size, tokens
    )  # costs before the drop are unchanged


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    some_of([m for m in EXACT if m[0] not in ("opt", "bart")], 2),
    ids=[i for i in ids if i.partition("-")[0] not in ("jamba", "opt", "bart")],
)
def test_flops_of_each_sublayer_equal_torch_flop_counter(model_type, overrides):
    model = countable(model_type, **overrides)
    costs = CostModel(model)
    for own, counter in zip(passes(costs, 2, 9), counted(model, 2, 9), strict=True):
        by_module = counter.get_flop_counts()
        real = {
            sublayer: sum(by_module[f"{type(model).__name__}.{sublayer.path}"].values()) for sublayer in own.sublayers
        }
        assert {sublayer: cost.flops for sublayer, cost in own.sublayers.items()} == pytest.approx(real)
        assert own.rest.flops == pytest.approx(counter.get_total_flops() - sum(real.values()))


def test_mlp_flops_are_counted_without_an_mlp_module():
    model = countable("opt", ffn_dim=48)
    own, _ = passes(CostModel(model), 2, 9)
    assert [cost.flops for s, cost in own.sublayers.items() if s.kind == "mlp"] == [2 * 18 * 2 * 32 * 48] * 4


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("batch_size", "tokens", "context"), [(1, 12, 0), (3, 12, 0), (1, 1, 30), (3, 1, 30)])
def test_llama_costs_equal_the_formula(tied, batch_size, tokens, context):
    costs = CostModel(build_model(tie_word_embeddings=tied))
    own = costs.of_pass(batch_size=batch_size, tokens=tokens, context=context)
    rows, keys, size = batch_size * tokens, context + tokens, 4
    maps = [(32, 32), (32, 16), (32, 16), (32, 32)]
    attention = Cost(
        2 * rows * sum(a * b for a, b in maps) + 2 * rows * keys * 4 * (8 + 8),
        size
        * (
            sum(a * b for a, b in maps)
            + 32  # its norm
            + rows * sum(a + b for a, b in maps)
            + batch_size * (keys + tokens) * 2 * 2 * 8  # keys and values read, and written for the new tokens
        ),
    )
    mlp = Cost(2 * rows * 3 * 32 * 48, size * (3 * 32 * 48 + 32 + rows * 3 * (32 + 48)))
    for sublayer, cost in own.sublayers.items():
        assert cost == (attention if sublayer.kind == "attention" else mlp)
    head = batch_size * 97 * 32  # the last position only
    # weights, activations and the final norm; the rows of an embedding are read, and where it is tied the head has it
    rest = size * (97 * 32 + batch_size * (97 + 32) + 32 + (0 if tied else rows * 32))
    assert own.rest == Cost(2 * head, rest)


def test_expert_flops_follow_the_share_per_token_and_bytes_the_experts_in_use():
    costs = CostModel(build_model("mixtral", num_local_experts=8, num_experts_per_tok=2))
    for tokens, batch_size in ((1, 1), (1, 4), (50, 2)):
        rows = tokens * batch_size
        own = next(
            cost
            for sublayer, cost in costs.of_pass(batch_size=batch_size, tokens=tokens).sublayers.items()
            if sublayer.kind == "mlp"
        )
        assert own.flops == 2 * rows * (2 * 3 * 32 * 48 + 8 * 32)  # two experts, and the router
        weights = 8 * 3 * 32 * 48 * (1 - 0.75**rows)  # probability that some token takes an expert
        # in and out of gate and up in one, and of down, of both experts; the router; the norm
        activations = rows * (2 * (32 + 96 + 48 + 32) + 8 + 32)
        assert own.bytes == pytest.approx(4 * (weights + 8 * 32 + 32 + activations))


def generated(model, settings):
    with torch.no_grad():
        stopwatch = Stopwatch(model, settings)
        return cache_bytes(cache_in(stopwatch.decode(stopwatch.prefill())))


@pytest.mark.parametrize(("model_type", "overrides"), some_of(MODELS, 2), ids=ids)
def test_predicted_cache_bytes_equal_the_real_cache_dense_and_dropped(model_type, overrides):
    model = build_model(model_type, **overrides)
    settings = SpeedSettings(prompt_tokens=11, new_tokens=9, batch_size=2)
    costs = CostModel(model)
    assert costs.kv_bytes(batch_size=2, tokens=20) == generated(model, settings)
    bypass(model, [s for s in find_sublayers(model) if s.kind == "attention"][:1])
    dropped = CostModel(model)
    # an unfilled slot holds at most one number per token, for its length
    assert 0 <= generated(model, settings) - dropped.kv_bytes(batch_size=2, tokens=20) <= 2 * 2 * 20 * 4
    assert dropped.kv_bytes(batch_size=2, tokens=20, dropped=()) == costs.kv_bytes(batch_size=2, tokens=20)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt2"])
def test_removed_sublayers_cost_the_same_as_bypassed_ones(model_type):
    model = build_model(model_type)
    bypass(model, find_sublayers(model)[:3])
    bypassed = CostModel(model)
    remove(model)
    removed = CostModel(model)
    for without, own in zip(passes(bypassed, 2, 9), passes(removed, 2, 9), strict=True):
        assert without.without(bypassed.dropped) == own.without(())
    assert removed.kv_bytes(batch_size=2, tokens=9) == bypassed.kv_bytes(batch_size=2, tokens=9)


@pytest.mark.parametrize(("tokens", "held"), [(3, 3), (7, 7), (8, 8), (20, 8)])
def test_sliding_window_bounds_cache_and_keys(tokens, held):
    model = countable("mistral", sliding_window=8)
    costs = CostModel(model)
    # in a full window the oldest token is ignored, but keeps its memory until the next step
    own = costs.kv_bytes(batch_size=1, tokens=tokens)
    assert own == 4 * held * 2 * 2 * 8 * 4 == generated(model, SpeedSettings(prompt_tokens=1, new_tokens=tokens - 1))
    _, counter = counted(model, 1, tokens)
    step = costs.of_pass(batch_size=1, tokens=1, context=tokens)
    assert flops(step.without(())) == counter.get_total_flops()


def skeleton(model_type, overrides, dtype=None):
    config = AutoConfig.for_model(model_type, **{**SIZES, **overrides})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **({"dtype": dtype} if dtype else {})).eval()


@pytest.mark.default_cases(2)
@pytest.mark.parametrize(
    ("model_type", "overrides"), some_of(EXACT, 3), ids=[i for i in ids if not i.startswith("jamba")]
)
def test_skeleton_has_the_costs_of_the_model(model_type, overrides):
    real, meta = CostModel(build_model(model_type, **overrides)), CostModel(skeleton(model_type, overrides))
    assert passes(meta, 3, 9) == passes(real, 3, 9)
    assert meta.kv_bytes(batch_size=3, tokens=9) == real.kv_bytes(batch_size=3, tokens=9)


def test_half_precision_halves_the_cost_bytes():
    full, half = (CostModel(skeleton("llama", {}, dtype)) for dtype in (torch.float32, torch.bfloat16))
    real = CostModel(build_model().bfloat16())
    for one, other, same in zip(passes(full, 2, 9), passes(half, 2, 9), passes(real, 2, 9), strict=True):
        assert same == other
        for a, b in zip(one.without(()), other.without(()), strict=True):
            assert (a.flops, a.bytes) == (b.flops, 2 * b.bytes)
    assert full.kv_bytes(batch_size=2, tokens=9) == 2 * half.kv_bytes(batch_size=2, tokens=9)


def test_quantized_model_has_equal_flops_and_fewer_bytes():
    model = build_model(hidden_size=64, intermediate_size=128)
    dense = CostModel(model).of_pass(batch_size=2, tokens=9)
    before = weight_sizes(model)
    quantize(model, "nf4", double_quant=False)
    packed = CostModel(model).of_pass(batch_size=2, tokens=9)
    for sublayer, cost in packed.sublayers.items():
        assert cost.flops == dense.sublayers[sublayer].flops
        assert cost.bytes < dense.sublayers[sublayer].bytes
    assert packed.rest == dense.rest
    saved = sum(dense.sublayers[s].bytes - cost.bytes for s, cost in packed.sublayers.items())
    maps = before.parameters - 2 * 97 * 64 - 9 * 64
    assert saved == maps * (4 - 0.5)  # the scales, a number per 64 weights, are left out


@pytest.mark.parametrize("quantized", [False, True])
def test_costs_exclude_adapters(quantized):
    model = build_model(hidden_size=64)
    if quantized:
        quantize(model)
    before = passes(CostModel(model), 2, 9)
    inject_lora(model)
    assert passes(CostModel(model), 2, 9) == before


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2"])
def test_cost_model_leaves_the_model_unchanged(model_type):
    model = build_model(model_type).train()
    bypass(model, find_sublayers(model)[:2])
    state, hooks = copy.deepcopy(model.state_dict()), hooks_of(model)
    dropped = CostModel(model).dropped
    assert dropped == find_sublayers(model)[:2]
    assert model.training
    assert hooks_of(model) == hooks
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())


ATTENTION, MLP = Sublayer(0, "attention", "model.layers.0.self_attn"), Sublayer(0, "mlp", "model.layers.0.mlp")


@pytest.mark.parametrize("gone", [None, (), (MLP,), (ATTENTION, MLP)], ids=["bypassed", "none", "mlp", "both"])
@pytest.mark.parametrize(
    ("speed", "bandwidth"), [(1e9, 1e3), (1e3, 1e9), (1e6, 2e6)], ids=["memory", "compute", "mixed"]
)
def test_least_seconds_equal_the_sum_over_all_decoding_steps(gone, speed, bandwidth):
    model = build_model()
    bypass(model, [ATTENTION])
    costs = CostModel(model)
    settings = SpeedSettings(prompt_tokens=20, new_tokens=5, batch_size=3)
    dropped = {ATTENTION} if gone is None else set(gone)

    def by_hand(own):
        pieces = [cost for sublayer, cost in own.sublayers.items() if sublayer not in dropped] + [own.rest]
        return sum(max(piece.flops / speed, piece.bytes / bandwidth) for piece in pieces)

    prefill, decode = costs.seconds(Ceilings("made up", speed, bandwidth, "nowhere"), settings, dropped=gone)
    assert prefill == by_hand(costs.of_pass(batch_size=3, tokens=20))
    steps = [by_hand(costs.of_pass(batch_size=3, tokens=1, context=context)) for context in range(20, 25)]
    assert decode == pytest.approx(5 * steps[2])
    assert decode == pytest.approx(sum(steps), rel=1e-9)  # costs grow evenly


def test_cost_model_finds_a_transformer_by_name():
    holder = torch.nn.ModuleDict({"student": build_model(), "teacher": build_model("gpt2")})
    assert passes(CostModel(holder, name="student"), 1, 4) == passes(CostModel(build_model()), 1, 4)


def test_cost_model_refuses_an_encoder():
    config = AutoConfig.for_model("bert", **SIZES)
    with pytest.raises(CostError, match="BertForMaskedLM is not a causal language model"):
        CostModel(AutoModelForMaskedLM.from_config(config))


def test_experts_without_a_configured_number_per_token_are_refused(monkeypatch):
    monkeypatch.setattr("layershed.performance.costs._TOP_K", ("experts_a_token_takes",))
    model = build_model("mixtral")
    with pytest.raises(CostError, match=r"8 experts of MixtralForCausalLM are unknown.*number of experts per token"):
        CostModel(model)


def test_attention_without_a_cache_is_refused():
    model = build_model("openai-gpt", n_embd=32, n_layer=2, n_head=4)
    with pytest.raises(
        CostError, match=r"attention\.0 of OpenAIGPTLMHeadModel are unknown, as it has no keys and values"
    ):
        CostModel(model)
