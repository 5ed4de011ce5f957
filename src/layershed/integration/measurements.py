"""What callbacks measure around a drop, and the metrics that they make of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from layershed.arguments import check_number
from layershed.discovery.find import find_transformer, predicts_next_token
from layershed.errors import SelectionError, UnknownNameError
from layershed.importance.tracker import ImportanceTracker, estimate_importance
from layershed.integration.drop_rule import refuse_beside_plan
from layershed.integration.loaders import calibration_batches, check_text, validation_batches
from layershed.integration.metric_names import (
    DROP,
    REACHED_SPEEDUP,
    REGAINED,
    TRAINABLE_PARAMETERS,
    dropped_name,
    quality_name,
)
from layershed.integration.namespaces import LightningModule, Trainer, rank_zero_warn
from layershed.integration.own_validation import own_quality
from layershed.integration.watching import Watcher
from layershed.planning.plan import ImportanceScores, count_by_kind
from layershed.quality import AnyQuality, OwnQuality, Quality, RoundQuality, evaluate_quality, reads_as_text
from layershed.surgery import bypassed_sublayers

_QUALITY = "the quality around the drop is"
CalibrateOn = Literal["running", "train", "val"]


def check_calibration(
    calibrate_on: str, calibration_batches: int, quality_batches: int, plan: str | Path | None
) -> None:
    """Check arguments of SublayerDrop.

    Raises:
        SelectionError: If a number is too low, or would have no effect beside a given plan.
        UnknownNameError: If the source of the batches is unknown.
    """
    for what, number in (("calibration_batches", calibration_batches), ("quality_batches", quality_batches)):
        check_number(number, what, SelectionError, whole=True)
    if calibration_batches < 1 or quality_batches < 0:
        raise SelectionError(
            f"calibration_batches={calibration_batches}, quality_batches={quality_batches}: "
            "calibration_batches must be at least 1, and quality_batches at least 0."
        )
    if calibrate_on not in get_args(CalibrateOn):
        raise UnknownNameError("source of calibration batches", calibrate_on, get_args(CalibrateOn))
    refuse_beside_plan(plan, calibrate_on=calibrate_on, calibration_batches=calibration_batches)


def check_batches(trainer: Trainer, pl_module: LightningModule, calibrate_on: str, transformer: str | None) -> None:
    """Refuse, before training, batches of which the importance cannot be measured. Arguments are SublayerDrop's.

    Raises:
        CalibrationError: If batches are needed and cannot be read.
    """
    if calibrate_on != "running":
        main = getattr(find_transformer(pl_module, name=transformer), "main_input_name", "input_ids")
        check_text(calibration_batches(trainer, calibrate_on), "calibrate_on='running'", main)


def running_importance(trainer: Trainer, tracker: ImportanceTracker) -> ImportanceScores:
    """Importances over the training batches since the tracker was last read, which is reset; a gap gives a warning."""
    scores = tracker.compute()
    for left_out in filter(None, (tracker.skipped, tracker.left_out)):
        rank_zero_warn(f"SublayerDrop, step {trainer.global_step}: {left_out}.")
    tracker.reset()
    return scores


def importance_in_a_pass(
    trainer: Trainer, pl_module: LightningModule, calibrate_on: str, metric: str, max_batches: int, name: str | None
) -> ImportanceScores:
    """Importances over the first batches of the train or validation loader, in the run's precision."""
    batches = calibration_batches(trainer, calibrate_on)
    with trainer.precision_plugin.forward_context():
        return estimate_importance(pl_module, batches, metric, max_batches=max_batches, name=name)


def validation_quality(
    trainer: Trainer,
    pl_module: LightningModule,
    max_batches: int,
    metric: str | None,
    name: str | None,
    watcher: Watcher,
) -> AnyQuality | None:
    """The quality on the first validation batches, in the run's precision; None, after one warning, if it has none.

    A causal language model that reads the batches by itself has its next-token loss and accuracy measured. Any other
    model, and any named metric, is measured by the module's own validation. An error becomes one warning.

    Raises:
        LayershedError: In a run of several processes, if a causal language model cannot be measured on one of them.
    """
    if not max_batches:
        return None
    transformer, batches = find_transformer(pl_module, name=name), validation_batches(trainer)
    if batches is None:
        watcher.warn_once(
            _QUALITY,
            f": {_QUALITY} left out. The run has no validation to measure it. Add validation_step and validation data, "
            "or set quality_batches=0. Training goes on.",
        )
        return None
    first = next(batches, None)
    batches = chain([] if first is None else [first], batches)
    by_itself = metric is None and _reads_by_itself(trainer, transformer, first)
    # a rank that leaves a collective out would hang the others; the module's own validation agrees on failures
    guarded = not by_itself or trainer.world_size == 1
    quality: AnyQuality | None = None
    with watcher.leaving_out(_QUALITY) if guarded else nullcontext():
        if by_itself:
            with trainer.precision_plugin.forward_context():
                quality = evaluate_quality(pl_module, batches, max_batches=max_batches, name=name)
        else:
            quality = own_quality(trainer, pl_module, batches, max_batches, metric)
    return quality


def _reads_by_itself(trainer: Trainer, transformer: nn.Module, first: Any) -> bool:
    """Whether the transformer is a causal language model that reads the batches, on every rank."""
    if not predicts_next_token(transformer):
        return False
    return trainer.strategy.reduce_boolean_decision(first is None or reads_as_text(first, transformer), all=True)


def quality_state(measured: Mapping[str, AnyQuality]) -> dict[str, Any]:
    """The qualities as primitives, for a checkpoint."""
    return {
        when: [q.loss, q.accuracy, q.tokens] if isinstance(q, Quality) else dict(q.values)
        for when, q in measured.items()
    }


def quality_from(state: Mapping[str, Any]) -> dict[str, AnyQuality]:
    """The inverse of :func:`quality_state`."""
    return {when: OwnQuality(q) if isinstance(q, dict) else Quality(*q) for when, q in state.items()}


def qualities_state(quality: Mapping[str, AnyQuality], rounds: Iterable[RoundQuality]) -> dict[str, Any]:
    """What SublayerDrop measured, as primitives: the last qualities, and step and qualities of every round."""
    return {
        "quality": quality_state(quality),
        "rounds": [
            [each.step, quality_state({k: q for k in ("before", "after") if (q := getattr(each, k)) is not None})]
            for each in rounds
        ],
    }


def qualities_from(state: Mapping[str, Any]) -> tuple[dict[str, AnyQuality], list[RoundQuality]]:
    """The inverse of :func:`qualities_state`; checkpoints of earlier versions have no rounds."""
    rounds = [RoundQuality(step, **quality_from(qualities)) for step, qualities in state.get("rounds", [])]
    return quality_from(state["quality"]), rounds


def quality_metrics(measured: Mapping[str, AnyQuality]) -> dict[str, float]:
    """The qualities before, after and at the end, by their names."""
    return {
        quality_name(what, when): value for when, quality in measured.items() for what, value in quality.values.items()
    }


def logged_quality(trainer: Trainer, when: str) -> AnyQuality | None:
    """The quality that SublayerDrop logged at a moment, or None."""
    begin, end = DROP, quality_name("", when).removeprefix(DROP)
    values = {
        name.removeprefix(begin).removesuffix(end): value.item()
        for name, value in trainer.callback_metrics.items()
        if name.startswith(begin) and name.endswith(end)
    }
    if values.keys() == {"loss", "accuracy"}:
        return Quality(values["loss"], values["accuracy"], 0)
    return OwnQuality(values) if values else None


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
