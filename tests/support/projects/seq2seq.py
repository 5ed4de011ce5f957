"""In the manner of simpleT5: an encoder-decoder whose batches have names of their own."""

import torch
from transformers import T5Config, T5ForConditionalGeneration

from tests.support.projects.project import VOCABULARY, Project, ids, items, louder


def project(pl):
    class LightningModel(pl.LightningModule):
        def __init__(self):
            super().__init__()
            config = T5Config(
                vocab_size=VOCABULARY,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=3,
                num_heads=4,
                decoder_start_token_id=0,
                dropout_rate=0.0,
            )
            self.model = louder(T5ForConditionalGeneration(config))
            self.average_training_loss = None

        def forward(self, input_ids, attention_mask, decoder_attention_mask, labels=None):
            output = self.model(
                input_ids,
                attention_mask=attention_mask,
                labels=labels,
                decoder_attention_mask=decoder_attention_mask,
            )
            return output.loss, output.logits

        def step(self, batch):
            return self(
                input_ids=batch["source_text_input_ids"],
                attention_mask=batch["source_text_attention_mask"],
                decoder_attention_mask=batch["labels_attention_mask"],
                labels=batch["labels"],
            )

        def training_step(self, batch, batch_size):
            loss, _ = self.step(batch)
            self.log("train_loss", loss, prog_bar=True, logger=True, on_epoch=True, on_step=True)
            return loss

        def validation_step(self, batch, batch_size):
            loss, logits = self.step(batch)
            self.log("val_loss", loss, prog_bar=True, logger=True, on_epoch=True, on_step=False)
            hits = (logits.argmax(-1) == batch["labels"])[batch["labels"] != -100]
            self.log("val_hits", hits.float().mean(), on_epoch=True)
            return loss

        def on_train_epoch_end(self):
            self.average_training_loss = float(self.trainer.callback_metrics["train_loss_epoch"])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def pair(number):
        source, target = ids(1, 9, number)[0], ids(1, 6, 1000 + number)[0]
        mask, target_mask = torch.arange(9) < 5 + number % 5, torch.arange(6) < 3 + number % 4
        return {
            "source_text_input_ids": source * mask,
            "source_text_attention_mask": mask.long(),
            "labels": target.masked_fill(~target_mask, -100),
            "labels_attention_mask": target_mask.long(),
        }

    def outputs(module):
        module.eval()
        with torch.no_grad():
            return module.model(input_ids=ids(2, 9, 99), decoder_input_ids=ids(2, 6, 98), use_cache=False).logits

    return Project(
        "simpleT5",
        LightningModel,
        lambda: items(36, pair, shuffle=True),
        lambda: items(9, lambda number: pair(500 + number)),
        outputs,
        "val_hits",
    )
