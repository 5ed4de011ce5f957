"""In the manner of a Whisper fine-tuner: the encoder without gradients, then the decoder by hand."""

import torch
from torch import nn
from transformers import WhisperConfig, WhisperForConditionalGeneration

from tests.support.projects.project import VOCABULARY, Project, ids, items, louder


def project(pl):
    class WhisperModelModule(pl.LightningModule):
        def __init__(self):
            super().__init__()
            config = WhisperConfig(
                vocab_size=VOCABULARY,
                d_model=32,
                encoder_layers=3,
                decoder_layers=3,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                num_mel_bins=8,
                max_source_positions=20,
                max_target_positions=24,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            )
            self.model = louder(WhisperForConditionalGeneration(config))
            for parameter in self.model.model.encoder.parameters():
                parameter.requires_grad = False
            self.loss_fn = nn.CrossEntropyLoss(ignore_index=-100)

        def forward(self, mel, dec_input_ids):
            with torch.no_grad():
                audio_features = self.model.model.encoder(mel)[0]
            states = self.model.model.decoder(input_ids=dec_input_ids, encoder_hidden_states=audio_features)[0]
            return self.model.proj_out(states)

        def training_step(self, batch, batch_id):
            out = self(batch["mel"], batch["dec_input_ids"])
            loss = self.loss_fn(out.view(-1, out.size(-1)), batch["labels"].view(-1))
            self.log("train/loss", loss, on_step=True, prog_bar=True, logger=True)
            return loss

        def validation_step(self, batch, batch_id):
            out = self(batch["mel"], batch["dec_input_ids"])
            loss = self.loss_fn(out.view(-1, out.size(-1)), batch["labels"].view(-1))
            hits = (out.argmax(-1) == batch["labels"]).float().mean()
            self.log("val/loss", loss, on_step=False, prog_bar=True, logger=True)
            self.log("val/hits", hits, on_step=False, prog_bar=True, logger=True)
            return {"hits": hits, "loss": loss}

        def configure_optimizers(self):
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            groups = [
                {"params": [p for n, p in named if not n.endswith("bias")], "weight_decay": 0.01},
                {"params": [p for n, p in named if n.endswith("bias")], "weight_decay": 0.0},
            ]
            self.optimizer = torch.optim.AdamW(groups, lr=1e-3, eps=1e-8)
            self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, 0.1, total_iters=2)
            return [self.optimizer], [{"scheduler": self.scheduler, "interval": "step", "frequency": 1}]

    def clip(number):
        mel = torch.randn(8, 40, generator=torch.Generator().manual_seed(number))
        tokens = ids(1, 7, number)[0]
        return {"mel": mel, "dec_input_ids": tokens[:-1], "labels": tokens[1:]}

    def outputs(module):
        module.eval()
        clips = [clip(98), clip(99)]
        with torch.no_grad():
            return module(*(torch.stack([each[key] for each in clips]) for key in ("mel", "dec_input_ids")))

    return Project(
        "a Whisper fine-tuner",
        WhisperModelModule,
        lambda: items(36, clip, shuffle=True),
        lambda: items(9, lambda number: clip(500 + number)),
        outputs,
        "val/hits",
    )
