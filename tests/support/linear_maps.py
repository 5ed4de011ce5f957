"""Linear maps in place of sublayers, computed by plain hooks on the dense model: a reference without layershed."""

from contextlib import ExitStack, contextmanager

import torch

from layershed.stand_ins.linear_map import LinearMap

# By model type and kind: the module whose input is h, and the module whose output joins the stream.
PLACES = {
    "llama": {
        "attention": ("model.layers.{}.self_attn", "model.layers.{}.self_attn"),
        "mlp": ("model.layers.{}.mlp", "model.layers.{}.mlp"),
    },
    "gpt2": {
        "attention": ("transformer.h.{}.attn", "transformer.h.{}.attn"),
        "mlp": ("transformer.h.{}.mlp", "transformer.h.{}.mlp"),
    },
    "opt": {
        "attention": ("model.decoder.layers.{}.self_attn", "model.decoder.layers.{}.self_attn"),
        "mlp": ("model.decoder.layers.{}.fc1", "model.decoder.layers.{}.fc2"),
    },
    "gemma3_text": {
        "attention": ("model.layers.{}.self_attn", "model.layers.{}.post_attention_layernorm"),
        "mlp": ("model.layers.{}.mlp", "model.layers.{}.post_feedforward_layernorm"),
    },
    "olmo2": {
        "attention": ("model.layers.{}.self_attn", "model.layers.{}.post_attention_layernorm"),
        "mlp": ("model.layers.{}.mlp", "model.layers.{}.post_feedforward_layernorm"),
    },
    "phi": {
        "attention": ("model.layers.{}.self_attn", "model.layers.{}.self_attn"),
        "mlp": ("model.layers.{}.mlp", "model.layers.{}.mlp"),
    },
    "bert": {
        "attention": ("bert.encoder.layer.{}.attention.self", "bert.encoder.layer.{}.attention.output.dense"),
        "mlp": ("bert.encoder.layer.{}.intermediate", "bert.encoder.layer.{}.output.dense"),
    },
    "vit": {
        "attention": ("vit.layers.{}.attention", "vit.layers.{}.attention"),
        "mlp": ("vit.layers.{}.mlp", "vit.layers.{}.mlp"),
    },
}


def random_maps(sublayers, width, rank=None, dtype=torch.float32):
    """A map of standard-normal size for each sublayer."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) / shape[-1] ** 0.5

    if rank is None:
        return {s: LinearMap.of(normal(width, width), normal(width)) for s in sublayers}
    return {s: LinearMap.of_factors(normal(width, rank), normal(rank, width), normal(width)) for s in sublayers}


def plain(linear_map, h):
    """The formula of a map, from its parameters alone."""
    weight = linear_map.up.weight if linear_map.down is None else linear_map.up.weight @ linear_map.down.weight
    return h @ weight.T + linear_map.up.bias


@contextmanager
def hooked(model, model_type, maps):
    """Within the context the maps run, put there by hooks on the dense model."""
    with ExitStack() as hooks:
        for sublayer, linear_map in maps.items():
            read, write = (model.get_submodule(p.format(sublayer.block)) for p in PLACES[model_type][sublayer.kind])
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
