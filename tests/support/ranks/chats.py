"""Two ranks on conversations, read at once and streamed; the stream also resumed in the middle."""

import os
import warnings

import datasets
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from layershed.callbacks import ExactResume
from layershed.training.causal_lm import CausalLM
from layershed.training.text_data import TextData
from tests.support.chats import chat_of
from tests.support.small_world import TINY

ROWS, HELD, STEPS, CUT, SIZE = 60, 6, 8, 4, 128
KINDS = {"at once": {"val_fraction": HELD / ROWS}, "streamed": {"streaming": True, "val_rows": HELD, "shuffle_rows": 9}}


class Seen(pl.Callback):
    """Keeps the batches of this rank."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append({name: tensor.clone() for name, tensor in batch.items()})


def run(folder):
    rank = os.environ["RANK"]
    source = folder / f"rows-{rank}"
    source.mkdir()
    for part in range(2):
        rows = [{"messages": chat_of(number)} for number in range(part, ROWS, 2)]
        datasets.Dataset.from_list(rows).to_parquet(source / f"{part}.parquet")
    found = {}
    for kind, options in KINDS.items():
        place = folder / kind.replace(" ", "-")
        found[kind] = {"whole": train(place, source, options, None)}
        if kind == "streamed":
            found[kind]["resumed"] = train(place / "resumed", source, options, place / f"step={CUT}.ckpt")
    torch.save(found, folder / f"{rank}.pt")


def train(place, source, options, resume):
    """Weights, validation loss, and the batches of this rank."""
    torch.manual_seed(0)
    seen, save = Seen(), ModelCheckpoint(place, filename="{step}", every_n_train_steps=CUT, save_top_k=-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            max_steps=STEPS,
            max_epochs=-1,
            check_val_every_n_epoch=None,
            val_check_interval=CUT,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[seen, ExactResume(), save],
        )
        model = CausalLM(config={**TINY, "max_position_embeddings": SIZE}, warmup_steps=2)
        data = TextData(str(source), block_size=SIZE, batch_size=2, **options)
        trainer.fit(model, data, ckpt_path=resume)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {"weights": weights, "val_loss": float(trainer.callback_metrics["val_loss"]), "batches": seen.batches}
