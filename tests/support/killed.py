"""Runs that die right after a checkpoint, and their results for comparison."""

import csv

import lightning.pytorch as pl
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from tests.support.runs import BATCH, sequences

EPOCH = 6  # batches


class Killed(Exception):
    """Stands for SIGKILL: nothing that comes later in the run happens."""


class Kill(pl.Callback):
    """Writes a checkpoint at the end of that step, flushes nothing, and dies right after it."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            for logger in trainer.loggers:
                logger.finalize = lambda status: None
            raise Killed


class Hooks(pl.Callback):
    """Notes which of the hooks at the ends of things were called, at which step and in which epoch."""

    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        self.seen.append(("validation", trainer.global_step, trainer.current_epoch))

    def on_train_epoch_end(self, trainer, pl_module):
        self.seen.append(("epoch", trainer.global_step, trainer.current_epoch))

    def on_train_end(self, trainer, pl_module):
        self.seen.append(("train", trainer.global_step, trainer.current_epoch))


def stateful(batches=EPOCH, **kwargs):
    return StatefulDataLoader(sequences(BATCH * batches), batch_size=BATCH, **kwargs)


def plain(batches=EPOCH, **kwargs):
    return DataLoader(sequences(BATCH * batches), batch_size=BATCH, **kwargs)


def rows_of(folder):
    """Everything that was logged below a folder, by step and name: one value unless runs disagree."""
    found = {}
    for path in folder.rglob("metrics.csv"):
        for row in csv.DictReader(path.read_text().splitlines()):
            for name, value in row.items():
                if value and name != "step":
                    found.setdefault((row["step"], name), set()).add(value)
    return found
