"""A transformer that is not from Hugging Face, in the manner of nanoGPT."""

import torch
from torch import nn


class CausalSelfAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.c_attn(x).split(x.shape[-1], dim=-1)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    off = frozenset()

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalSelfAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def branch(self, kind, output):
        return output * 0 if kind in self.off else output

    def forward(self, x):
        x = x + self.branch("attention", self.attn(self.ln_1(x)))
        return x + self.branch("mlp", self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    def __init__(self, layers=3, width=16, heads=2):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, width), nn.Embedding(8, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.more = nn.ModuleList(Block(width, heads) for _ in range(1))
        self.head = nn.Linear(width, 11, bias=False)

    def forward(self, idx, targets=None):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in (*self.h, *self.more):
            x = block(x)
        return self.head(x), None
