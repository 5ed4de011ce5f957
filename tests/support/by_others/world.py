"""What others find: a small model, its input, a folder, and what the model computes once some sublayers are dropped.

The reference is a copy of the dense model, made before anything happened. The last linear maps of its dropped branches
are zero. In a post-norm model a dropped sublayer takes its norm along, so that norm is the identity in the reference.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedModel, set_seed

import layershed as ls
from tests.support.models import SIZES, build_model

Model = Any
"""A model, or anything else that is called like one."""

_IDS = torch.randint(3, 97, (2, 10), generator=torch.Generator().manual_seed(0))
_MASK = torch.ones_like(_IDS)


@dataclass(frozen=True)
class Architecture:
    """A small model, and what is dropped from it.

    Args:
        dropped: Block and kind of the dropped sublayers.
        last: Paths of their last linear maps.
        norms: Paths of the norms that go with them.
        options: Fields of the config.
        linear: Names of linear modules in an attention and in an MLP; peft adapts them.
        more: Inputs beside ``input_ids`` and ``attention_mask``.
    """

    dropped: tuple[tuple[int, str], ...]
    last: tuple[str, ...]
    norms: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    linear: tuple[str, ...] = ()
    more: Mapping[str, Tensor] = field(default_factory=dict)

    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with, two sequences of ten tokens."""
        return {"input_ids": _IDS, "attention_mask": _MASK, **self.more}


_SOME = ((0, "attention"), (1, "mlp"), (2, "attention"), (2, "mlp"))


def _paths(blocks: str, attention: str, mlp: str) -> tuple[str, ...]:
    return tuple(f"{blocks}.{i}.{attention if kind == 'attention' else mlp}" for i, kind in _SOME)


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        _SOME, _paths("model.layers", "self_attn.o_proj", "mlp.down_proj"), linear=("q_proj", "o_proj", "down_proj")
    ),
    "gpt2": Architecture(
        _SOME,
        _paths("transformer.h", "attn.c_proj", "mlp.c_proj"),
        options=dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        linear=("c_attn", "c_proj"),
    ),
    "opt": Architecture(
        _SOME,
        _paths("model.decoder.layers", "self_attn.out_proj", "fc2"),
        options={"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
        linear=("v_proj", "fc1", "fc2"),
    ),
    "bert": Architecture(
        _SOME,
        _paths("bert.encoder.layer", "attention.output.dense", "output.dense"),
        _paths("bert.encoder.layer", "attention.output.LayerNorm", "output.LayerNorm"),
        options={"is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        linear=("query", "dense"),
    ),
    "mixtral": Architecture(
        _SOME,
        _paths("model.layers", "self_attn.o_proj", "mlp.experts"),
        options={"num_local_experts": 4, "num_experts_per_tok": 2},
        linear=("q_proj", "o_proj"),
    ),
    # three blocks of an encoder, then three of a decoder
    "bart": Architecture(
        ((0, "attention"), (1, "mlp"), (3, "attention"), (4, "cross_attention"), (5, "mlp")),
        (
            "model.encoder.layers.0.self_attn.out_proj",
            "model.encoder.layers.1.fc2",
            "model.decoder.layers.0.self_attn.out_proj",
            "model.decoder.layers.1.encoder_attn.out_proj",
            "model.decoder.layers.2.fc2",
        ),
        (
            "model.encoder.layers.0.self_attn_layer_norm",
            "model.encoder.layers.1.final_layer_norm",
            "model.decoder.layers.0.self_attn_layer_norm",
            "model.decoder.layers.1.encoder_attn_layer_norm",
            "model.decoder.layers.2.final_layer_norm",
        ),
        linear=("q_proj", "fc1", "fc2"),
        more={"decoder_input_ids": _IDS.flip(0)[:, :7].contiguous()},
    ),
}


@dataclass
class World:
    """What an action finds.

    Args:
        name: Name of the architecture.
        model: The model.
        folder: An empty folder.
        silent: Whether the model is the reference, and zero by now.
        told: What the action was told by return values that a user reads, such as unexpected keys.
    """

    name: str
    model: Model
    folder: Path
    silent: bool = False
    told: list[str] = field(default_factory=list)

    @property
    def architecture(self) -> Architecture:
        """Of the model."""
        return ARCHITECTURES[self.name]

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with."""
        return self.architecture.inputs()

    @property
    def batch(self) -> dict[str, Tensor]:
        """Inputs with labels."""
        return {**self.inputs, "labels": self.inputs.get("decoder_input_ids", _IDS)}

    def fresh(self) -> PreTrainedModel:
        """Another dense model of the same class with other weights, as a user builds it to load weights into."""
        other = dense_model(self.name)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(0.5)
        if self.silent:
            silence(other, self.architecture)
        return other

    def stir(self, model: nn.Module, of: str) -> None:
        """Give trained values to parameters whose name contains ``of``: the same in the model and its reference."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if of in name:
                    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        if self.silent:
            silence(model, self.architecture)


def dense_model(name: str) -> PreTrainedModel:
    """The dense model of an architecture, in eval mode; the same at each call."""
    if name != "bart":
        return build_model(name, **ARCHITECTURES[name].options)
    model = copy.deepcopy(_bart())
    set_seed(0)
    return model


@cache
def _bart() -> PreTrainedModel:
    set_seed(0)
    sizes = {"d_model": 32, "decoder_start_token_id": 2, "dropout": 0.0}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 3, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 48}
    common = ("vocab_size", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
    config = BartConfig(**sizes, **{name: SIZES[name] for name in common}, forced_eos_token_id=None)
    model = BartForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def make_reference(model: nn.Module, architecture: Architecture) -> None:
    """Make a dense model one whose dropped branches contribute exactly zero."""
    for path in [name for name, _ in model.named_modules()]:
        if any(f".{path}".endswith(f".{norm}") for norm in architecture.norms):
            model.set_submodule(path, nn.Identity())
    silence(model, architecture)


def silence(model: nn.Module, architecture: Architecture) -> None:
    """Make the last linear maps of dropped branches zero and keep them so, with adapters and wrappers around them."""
    for name, parameter in model.named_parameters():
        if any(f".{path}." in f".{name}" for path in architecture.last):
            parameter.data.zero_()
            parameter.requires_grad_(False)


def wanted(name: str, model: nn.Module) -> list[ls.Sublayer]:
    """Those sublayers of a model that are dropped, of those that layershed finds."""
    return [s for s in ls.find_sublayers(model) if (s.block, s.kind) in ARCHITECTURES[name].dropped]


def logits(model: Callable[..., Any], inputs: Mapping[str, Tensor]) -> Tensor:
    """The logits, in float32."""
    with torch.no_grad():
        output = model(**inputs)
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None:
        found = output["logits"] if isinstance(output, Mapping) and "logits" in output else output[0]
    return found.detach().float().cpu()[..., : SIZES["vocab_size"]]  # without what a resized embedding adds
