"""In the manner of a ViT notebook: pictures and labels in tuples, one common step."""

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from tests.support.projects.project import Project, items, louder


def project(pl):
    class ViTLightningModule(pl.LightningModule):
        def __init__(self, num_labels=3):
            super().__init__()
            config = ViTConfig(
                hidden_size=32,
                num_hidden_layers=4,
                num_attention_heads=4,
                intermediate_size=48,
                image_size=16,
                patch_size=4,
                num_labels=num_labels,
            )
            self.vit = louder(ViTForImageClassification(config))

        def forward(self, pixel_values):
            return self.vit(pixel_values=pixel_values).logits

        def common_step(self, batch, batch_idx):
            pixel_values, labels = batch
            logits = self(pixel_values)
            loss = nn.CrossEntropyLoss()(logits, labels)
            return loss, (logits.argmax(-1) == labels).sum().item() / pixel_values.shape[0]

        def training_step(self, batch, batch_idx):
            loss, accuracy = self.common_step(batch, batch_idx)
            self.log("training_loss", loss)
            self.log("training_accuracy", accuracy)
            return loss

        def validation_step(self, batch, batch_idx):
            loss, accuracy = self.common_step(batch, batch_idx)
            self.log("validation_loss", loss, on_epoch=True)
            self.log("validation_accuracy", accuracy, on_epoch=True)
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=5e-4)

    def picture(number):
        pixels = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(number))
        return pixels, number % 3

    def outputs(module):
        module.eval()
        with torch.no_grad():
            return module(torch.stack([picture(98)[0], picture(99)[0]]))

    return Project(
        "a ViT notebook",
        ViTLightningModule,
        lambda: items(36, picture, shuffle=True),
        lambda: items(9, lambda number: picture(500 + number)),
        outputs,
        "validation_accuracy",
    )
