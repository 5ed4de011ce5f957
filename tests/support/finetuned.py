"""A frozen transformer with a head, and what others use to unfreeze it during a run."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BaseFinetuning

from tests.support.lora_runs import dropping, recovery
from tests.support.models import build_model
from tests.support.runs import HeadLoss

# before and after the unfreezing, which comes at step 4
DROPS = {
    "drop before": lambda: [dropping(2)],
    "drop after": lambda: [dropping(6)],
    "LoRA after": lambda: [dropping(6), recovery(finish="adapter")],
    "LoRA before": lambda: [dropping(2), recovery(finish="adapter")],
}


class Backbone(HeadLoss, pl.LightningModule):
    """A frozen transformer, where BackboneFinetuning looks for it, and a head that trains."""

    def __init__(self):
        super().__init__()
        self.backbone = build_model().train()
        torch.manual_seed(3)
        self.head = torch.nn.Linear(97, 97)

    @property
    def net(self):
        return self.backbone

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.head.parameters(), lr=1e-2, weight_decay=0.1)


class Blockwise(BaseFinetuning):
    """Unfreezes two blocks at a time, into a group each."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch in (1, 2):
            blocks = pl_module.backbone.model.layers[2 * (epoch - 1) : 2 * epoch]
            self.unfreeze_and_add_param_group(blocks, optimizer, lr=1e-3)
