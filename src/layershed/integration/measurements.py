"""What callbacks measure around a drop, and the metrics that they make of it."""

from __future__ import annotations

from collections.abc import Mapping

from layershed.discovery.find import find_transformer
from layershed.importance.tracker import estimate_importance
from layershed.integration.loaders import calibration_batches, check_text, validation_batches
from layershed.integration.metric_names import (
    REACHED_SPEEDUP,
    REGAINED,
    TRAINABLE_PARAMETERS,
    dropped_name,
    quality_name,
)
from layershed.integration.namespaces import LightningModule, Trainer
from layershed.planning.plan import ImportanceScores, count_by_kind
from layershed.quality import Quality, check_head, evaluate_quality
from layershed.surgery import bypassed_sublayers


def check_batches(
    trainer: Trainer, pl_module: LightningModule, calibrate_on: str, quality_batches: int, transformer: str | None
) -> None:
    """Refuse, before training, batches and heads that cannot be measured. Arguments are those of SublayerDrop.

    Raises:
        CalibrationError: If batches are needed and cannot be read.
    """
    if calibrate_on != "running":
        check_text(calibration_batches(trainer, calibrate_on), "calibrate_on='running'")
    if quality_batches:
        check_text(validation_batches(trainer), "quality_batches=0")
        check_head(find_transformer(pl_module, name=transformer))


def importance_in_a_pass(
    trainer: Trainer, pl_module: LightningModule, calibrate_on: str, metric: str, max_batches: int, name: str | None
) -> ImportanceScores:
    """Importances over the first batches of the train or validation loader, in the run's precision."""
    batches = calibration_batches(trainer, calibrate_on)
    with trainer.precision_plugin.forward_context():
        return estimate_importance(pl_module, batches, metric, max_batches=max_batches, name=name)


def validation_quality(
    trainer: Trainer, pl_module: LightningModule, max_batches: int, name: str | None
) -> Quality | None:
    """Loss and accuracy on the first validation batches, in the run's precision; None without such batches."""
    batches = validation_batches(trainer) if max_batches else None
    if batches is None:
        return None
    with trainer.precision_plugin.forward_context():
        return evaluate_quality(pl_module, batches, max_batches=max_batches, name=name)


def quality_metrics(measured: Mapping[str, Quality]) -> dict[str, float]:
    """The qualities before, after and at the end, by their names."""
    return {
        **{quality_name("loss", when): quality.loss for when, quality in measured.items()},
        **{quality_name("accuracy", when): quality.accuracy for when, quality in measured.items()},
    }


def drop_metrics(pl_module: LightningModule, speedup: float | None) -> dict[str, float]:
    """How many sublayers of each kind are dropped, and the measured speedup if there is a target."""
    counts = count_by_kind(bypassed_sublayers(pl_module))
    reached = {} if speedup is None else {REACHED_SPEEDUP: speedup}
    return {**{dropped_name(kind): float(count) for kind, count in counts.items()}, **reached}


def trainable_parameters(pl_module: LightningModule) -> dict[str, float]:
    """How many parameters are trained."""
    trained = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
    return {TRAINABLE_PARAMETERS: float(trained)}


def regained_loss(trainer: Trainer) -> dict[str, float]:
    """(after - end) / (after - before) of the losses that SublayerDrop logged; nothing if the drop cost no loss."""
    losses = [trainer.callback_metrics.get(quality_name("loss", when)) for when in ("before", "after", "end")]
    known = [float(loss) for loss in losses if loss is not None]
    if len(known) < len(losses):
        return {}
    before, after, end = known
    return {REGAINED: (after - end) / (after - before)} if after > before else {}
