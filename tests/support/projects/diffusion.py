"""In the manner of a masked diffusion language model: a bidirectional denoiser, with averaged weights in validation."""

import torch
from torch import nn
from torchmetrics import MeanMetric, MetricCollection

from layershed import SublayerAdapter
from tests.support.projects.project import VOCABULARY, Project, ids, items, louder

WIDTH, HEADS, MASK = 32, 4, 3


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class DenoiserBlock(nn.Module):
    """Its norms are modulated by the noise level."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.attention = SelfAttention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(approximate="tanh"), nn.Linear(48, WIDTH))
        self.modulation = nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x, level):
        shift1, scale1, shift2, scale2 = self.modulation(level)[:, None].chunk(4, dim=-1)
        x = x + self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.vocab_embed, self.sigma_map = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(1, WIDTH)
        self.places = nn.Embedding(32, WIDTH)
        self.blocks = nn.ModuleList(DenoiserBlock() for _ in range(4))
        self.norm_final, self.output = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, indices, sigma):
        level = nn.functional.silu(self.sigma_map(sigma[:, None]))
        x = self.vocab_embed(indices) + self.places(torch.arange(indices.shape[1], device=indices.device))
        for block in self.blocks:
            x = block(x, level)
        return self.output(self.norm_final(x))


class Average:
    """An exponential moving average of parameters, as a plain list beside the model."""

    def __init__(self, parameters, decay=0.9):
        self.decay, self.shadow, self.stored = decay, [p.detach().clone() for p in parameters], []

    def update(self, parameters):
        for shadow, parameter in zip(self.shadow, parameters, strict=True):
            shadow.lerp_(parameter.detach(), 1 - self.decay)

    def exchange(self, parameters):
        self.stored = [parameter.detach().clone() for parameter in parameters]
        for shadow, parameter in zip(self.shadow, parameters, strict=True):
            parameter.data.copy_(shadow)

    def restore(self, parameters):
        for stored, parameter in zip(self.stored, parameters, strict=True):
            parameter.data.copy_(stored)


def project(pl):
    class Diffusion(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = louder(Denoiser())
            self.own = list(self.backbone.parameters())
            self.ema = Average(self.own)
            self.valid_metrics = MetricCollection({"nll": MeanMetric(), "hits": MeanMetric()}, prefix="val/")

        def forward(self, x, sigma):
            return self.backbone(x, sigma)

        def q_xt(self, x, move_chance):
            return torch.where(torch.rand(x.shape, device=x.device) < move_chance[:, None], MASK, x)

        def _loss(self, x0):
            t = torch.rand(x0.shape[0], device=x0.device).clamp(min=0.1)
            xt = self.q_xt(x0, t)
            logits = self(xt, t)
            nll = nn.functional.cross_entropy(logits.transpose(1, 2), x0, reduction="none") * (xt == MASK)
            return (nll / t[:, None]).mean(), (logits.argmax(-1) == x0).float().mean()

        def training_step(self, batch, batch_idx):
            loss, _ = self._loss(batch["input_ids"])
            self.log("trainer/loss", loss, on_step=True, on_epoch=False, sync_dist=True)
            return loss

        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            self.ema.update(self.own)

        def on_validation_epoch_start(self):
            self.ema.exchange(self.own)
            self.valid_metrics.reset()

        def validation_step(self, batch, batch_idx):
            loss, hits = self._loss(batch["input_ids"])
            self.valid_metrics["nll"].update(loss)
            self.valid_metrics["hits"].update(hits)
            self.log_dict(self.valid_metrics, on_step=False, on_epoch=True, sync_dist=True)
            return loss

        def on_validation_epoch_end(self):
            self.ema.restore(self.own)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.backbone.parameters(), lr=1e-3)

    def row(number):
        return {"input_ids": ids(1, 12, number)[0], "attention_mask": torch.ones(12, dtype=torch.long)}

    def outputs(module):
        module.eval()
        with torch.no_grad():
            return module(ids(2, 12, 99), torch.tensor([0.2, 0.8]))

    inputs = SublayerAdapter(lambda model: {"indices": torch.arange(4, 8)[None], "sigma": torch.tensor([0.5])})
    return Project(
        "a masked diffusion language model",
        Diffusion,
        lambda: items(36, row, shuffle=True),
        lambda: items(9, lambda number: row(500 + number)),
        outputs,
        "val/hits",
        (Denoiser, inputs),
    )
