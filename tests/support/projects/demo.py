"""In the manner of Lightning's demo Transformer: torch's own nn.Transformer between an embedding and a decoder."""

import math

import torch
from torch import nn

from layershed import SublayerAdapter
from tests.support.projects.project import VOCABULARY, Project, ids, items, louder


class PositionalEncoding(nn.Module):
    def __init__(self, dim, max_len=64):
        super().__init__()
        self.dropout, self.dim, self.max_len = nn.Dropout(p=0.1), dim, max_len
        self.pe = None

    def forward(self, x):
        if self.pe is None:
            self.pe = self._init_pos_encoding(x.device)
        return self.dropout(x + self.pe[: x.size(1)])

    def _init_pos_encoding(self, device):
        pe = torch.zeros(self.max_len, self.dim, device=device)
        position = torch.arange(0, self.max_len, dtype=torch.float, device=device).unsqueeze(1)
        div_term = torch.exp(torch.arange(0, self.dim, 2, device=device).float() * (-math.log(10000.0) / self.dim))
        pe[:, 0::2], pe[:, 1::2] = torch.sin(position * div_term), torch.cos(position * div_term)
        return pe


class Transformer(nn.Module):
    def __init__(self, ninp=32, nhead=4, nhid=48, nlayers=3):
        super().__init__()
        self.pos_encoder, self.embedding = PositionalEncoding(ninp), nn.Embedding(VOCABULARY, ninp)
        self.transformer = nn.Transformer(
            d_model=ninp,
            nhead=nhead,
            num_encoder_layers=nlayers,
            num_decoder_layers=nlayers,
            dim_feedforward=nhid,
            batch_first=True,
        )
        self.decoder, self.ninp, self.src_mask = nn.Linear(ninp, VOCABULARY), ninp, None

    def forward(self, inputs, target, mask=None):
        if mask is None:
            mask = torch.tril(torch.ones(inputs.shape[1], inputs.shape[1])) == 1
            mask = mask.float().masked_fill(mask == 0, float("-inf")).masked_fill(mask == 1, 0.0)
        src = self.pos_encoder(self.embedding(inputs) * math.sqrt(self.ninp))
        target = self.pos_encoder(self.embedding(target) * math.sqrt(self.ninp))
        output = self.decoder(self.transformer(src, target, tgt_mask=mask))
        return nn.functional.log_softmax(output, dim=-1).view(-1, VOCABULARY)


def project(pl):
    class LightningTransformer(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = louder(Transformer())

        def forward(self, inputs, target):
            return self.model(inputs, target)

        def step(self, batch):
            inputs, target = batch
            output = self(inputs, target)
            return torch.nn.functional.nll_loss(output, target.view(-1)), output

        def training_step(self, batch, batch_idx):
            return self.step(batch)[0]

        def validation_step(self, batch, batch_idx):
            loss, output = self.step(batch)
            self.log("val_loss", loss)
            self.log("val_hits", (output.argmax(-1) == batch[1].view(-1)).float().mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.model.parameters(), lr=0.1)

    def pair(number):
        tokens = ids(1, 11, number)[0]
        return tokens[:-1], tokens[1:]

    def outputs(module):
        module.eval()
        with torch.no_grad():
            return module(ids(2, 10, 98), ids(2, 10, 99))

    inputs = SublayerAdapter(lambda model: {"inputs": torch.arange(4)[None], "target": torch.arange(1, 5)[None]})
    return Project(
        "Lightning's demo Transformer",
        LightningTransformer,
        lambda: items(36, pair, shuffle=True),
        lambda: items(9, lambda number: pair(500 + number)),
        outputs,
        "val_hits",
        (Transformer, inputs),
    )
