"""One line about the model that a command trains or evaluates, instead of Lightning's table of its modules."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary

from layershed.formatting import counts_of, short_count
from layershed.surgery import dropped_sublayers


class ModelLine(ModelSummary):
    """Says before training how large the model is, how much of it is trained, and what it lacks.

    Prints: one line in ``on_fit_start``.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line."""
        if trainer.is_global_zero:
            print(model_line(pl_module))


def model_line(module: LightningModule) -> str:
    """Class, parameters and dropped sublayers of the model in a module of the command line."""
    parameters = list(module.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    gone = counts_of(dropped_sublayers(module))
    return (
        f"model: {type(module.model).__name__}, {short_count(sum(each.numel() for each in parameters))} parameters, "
        f"{short_count(trained)} of them trained" + (f", {gone} dropped" if gone else "")
    )
