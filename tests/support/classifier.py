"""A classifier with a validation of its own, its quality computed by hand, and a callback that asks for it."""

import lightning.pytorch as pl
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy
from transformers import BertConfig, BertForSequenceClassification, set_seed

from layershed.integration.own_validation import own_quality

BATCH, LABELS = 3, 4


def sentences(count, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (count, 9), generator=generator)
    return DataLoader([{"input_ids": row, "labels": row.sum() % LABELS} for row in ids], batch_size=BATCH)


def bert():
    set_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    config = BertConfig(vocab_size=97, **sizes, num_labels=LABELS, max_position_embeddings=16)
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


class Classifier(pl.LightningModule):
    """Logs a metric that keeps state, gathers outputs by hand, and draws random numbers in validation."""

    def __init__(self):
        super().__init__()
        self.net, self.val_acc, self.train_acc = bert(), MulticlassAccuracy(LABELS), MulticlassAccuracy(LABELS)
        self.gathered, self.best, self.validated = [], 0.0, 0

    def training_step(self, batch, batch_idx):
        output = self.net(**batch)
        self.train_acc.update(output.logits, batch["labels"])
        return output.loss

    def validation_step(self, batch, batch_idx):
        output = self.net(**batch)
        self.val_acc.update(output.logits, batch["labels"])
        self.log("val_acc", self.val_acc)
        self.log("val_loss", output.loss)
        self.log("val_noise", torch.rand(()))
        self.gathered.append(output.logits)
        return output.loss

    def on_validation_epoch_end(self):
        self.log("val_rows", float(sum(map(len, self.gathered))))
        self.best, self.gathered = max(self.best, float(self.val_acc.compute())), []
        self.validated += 1

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def by_hand(net, batches, count):
    """Mean loss and accuracy over rows."""
    net.eval()
    with torch.no_grad():
        logits = torch.cat([net(input_ids=batch["input_ids"]).logits for batch in batches[:count]])
    labels = torch.cat([batch["labels"] for batch in batches[:count]])
    per_class = [(logits.argmax(-1) == labels)[labels == label].double().mean() for label in labels.unique()]
    return cross_entropy(logits.double(), labels).item(), torch.stack(per_class).mean().item()


class Ask(pl.Callback):
    """Measures in the middle of an epoch."""

    def __init__(self, metric, at=2, batches=3):
        self.metric, self.at, self.batches, self.found = metric, at, batches, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.at:
            with torch.random.fork_rng(devices=[]):  # a loader draws a seed
                several = isinstance(trainer.val_dataloaders, list)
                batches = list(trainer.val_dataloaders[0] if several else trainer.val_dataloaders)
            self.expected = by_hand(pl_module.net, batches, self.batches)
            pl_module.train()
            self.found = [own_quality(trainer, pl_module, batches, self.batches, self.metric) for _ in range(2)]


def fit(make_trainer, *callbacks, module=None, **options):
    module = module or Classifier()
    trainer = make_trainer(*callbacks, **{"max_steps": 6, "val_check_interval": 1, **options})
    torch.manual_seed(3)
    trainer.fit(module, sentences(18, 0), sentences(10, 1))  # the last batch of validation has one row
    return module, trainer
