"""A quiet Trainer on two ranks."""

import lightning.pytorch as pl


def trainer_on_ranks(folder, callbacks, **options):
    """DDP on two CPU ranks, without loggers, checkpoints and bars; ``options`` are those of a Trainer."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    ranks = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "num_sanity_val_steps": 0}
    return pl.Trainer(default_root_dir=folder, callbacks=callbacks, **{**quiet, **ranks, **options})
