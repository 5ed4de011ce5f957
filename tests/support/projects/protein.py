"""In the manner of SaProt: ESM's body and head called by hand, with metrics per stage."""

import torch
from torchmetrics import Accuracy
from transformers import EsmConfig, EsmForSequenceClassification

from tests.support.projects.project import VOCABULARY, Project, ids, items, louder


def project(pl):
    class SaprotClassificationModel(pl.LightningModule):
        def __init__(self):
            super().__init__()
            config = EsmConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                num_hidden_layers=4,
                num_attention_heads=4,
                intermediate_size=48,
                max_position_embeddings=40,
                position_embedding_type="rotary",
                token_dropout=True,
                mask_token_id=3,
                pad_token_id=1,
                num_labels=3,
            )
            self.model = louder(EsmForSequenceClassification(config))
            self.metrics = {stage: self.initialize_metrics(stage) for stage in ("train", "valid")}
            for stage in self.metrics.values():
                for name, metric in stage.items():
                    setattr(self, name, metric)
            self.best_value, self.valid_losses = None, []

        def initialize_metrics(self, stage):
            return {f"{stage}_acc": Accuracy(task="multiclass", num_classes=3)}

        def forward(self, inputs):
            # by hand: the body, then the head
            states = self.model.esm(**inputs)[0]
            return self.model.classifier(states)

        def loss_func(self, stage, logits, labels):
            loss = torch.nn.functional.cross_entropy(logits, labels["labels"])
            for metric in self.metrics[stage].values():
                metric.update(logits.detach(), labels["labels"])
            if stage == "train":
                self.log("train_loss", loss)
                for metric in self.metrics["train"].values():
                    metric.reset()
            else:
                self.valid_losses.append(loss)
            return loss

        def training_step(self, batch, batch_idx):
            inputs, labels = batch
            return self.loss_func("train", self(**inputs), labels)

        def validation_step(self, batch, batch_idx):
            inputs, labels = batch
            return self.loss_func("valid", self(**inputs), labels)

        def on_validation_epoch_end(self):
            found = {name: metric.compute() for name, metric in self.metrics["valid"].items()}
            self.log_dict({**found, "valid_loss": torch.stack(self.valid_losses).mean()})
            for metric in self.metrics["valid"].values():
                metric.reset()
            self.valid_losses = []
            self.best_value = max(self.best_value or 0.0, float(found["valid_acc"]))

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.98))
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def collate(rows):
        inputs = {"input_ids": torch.stack(rows), "attention_mask": torch.ones(len(rows), 12, dtype=torch.long)}
        return {"inputs": inputs}, {"labels": torch.stack(rows).sum(1) % 3}

    def outputs(module):
        module.eval()
        with torch.no_grad():
            return module({"input_ids": ids(2, 12, 99), "attention_mask": torch.ones(2, 12, dtype=torch.long)})

    return Project(
        "SaProt with ESM",
        SaprotClassificationModel,
        lambda: items(36, lambda number: ids(1, 12, number)[0], collate_fn=collate, shuffle=True),
        lambda: items(9, lambda number: ids(1, 12, 500 + number)[0], collate_fn=collate),
        outputs,
        "valid_acc",
    )
