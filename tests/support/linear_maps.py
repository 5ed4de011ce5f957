"""Linear maps in place of sublayers, computed by plain hooks on the dense model: a reference without layershed."""

from contextlib import ExitStack, contextmanager

import torch
from transformers import BertConfig, BertForMaskedLM, ViTConfig, ViTForImageClassification

from layershed.stand_ins.linear_map import LinearMap
from tests.support.models import SIZES, build_model

IDS = torch.arange(3, 25).view(2, 11)

# By model type and kind: the module whose input is X, that whose input is h, and that whose output joins the stream.
PLACES = {
    "llama": {
        "attention": ("model.layers.{}.input_layernorm", "model.layers.{}.self_attn", "model.layers.{}.self_attn"),
        "mlp": ("model.layers.{}.post_attention_layernorm", "model.layers.{}.mlp", "model.layers.{}.mlp"),
    },
    "gpt2": {
        "attention": ("transformer.h.{}.ln_1", "transformer.h.{}.attn", "transformer.h.{}.attn"),
        "mlp": ("transformer.h.{}.ln_2", "transformer.h.{}.mlp", "transformer.h.{}.mlp"),
    },
    "opt": {
        "attention": (
            "model.decoder.layers.{}.self_attn_layer_norm",
            "model.decoder.layers.{}.self_attn",
            "model.decoder.layers.{}.self_attn",
        ),
        "mlp": (
            "model.decoder.layers.{}.final_layer_norm",
            "model.decoder.layers.{}.fc1",
            "model.decoder.layers.{}.fc2",
        ),
    },
    "gemma3_text": {
        "attention": (
            "model.layers.{}.input_layernorm",
            "model.layers.{}.self_attn",
            "model.layers.{}.post_attention_layernorm",
        ),
        "mlp": (
            "model.layers.{}.pre_feedforward_layernorm",
            "model.layers.{}.mlp",
            "model.layers.{}.post_feedforward_layernorm",
        ),
    },
    "olmo2": {
        "attention": (
            "model.layers.{}.self_attn",
            "model.layers.{}.self_attn",
            "model.layers.{}.post_attention_layernorm",
        ),
        "mlp": ("model.layers.{}.mlp", "model.layers.{}.mlp", "model.layers.{}.post_feedforward_layernorm"),
    },
    "phi": {
        "attention": ("model.layers.{}.input_layernorm", "model.layers.{}.self_attn", "model.layers.{}.self_attn"),
        "mlp": ("model.layers.{}.input_layernorm", "model.layers.{}.mlp", "model.layers.{}.mlp"),
    },
    "bert": {
        "attention": (
            "bert.encoder.layer.{}.attention.self",
            "bert.encoder.layer.{}.attention.self",
            "bert.encoder.layer.{}.attention.output.dense",
        ),
        "mlp": (
            "bert.encoder.layer.{}.intermediate",
            "bert.encoder.layer.{}.intermediate",
            "bert.encoder.layer.{}.output.dense",
        ),
    },
    "vit": {
        "attention": ("vit.layers.{}.layernorm_before", "vit.layers.{}.attention", "vit.layers.{}.attention"),
        "mlp": ("vit.layers.{}.layernorm_after", "vit.layers.{}.mlp", "vit.layers.{}.mlp"),
    },
}


def model_and_inputs(model_type):
    """A tiny model of a type in PLACES, and inputs for it."""
    if model_type == "bert":
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        torch.manual_seed(0)
        return BertForMaskedLM(BertConfig(**{name: SIZES[name] for name in names})).eval(), {"input_ids": IDS}
    if model_type == "vit":
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=32,
            patch_size=16,
        )
        return ViTForImageClassification(config).eval(), {"pixel_values": torch.randn(2, 3, 32, 32)}
    return build_model(model_type), {"input_ids": IDS}


def random_maps(sublayers, width, rank=None, dtype=torch.float32):
    """A map of standard-normal size for each sublayer."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) / shape[-1] ** 0.5

    if rank is None:
        return {s: LinearMap.of(normal(width, width), normal(width)) for s in sublayers}
    return {s: LinearMap.of_factors(normal(width, rank), normal(rank, width), normal(width)) for s in sublayers}


def places_of(model, model_type, sublayer):
    """The modules of PLACES for one sublayer."""
    return [model.get_submodule(path.format(sublayer.block)) for path in PLACES[model_type][sublayer.kind]]


def plain(linear_map, h):
    """The formula of a map, from its parameters alone."""
    weight = linear_map.up.weight if linear_map.down is None else linear_map.up.weight @ linear_map.down.weight
    return h @ weight.T + linear_map.up.bias


@contextmanager
def hooked(model, model_type, maps):
    """Within the context the maps run, put there by hooks on the dense model."""
    with ExitStack() as hooks:
        for sublayer, linear_map in maps.items():
            _, read, write = places_of(model, model_type, sublayer)
            seen = {}

            def note(module, args, kwargs, seen=seen):
                seen["h"] = args[0] if args else kwargs["hidden_states"]

            def put(module, args, output, seen=seen, linear_map=linear_map):
                first = plain(linear_map, seen["h"])
                if isinstance(output, tuple):
                    return (first.view(output[0].shape), *output[1:])
                return first.view(output.shape)

            hooks.callback(read.register_forward_pre_hook(note, with_kwargs=True).remove)
            hooks.callback(write.register_forward_hook(put).remove)
        yield
