"""Does a dropped model run as fast as one that never had those sublayers?

The network without them is built by hand, of the same weights, for the shape of SmolLM2-135M: the blocks without
attention are ``x + mlp(norm(x))`` and nothing else, and the attentions that are left fill the first slots of the KV
cache. Its logits must equal the dropped model's, bit for bit. Both alternate in one process, A B A B; the ratio of
their speeds is the median over the pairs with its 95 % bootstrap interval. 1 means that the bypass costs nothing.

    python benchmarks/bypass_cost.py
"""

import argparse
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import layershed as ls

SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


class MLPBlock(nn.Module):
    """A block that has no attention."""

    def __init__(self, norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = norm, mlp

    def forward(self, hidden_states: Tensor, **_: object) -> Tensor:
        """X + MLP(norm(X))."""
        branch: Tensor = self.mlp(self.norm(hidden_states))
        return hidden_states + branch


def without_attentions(model: LlamaForCausalLM, blocks: Iterable[int]) -> LlamaForCausalLM:
    """The same network without the attention of these blocks, of the same weights."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copy = deepcopy(model, shared)
    layers: Any = copy.model.layers
    for block in blocks:
        layers[block] = MLPBlock(layers[block].post_attention_layernorm, layers[block].mlp)
    attentions = [layer.self_attn for layer in layers if not isinstance(layer, MLPBlock)]
    for slot, attention in enumerate(attentions):
        attention.layer_idx = slot
    return copy


def compare(model: LlamaForCausalLM, count: int, settings: dict[str, Any]) -> None:
    """Print the ratios with so many attentions gone."""
    blocks = range(29 - count, 29)
    attentions = [s for s in ls.find_sublayers(model) if s.kind == "attention" and s.block in blocks]
    by_hand = without_attentions(model, blocks)
    ls.bypass(model, attentions)
    tokens = torch.randint(SHAPE["vocab_size"], (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, by_hand(tokens).logits), "not the same network"
    report = ls.measure_speed(model, base=by_hand, **settings)
    dense = ls.measure_speed(model, **settings)
    ls.restore(model)
    for name in ("prefill", "decode"):
        ratio, speedup = getattr(report, name).speedup, getattr(dense, name).speedup
        print(
            f"{count} of 30 attentions gone, {name}: dropped over by hand {ratio.median:.3f} [{ratio.low:.3f}, "
            f"{ratio.high:.3f}]; over dense {speedup.median:.3f} [{speedup.low:.3f}, {speedup.high:.3f}]"
        )


def main() -> None:
    """Compare with 8 and with 15 of 30 attentions gone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=21, help="pairs (default 21)")
    parser.add_argument("--prompt_tokens", type=int, default=512, help="tokens per prompt (default 512)")
    parser.add_argument("--new_tokens", type=int, default=64, help="decoded tokens (default 64)")
    settings = vars(parser.parse_args())
    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    print(f"{settings['runs']} pairs, {torch.get_num_threads()} threads, float32, torch {torch.__version__}")
    for count in (8, 15):
        compare(model, count, settings)


if __name__ == "__main__":
    main()
