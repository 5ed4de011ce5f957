"""Tiny models built from configs."""

import copy
import json
from functools import cache

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed
from transformers.models.auto.configuration_auto import AutoConfig

from layershed.discovery.find import find_sublayers
from layershed.planning.plan import Sublayer

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build_model(model_type: str = "llama", **overrides: object) -> PreTrainedModel:
    """A random model whose branches are large enough to matter, in eval mode; torch's seed is 0 afterwards."""
    model = copy.deepcopy(_built(model_type, json.dumps(overrides)))
    set_seed(0)
    return model


@cache
def _built(model_type: str, overrides: str) -> PreTrainedModel:
    set_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **json.loads(overrides)})
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def hooks_of(model: nn.Module) -> list[list[object]]:
    """By module, its forward hooks."""
    return [[*m._forward_hooks.values(), *m._forward_pre_hooks.values()] for m in model.modules()]


def some(model: PreTrainedModel) -> list[Sublayer]:
    """Block 0's attention, an MLP, and a whole block."""
    found = find_sublayers(model)
    return [s for s in found if (s.block, s.kind) in {(0, "attention"), (1, "mlp"), (2, "attention"), (2, "mlp")}]
