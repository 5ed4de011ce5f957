"""In the manner of Lightning's GLUE example: a sequence classifier whose epoch end gathers predictions."""

import torch
from transformers import BertConfig, BertForSequenceClassification

from tests.support.projects.project import VOCABULARY, Project, ids, items, louder


def project(pl):
    class GLUETransformer(pl.LightningModule):
        def __init__(self, learning_rate=1e-3, weight_decay=0.01):
            super().__init__()
            self.save_hyperparameters()
            config = BertConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                num_hidden_layers=4,
                num_attention_heads=4,
                intermediate_size=48,
                max_position_embeddings=32,
                num_labels=2,
            )
            self.model = louder(BertForSequenceClassification(config))
            self.outputs = []

        def forward(self, **inputs):
            return self.model(**inputs)

        def training_step(self, batch, batch_idx):
            return self(**batch)[0]

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            val_loss, logits = self(**batch)[:2]
            self.outputs.append({"loss": val_loss, "preds": logits.argmax(dim=1), "labels": batch["labels"]})
            return val_loss

        def on_validation_epoch_end(self):
            preds, labels = (torch.cat([output[key] for output in self.outputs]) for key in ("preds", "labels"))
            self.log("val_loss", torch.stack([output["loss"] for output in self.outputs]).mean(), prog_bar=True)
            self.log_dict({"accuracy": (preds == labels).float().mean()}, prog_bar=True)
            self.outputs.clear()

        def configure_optimizers(self):
            plain = ("bias", "LayerNorm.weight")
            named = list(self.model.named_parameters())
            groups = [
                {"params": [p for n, p in named if not n.endswith(plain)], "weight_decay": self.hparams.weight_decay},
                {"params": [p for n, p in named if n.endswith(plain)], "weight_decay": 0.0},
            ]
            optimizer = torch.optim.AdamW(groups, lr=self.hparams.learning_rate)
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
            return [optimizer], [{"scheduler": schedule, "interval": "step", "frequency": 1}]

    def sentence(number):
        row, length = ids(1, 10, number)[0], 6 + number % 5
        mask = (torch.arange(10) < length).long()
        return {"input_ids": row * mask, "attention_mask": mask, "labels": row.sum() % 2}

    def outputs(module):
        module.eval()
        with torch.no_grad():
            return module(input_ids=ids(2, 10, 99)).logits

    return Project(
        "GLUE fine-tuning",
        GLUETransformer,
        lambda: items(36, sentence, shuffle=True),
        lambda: items(9, lambda number: sentence(100 + number)),
        outputs,
        "accuracy",
    )
