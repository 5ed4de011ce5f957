"""Tiny models with sublayers dropped and LoRA as if it had been trained, and their linear maps written down by hand."""

import torch

import layershed as ls
from tests.support.models import build_model

ARCHITECTURES = ["llama", "opt", "gpt2", "mixtral"]
# linear maps of a block: attention, then MLP; Mixtral's experts and router are none
MAPS = {
    "llama": (["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]),
    "opt": (["q_proj", "k_proj", "v_proj", "out_proj"], ["fc1", "fc2"]),
    "gpt2": (["c_attn", "c_proj"], ["c_fc", "c_proj"]),
    "mixtral": (["q_proj", "k_proj", "v_proj", "o_proj"], []),
}
WHERE = {
    "llama": ("model.layers.{}.self_attn.", "model.layers.{}.mlp."),
    "opt": ("model.decoder.layers.{}.self_attn.", "model.decoder.layers.{}."),
    "gpt2": ("transformer.h.{}.attn.", "transformer.h.{}.mlp."),
    "mixtral": ("model.layers.{}.self_attn.", "model.layers.{}.mlp."),
}


def maps(architecture, attention, mlp):
    """Paths of the linear maps in the attention and the MLP of the given blocks, written down by hand."""
    return {
        prefix.format(block) + name
        for prefix, names, blocks in zip(WHERE[architecture], MAPS[architecture], (attention, mlp), strict=True)
        for block in blocks
        for name in names
    }


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def pick(model, *wanted):
    return [s for s in ls.find_sublayers(model) if (s.block, s.kind) in wanted]


def dropped(architecture, *wanted, **overrides):
    model = build_model(architecture, **overrides)
    ls.bypass(model, pick(model, *wanted))
    return model


def learn(model, seed=0):
    """Adapters as if they had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in lora(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def lora(model):
    return [(name, p) for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name]


def values(model):
    return {name: p.detach().clone() for name, p in lora(model)}
