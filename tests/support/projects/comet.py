"""In the manner of COMET: a regression head on mixed layers of an encoder, which is frozen at first."""

import torch
from torch import nn
from torchmetrics import PearsonCorrCoef
from transformers import XLMRobertaConfig, XLMRobertaModel

from tests.support.projects.project import VOCABULARY, Project, ids, items, louder


class Encoder(nn.Module):
    """Wraps the model, as COMET's encoders do."""

    def __init__(self):
        super().__init__()
        config = XLMRobertaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=32,
            output_hidden_states=True,
        )
        self.model = louder(XLMRobertaModel(config, add_pooling_layer=False))

    def forward(self, input_ids, attention_mask):
        # without a pooler some versions return None between the two
        last, *_, states = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=False)
        return {"sentemb": last[:, 0], "wordemb": last, "all_layers": states, "attention_mask": attention_mask}


def project(pl):
    class RegressionMetric(pl.LightningModule):
        def __init__(self, nr_frozen_steps=3):
            super().__init__()
            self.encoder = Encoder()
            self.scalars = nn.Parameter(torch.zeros(5))
            self.estimator = nn.Sequential(nn.Linear(4 * 32, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 1))
            self.loss = nn.MSELoss()
            self.val_corr = PearsonCorrCoef()
            self.nr_frozen_steps, self._frozen = nr_frozen_steps, True
            self.freeze_encoder()

        def freeze_encoder(self):
            for parameter in self.encoder.parameters():
                parameter.requires_grad = False

        def unfreeze_encoder(self):
            if self._frozen:
                for parameter in self.encoder.parameters():
                    parameter.requires_grad = True
                self._frozen = False

        def get_sentence_embedding(self, input_ids, attention_mask):
            out = self.encoder(input_ids, attention_mask)
            weights = torch.softmax(self.scalars, dim=0)
            mixed = sum(weight * layer for weight, layer in zip(weights, out["all_layers"], strict=True))
            mask = attention_mask.unsqueeze(-1).float()
            return (mixed * mask).sum(1) / mask.sum(1)

        def forward(self, src, mt):
            source, target = self.get_sentence_embedding(**src), self.get_sentence_embedding(**mt)
            joined = torch.cat((source, target, source * target, (source - target).abs()), dim=1)
            return {"score": self.estimator(joined).view(-1)}

        def training_step(self, batch, batch_nb):
            inputs, target = batch
            loss = self.loss(self.forward(**inputs)["score"], target["score"])
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            if self._frozen and batch_nb >= self.nr_frozen_steps:
                self.unfreeze_encoder()
            return loss

        def validation_step(self, batch, batch_nb, dataloader_idx=0):
            inputs, target = batch
            prediction = self.forward(**inputs)["score"]
            self.log("val_loss", self.loss(prediction, target["score"]), on_step=True, on_epoch=True)
            self.val_corr.update(prediction, target["score"])

        def on_validation_epoch_end(self):
            self.log_dict({"val_pearson": self.val_corr.compute()}, prog_bar=True)
            self.val_corr.reset()

        def configure_optimizers(self):
            layers = [{"params": self.encoder.parameters(), "lr": 1e-4}]
            head = [{"params": self.estimator.parameters(), "lr": 1e-3}, {"params": [self.scalars], "lr": 1e-2}]
            return [torch.optim.AdamW(layers + head)], []

    def collate(rows):
        texts = {
            name: {
                "input_ids": torch.stack([row[name] for row in rows]),
                "attention_mask": torch.ones(len(rows), 8, dtype=torch.long),
            }
            for name in ("src", "mt")
        }
        return texts, {"score": torch.tensor([row["score"] for row in rows])}

    def segment(number):
        source, target = ids(2, 8, number)
        return {"src": source, "mt": target, "score": float(source.float().mean() / VOCABULARY)}

    def outputs(module):
        module.eval()
        texts, _ = collate([segment(900), segment(901)])
        with torch.no_grad():
            return module(**texts)["score"]

    return Project(
        "COMET",
        RegressionMetric,
        lambda: items(36, segment, collate_fn=collate, shuffle=True),
        lambda: items(9, lambda number: segment(500 + number), collate_fn=collate),
        outputs,
        "val_pearson",
    )
