"""Every causal architecture of transformers as a tiny, randomly initialised model. No hub, no network.

A tiny model is its family's real code on a shrunken config: a few blocks of width 64, with at least one block of
every kind that the family mixes (full and sliding attention, Mamba and attention, dense and sparse).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from layershed.spellings import PreTrainedConfig

VOCABULARY = 128


class BuildError(Exception):
    """A model type that cannot be built tiny."""


# What cannot be built at all, and why.
_ASSISTANT = "all its blocks reuse another model's keys and values, which transformers 5.23 refuses to build"
UNBUILDABLE: dict[str, str] = {
    "gemma3n": "its vision tower needs the package timm",
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
}

# Names under which configs ask for the number of blocks, and for one entry per block.
_DEPTHS = {"num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"}
_DEPTHS |= {"num_decoder_layers", "num_encoder_layers", "num_blocks", "max_window_layers"}
_PATTERNS = {"layer_types", "mlp_layer_types", "layers_block_type", "block_types", "attn_layers", "indexer_types"}

# Sizes by field name. The sizes of one model differ from each other where they may, so that no test confuses them.
_GROUPS: dict[Any, str] = {
    64: "hidden_size d_model n_embd emb_dim embedding_dim word_embed_proj_dim output_embedding_size lru_width "
    "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions context_length "
    "hidden_size_global pronunciation_embed_dim shape_embed_dim ext_pw_out_channel depthwise_separable_out_channel "
    "nemo_conv_channels ple_embed_dim mm_embed_dim mm_posemb_size position_embedding_size output_proj_dims",
    96: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dim_ff dff d_inner feed_forward_size "
    "ffn_hidden_size intermediate_size_mlp dense_intermediate_size mlp_dim",
    48: "embedding_size input_embedding_size moe_intermediate_size expert_ffn_hidden_size",
    80: "shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size "
    "moe_shared_expert_intermediate_size",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads num_experts num_local_experts "
    "n_routed_experts moe_num_experts sliding_window sliding_window_size window_size attention_window_size "
    "local_attention index_n_heads linear_num_value_heads linear_num_heads hc_lowrank attention_chunk_size index_topk "
    "o_groups keep_window_size",
    2: "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token "
    "moe_topk moe_top_k moe_k linear_num_key_heads num_codebooks",
    1: "n_group num_expert_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts n_groups "
    "mamba_n_groups mamba_ngroups first_k_dense_replace num_dense_layers",
    16: "head_dim d_head dim_head attention_head_size kv_channels kv_lora_rank qk_rope_head_dim qk_nope_head_dim "
    "v_head_dim swa_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim mamba_d_head "
    "mamba_headdim mamba_head_dim mamba_d_state ssm_state_size state_size",
    24: "q_lora_rank o_lora_rank",
    8: "rotary_dim mamba_n_heads n_mamba_heads mamba_num_heads mamba_dt_rank time_step_rank laurel_rank adapter_rank "
    "hidden_size_per_layer_input mamba_chunk_size chunk_size patch_size",
    32: "image_size crop_size qk_head_dim",
    0.1: "initializer_range init_std embed_init_std",
    VOCABULARY: "vocab_size decoder_vocab_size vocab_size_per_layer_input pronunciation_vocab_size shape_vocab_size",
}
_SIZES: dict[str, Any] = {name: size for size, names in _GROUPS.items() for name in names.split()}
_SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True, "add_cross_attention": False}

# What the names do not tell. A pattern (see above) is repeated to the number of blocks; "blocks" raises that number.
_SHARED = {"num_kv_shared_layers": lambda blocks: int(blocks > 2)}  # a block to share from, of either kind, comes first
_GEMMA4 = {"global_head_dim": 32} | _SHARED
_FULL_SLIDING = {"layer_types": ["full_attention", "sliding_attention"]}
_USE_SLIDING = {"use_sliding_window": True} | _FULL_SLIDING
_DENSE_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_CONV_FULL = {"layer_types": ["conv", "full_attention"]}
_LINEAR_HYBRID = {"layers_block_type": ["linear_attention", "hybrid"], "blocks": 4}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

FIXES: dict[str, dict[str, Any]] = {
    # decoding takes padding out again, so that it must be no token
    "musicgen": {"pad_token_id": VOCABULARY},
    "musicgen_melody": {"pad_token_id": VOCABULARY},
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 64, "patch_size": 4},
    "cohere2_moe": _DENSE_SPARSE,
    "cohere_compass_text": _FULL_SLIDING | {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v4": {
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"],
        "compress_rates": {"heavily_compressed_attention": 4, "compressed_sparse_attention": 2},
    },
    "dots1": _FULL_SLIDING | {"n_shared_experts": 1},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 32,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": _SHARED,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_text": _GEMMA4,
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma4_unified_text": _GEMMA4,
    "glm_moe_dsa": {"indexer_types": ["full", "shared"]},
    "gpt_neo": {"attention_types": lambda blocks: [[["global"], 1], [["local"], blocks - 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "inkling_text": _DENSE_SPARSE,
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0}
    | {"use_mamba_kernels": False},  # transformers 4.57 takes no other path on a CPU
    "laguna": _FULL_SLIDING,
    "lfm2": _CONV_FULL,
    "lfm2_moe": _CONV_FULL,
    "llama4_text": {"no_rope_layer_interval": 2, "interleave_moe_layer_step": 2},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "mellum": _FULL_SLIDING | _DENSE_SPARSE,
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]}
    | {"index_block_size": 2, "index_topk_blocks": 2}
    | _DENSE_SPARSE,
    "ministral": _FULL_SLIDING,
    "nemotron_h": {"blocks": 4},
    "qwen2": _USE_SLIDING,
    "qwen2_moe": _USE_SLIDING | {"mlp_only_layers": [0]},
    "qwen3": _USE_SLIDING,
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen3_next": {"mlp_only_layers": [0]},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1],
        "ngram_vocab_size_base": 32,
        "split_ngram_parts": 2,
    },
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4,
        "hash_seed": 0,
    },
    "smollm3": {"no_rope_layer_interval": 2} | _USE_SLIDING,
    "xlm": {"causal": True},
    "moshi": {"sliding_window": 64},  # as in its checkpoints longer than the text: beyond it caching differs upstream
    "xlnet": {"attn_type": "uni"},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": _LINEAR_HYBRID,
    "zamba2": _LINEAR_HYBRID,
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"]},
}


def causal_architectures() -> dict[str, str]:
    """Class name by model type, in alphabetical order, with one model type for each class.

    Where several share a class the last one wins, which is the plain one: ``gpt2``, ``llama``, ``qwen3_5_text``.
    """
    types = {name: model_type for model_type, name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())}
    return {model_type: name for name, model_type in sorted(types.items(), key=lambda item: item[1])}


def tiny_config(model_type: str, blocks: int = 3) -> PreTrainedConfig:
    """The config of a tiny model.

    Args:
        model_type: A key of ``causal_architectures()``.
        blocks: Number of decoder blocks. Families that need more to show every kind of block get more.

    Returns:
        A new config of the family's own class.

    Raises:
        BuildError: If there is no such model type or its config rejects the tiny sizes.
    """
    if model_type in UNBUILDABLE:
        raise BuildError(f"{model_type} cannot be built: {UNBUILDABLE[model_type]}.")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise BuildError(f"{model_type!r} is no causal model type of transformers.")
    fixes = dict(FIXES.get(model_type, {}))
    blocks = max(blocks, fixes.pop("blocks", 1))
    try:
        return _shrink(_model_class(model_type).config_class, fixes, blocks)
    except Exception as error:
        raise BuildError(f"The tiny config of {model_type} was rejected: {error}") from error


# How many sublayers of three blocks there are to find, where it is not an attention and an MLP in each; read off the
# layer types of the tiny configs. Mixers without a softmax over tokens are no attention.
_ONE_OF_THREE = """bailing_hybrid bamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe olmo_hybrid qwen3_5_moe_text
qwen3_5_text qwen3_next qwen4_exp_text recurrent_gemma"""
# all but one that makes keys, or an index of keys, that another block reads; or but one mixer of another kind
_TWO_OF_THREE = "gemma4 gemma4_text gemma4_unified gemma4_unified_text glm_moe_dsa hy_v4 lfm3 minimax"
EXPECTED: dict[str, dict[str, int]] = {
    **{model_type: {"attention": 1, "mlp": 3} for model_type in _ONE_OF_THREE.split()},
    **{model_type: {"attention": 2, "mlp": 3} for model_type in _TWO_OF_THREE.split()},
    "inkling_text": {"attention": 3},  # a short convolution after each MLP mixes tokens
    "longcat_flash": {"attention": 6, "mlp": 6},  # two of each in a block
    "nemotron_h": {"attention": 1, "mlp": 2},  # a block is one sublayer; the first of four is a Mamba
    "xmod": {"attention": 3},  # an adapter by language stands between each MLP and its norm
    "zaya": {"attention": 3},  # each router reads the one before it
}


def tiny_model(model_type: str, blocks: int = 3) -> PreTrainedModel:
    """A tiny model with random weights, equal at every call; in eval mode, in float32, on the CPU.

    Args:
        model_type: A key of ``causal_architectures()``.
        blocks: Number of decoder blocks. Families that need more to show every kind of block get more.

    Returns:
        The model. No parameter is constant: norms, biases and gates got noise, so that each of them matters.

    Raises:
        BuildError: If the config or the model cannot be built.
    """
    config = tiny_config(model_type, blocks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = _model_class(model_type)(config)
        except Exception as error:
            raise BuildError(f"The tiny {model_type} was not built: {error}") from error
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point() and (parameter == parameter.flatten()[0]).all():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    generation = model.generation_config
    if generation is not None and isinstance(model.get_input_embeddings(), nn.ModuleList):
        # as the published checkpoints of models of codebooks do
        generation.decoder_start_token_id = generation.pad_token_id
    return model.float().eval()


def _model_class(model_type: str) -> type[PreTrainedModel]:
    """The class; its own config class may be the decoder's part of the one that the model type names."""
    model_class: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    return model_class


def _shrink(config_class: type[PreTrainedConfig], fixes: Mapping[str, Any], blocks: int) -> PreTrainedConfig:
    """A config of the class with tiny sizes, and of its sub-configs too.

    Args:
        config_class: The class.
        fixes: Fields that override the sizes; a dict under the name of a sub-config is for that one.
        blocks: Number of blocks.
    """
    try:
        defaults = dict(vars(config_class()))
    except Exception:  # some defaults contradict each other; the declared ones have to do
        defaults = {}
    # configs are dataclasses from transformers 5.1 on
    declared = {f.name for f in fields(config_class)} if is_dataclass(config_class) else declared_by(config_class)
    subs = {
        name: CONFIG_MAPPING[config_class.sub_configs_defaults[name].model_type] if sub is AutoConfig else sub
        for name, sub in config_class.sub_configs.items()
    }
    sizes: dict[str, Any] = {}
    for name in declared | set(defaults):
        if name in subs:
            continue
        if name in _DEPTHS:
            sizes[name] = blocks
        elif name in _SIZES:
            sizes[name] = _SIZES[name]
        elif name in _PATTERNS and isinstance(defaults.get(name), (list, tuple)):
            sizes[name] = list(dict.fromkeys(defaults[name]))
    if "kv_lora_rank" in sizes and "num_key_value_heads" in sizes:  # multi-head latent attention groups no heads
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    sizes |= {name: fix(blocks) if callable(fix) else fix for name, fix in fixes.items() if name not in subs}
    for name in sizes.keys() & _PATTERNS:
        sizes[name] = _repeat(sizes[name], blocks, cycle=name != "mlp_layer_types")
    for name, sub_class in subs.items():
        sizes[name] = _shrink(sub_class, fixes.get(name, {}), blocks)
    return config_class(**sizes)


def declared_by(config_class: type) -> set[str]:
    """The named arguments of a config that is no dataclass."""
    return {name for name, p in signature(config_class).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}


def _repeat(kinds: list[Any], blocks: int, *, cycle: bool) -> list[Any]:
    """One kind for each block: in turns, or the last kind for all the rest."""
    return [kinds[i % len(kinds) if cycle else min(i, len(kinds) - 1)] for i in range(blocks)]
