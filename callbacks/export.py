"""Saves the dropped model as a folder when training ends."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from layershed.discovery.find import find_transformer
from layershed.errors import ExportError
from layershed.files.atomic import refuse_source
from layershed.integration.gathered import figures_of
from layershed.integration.namespaces import Callback, LightningModule, Trainer
from layershed.integration.preflight import callbacks_of, check_order
from layershed.integration.protocols import TrainsLoRA
from layershed.integration.run import plan_of, run_directory
from layershed.integration.strategies import is_sharded
from layershed.saving.own_model import check_own_folder, check_own_savable, save_weights
from layershed.saving.pretrained import check_folder, save_pretrained
from layershed.saving.savable import check_savable


class Export(Callback):
    """Writes the kept weights, the config with its skipped sublayers, the drop plan, the tokenizer and a model card.

    Hooks: writes in ``on_fit_end`` on rank 0, to which FSDP2 sends all shards. The callbacks listed before it have
    merged the adapters or quantized the model by then. The training model keeps its dropped weights.
    Logs: nothing.
    Writes: a folder for ``layershed.load_pretrained``; without a drop, an ordinary Hugging Face folder. A model with a
    SublayerAdapter gives a folder for ``layershed.load_weights``.
    Checkpoint: nothing.

    Args:
        folder: Folder to write; a relative path starts at the run directory.
        transformer: Path of the transformer in the LightningModule; needed only if it holds several.
        standalone: Add a small modelling file, so that transformers alone loads the folder, with
            trust_remote_code=True.

    Raises:
        ExportError: Before training, if the model carries adapters of peft that the user added, or if the folder holds
            other files, or if standalone is impossible: LoRA stays in the model, or its class is not of transformers.
    """

    layershed_place = 5  # in the order drop, quantize, LoRA, export

    def __init__(self, folder: str = "pruned", transformer: str | None = None, standalone: bool = False) -> None:
        self.folder, self.transformer, self.standalone = folder, transformer, standalone

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse, before training, a model that cannot be saved, or a folder that holds other files."""
        check_order(trainer)
        directory = run_directory(trainer)
        self._check_standalone(trainer, find_transformer(pl_module, name=self.transformer))
        if not isinstance(find_transformer(pl_module, name=self.transformer), PreTrainedModel):
            check_own_folder(directory / self.folder, apart=directory)
            check_own_savable(pl_module, name=self.transformer)
            return
        check_folder(directory / self.folder, apart=directory)
        transformer = check_savable(pl_module, name=self.transformer)
        refuse_source(directory / self.folder, getattr(transformer, "name_or_path", None))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder."""
        directory = run_directory(trainer)
        if not trainer.is_global_zero and not is_sharded(trainer):
            return
        plan = plan_of(directory, pl_module)
        if not isinstance(find_transformer(pl_module, name=self.transformer), PreTrainedModel):
            save_weights(pl_module, directory / self.folder, plan=plan, name=self.transformer)
            return
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if not hasattr(tokenizer, "save_pretrained"):  # the user's own tokenizer, which cannot be saved
            tokenizer = None
        save_pretrained(
            pl_module,
            directory / self.folder,
            plan=plan,
            tokenizer=tokenizer,
            standalone=self.standalone,
            figures=figures_of(trainer, directory),
            name=self.transformer,
        )

    def _check_standalone(self, trainer: Trainer, transformer: nn.Module) -> None:
        if not self.standalone:
            return
        if not isinstance(transformer, PreTrainedModel):
            raise ExportError(
                f"Export(standalone=True): {type(transformer).__name__} is no Hugging Face model. Leave standalone out."
            )
        check_savable(transformer, standalone=True)
        if any(
            isinstance(other, TrainsLoRA) and other.trains_lora and other.keeps_lora for other in callbacks_of(trainer)
        ):
            raise ExportError(
                "Export(standalone=True): LoRA stays in the model, and a standalone folder takes no adapters. Merge "
                "them at the end with LoRARecovery(finish='merge'), or leave standalone out."
            )
