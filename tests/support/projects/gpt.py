"""In the manner of litgpt: a GPT written by hand, with rotary positions, and a module around it."""

import torch
from torch import nn

from layershed import SublayerAdapter
from tests.support.projects.project import VOCABULARY, Project, ids, items, louder

WIDTH, HEADS, PLACES = 32, 4, 24


class RMSNorm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class LLaMAMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc_1, self.fc_2 = nn.Linear(WIDTH, 48, bias=False), nn.Linear(WIDTH, 48, bias=False)
        self.proj = nn.Linear(48, WIDTH, bias=False)

    def forward(self, x):
        return self.proj(nn.functional.silu(self.fc_1(x)) * self.fc_2(x))


class CausalSelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x, cos, sin):
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = RMSNorm(WIDTH), RMSNorm(WIDTH)
        self.attn, self.mlp = CausalSelfAttention(), LLaMAMLP()

    def forward(self, x, cos, sin):
        x = self.attn(self.norm_1(x), cos, sin) + x
        return self.mlp(self.norm_2(x)) + x


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCABULARY, WIDTH),
                "h": nn.ModuleList(Block() for _ in range(4)),
                "ln_f": RMSNorm(WIDTH),
            }
        )
        angles = torch.outer(torch.arange(PLACES), 1.0 / 1e4 ** (torch.arange(0, 8, 2) / 8)).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, idx):
        tokens = idx.size(1)
        if tokens > PLACES:
            raise ValueError(f"Cannot forward sequence of length {tokens}, max seq length is only {PLACES}.")
        x = self.transformer.wte(idx)
        for block in self.transformer.h:
            x = block(x, self.cos[:tokens], self.sin[:tokens])
        return self.lm_head(self.transformer.ln_f(x))


def rotate(x, cos, sin):
    half = x.size(-1) // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def chunked_cross_entropy(logits, targets, chunk_size=16):
    chunks = zip(logits.flatten(0, 1).split(chunk_size), targets.flatten().split(chunk_size), strict=True)
    losses = [nn.functional.cross_entropy(part, own, ignore_index=-100, reduction="none") for part, own in chunks]
    return torch.cat(losses).mean()


def project(pl):
    class LitLLM(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = louder(GPT())

        def training_step(self, batch):
            logits = self.model(batch["input_ids"])
            loss = chunked_cross_entropy(logits[..., :-1, :], batch["labels"][..., 1:])
            self.log("train_loss", loss, prog_bar=True)
            return loss

        def validation_step(self, batch):
            logits = self.model(batch["input_ids"])
            targets = batch["labels"][..., 1:]
            self.log("val_loss", chunked_cross_entropy(logits[..., :-1, :], targets), prog_bar=True)
            self.log("val_hits", (logits[..., :-1, :].argmax(-1) == targets).float().mean())

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, weight_decay=0.0, betas=(0.9, 0.95))
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def row(number):
        tokens = ids(1, 14, number)[0]
        return {"input_ids": tokens, "labels": tokens}

    def outputs(module):
        module.eval()
        with torch.no_grad():
            return module.model(ids(2, 14, 99))

    return Project(
        "litgpt's GPT",
        LitLLM,
        lambda: items(36, row, shuffle=True),
        lambda: items(9, lambda number: row(500 + number)),
        outputs,
        "val_hits",
        (GPT, SublayerAdapter(lambda model: {"idx": torch.arange(4)[None]})),
    )
