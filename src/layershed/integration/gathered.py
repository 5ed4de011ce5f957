"""What a report takes from other callbacks and the model: rounds, SDR, own metrics, changes, its name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from layershed.discovery.find import find_transformer, predicts_next_token
from layershed.errors import LayershedError
from layershed.formatting import short_bytes
from layershed.integration.measurements import logged_quality
from layershed.integration.metric_names import BYTES, BYTES_BEFORE, DROP, SPEED
from layershed.integration.namespaces import LightningModule, Trainer
from layershed.integration.preflight import callbacks_of
from layershed.integration.protocols import (
    Exports,
    KeepsScores,
    MeasuresDegradation,
    MeasuresRounds,
    ScoresTasks,
    TrainsLoRA,
)
from layershed.integration.run import SPEED_FILE
from layershed.integration.task_rows import task_rows
from layershed.performance.degradation import Degradation
from layershed.performance.speed_report import report_from
from layershed.planning.plan import DropPlan
from layershed.quality import RoundQuality
from layershed.quantization import BITS, quantization_of, stored_bytes
from layershed.reporting.record import DropRound, ImportancePoint, drop_steps

_MOST_METRICS = 8


def rounds_of(trainer: Trainer, plan: DropPlan | None) -> tuple[DropRound, ...]:
    """Each round of drops, with the quality that SublayerDrop and the SDR that SpeedMonitor measured."""
    measured = {
        each.step: each for other in callbacks_of(trainer) if isinstance(other, MeasuresRounds) for each in other.rounds
    }
    steps, rounds, sdrs = drop_steps(plan), [], _degradations(trainer)
    for step, end in pairwise([*steps, float("inf")]):
        # a SpeedMonitor that is listed before SublayerDrop measures one step later
        sdr = next((own for moment, own in sdrs.items() if moment.isdecimal() and step <= int(moment) < end), None)
        drops = plan.drops if plan else ()
        dropped = tuple(drop.sublayer for drop in drops if drop.step == step)
        rounds.append(DropRound(dropped, measured.get(int(step), RoundQuality(int(step))), sdr))
    return tuple(rounds)


def sdr_of(trainer: Trainer, rounds: tuple[DropRound, ...]) -> dict[str, Degradation]:
    """The SDR by moment, as SpeedMonitor logs it: after the only round, at the last validation, and at the end."""
    sdrs = _degradations(trainer)
    after = [sdr for moment, sdr in sdrs.items() if moment.isdecimal()]
    found: dict[str, Degradation] = {"after": after[-1]} if after and len(rounds) <= 1 else {}
    return found | {moment: sdr for moment, sdr in sdrs.items() if not moment.isdecimal()}


def _degradations(trainer: Trainer) -> dict[str, Degradation]:
    found: dict[str, Degradation] = {}
    for other in callbacks_of(trainer):
        if isinstance(other, MeasuresDegradation):
            found = other.degradations
    return found


def scores_of(trainer: Trainer, plan: DropPlan | None) -> tuple[ImportancePoint, ...]:
    """The importances by which the last round was chosen."""
    step, metric = max(drop_steps(plan), default=0), "" if plan is None else plan.metric or ""
    rows = next((other.scored for other in callbacks_of(trainer) if isinstance(other, KeepsScores)), [])
    return tuple(ImportancePoint(step, block, kind, metric, value) for block, kind, value in rows)


def lora_events(trainer: Trainer) -> tuple[tuple[int, str], ...]:
    """When LoRA began, as LoRARecovery notes it."""
    found = (other for other in callbacks_of(trainer) if isinstance(other, TrainsLoRA) and other.trains_lora)
    return tuple((other.began, "LoRA") for other in found if other.began is not None)


def own_metrics(before: Mapping[str, object], trainer: Trainer, left_out: str) -> dict[str, float]:
    """What the validation that ends now logged, but not under names of ours.

    Args:
        before: The metrics when the validation began.
        trainer: The Trainer.
        left_out: A name that is shown elsewhere.
    """
    logged = {
        name: value
        for name, value in trainer.callback_metrics.items()
        if before.get(name) is not value
        and name != left_out
        and not name.startswith((DROP, SPEED))
        and not name.endswith("_step")
    }
    return {name: value.item() for name, value in list(logged.items())[:_MOST_METRICS]}


def changes_of(trainer: Trainer, pl_module: LightningModule, directory: Path) -> tuple[tuple[str, str], ...]:
    """Rows about quantization, LoRA, the exported folder and tasks, as far as the callbacks listed before did them."""
    rows = []
    try:
        how, transformer = quantization_of(pl_module), find_transformer(pl_module)
    except LayershedError:
        how = transformer = None
    if how is not None and transformer is not None:
        known = [trainer.callback_metrics.get(name) for name in (BYTES_BEFORE, BYTES)]
        sizes = [size.item() for size in known if size is not None] or [stored_bytes(transformer)]
        size = " -> ".join(short_bytes(each) for each in sizes)
        rows.append(("Quantized weights", f"{how.mode}, {BITS[how.mode]} bits, {size}"))
    for other in callbacks_of(trainer):
        if isinstance(other, TrainsLoRA) and other.trains_lora and other.began is not None:
            end = "left in the model" if other.keeps_lora else "merged at the end"
            what = f"rank {other.options['rank']}, alpha {other.options['alpha']}"
            rows.append(("LoRA", f"{what}, from step {other.began:,}, {end}"))
        if isinstance(other, Exports) and (size := exported(directory / other.folder)):
            rows.append(("Exported", size))
        if isinstance(other, ScoresTasks):
            rows += task_rows(other.task_results, directory / SPEED_FILE)
    return tuple(rows)


def figures_of(trainer: Trainer, directory: Path) -> dict[str, str]:
    """What this run measured of quality and speed, as texts by label, for a model card."""
    figures: dict[str, str] = {}
    for when, words in (("before", "before the drop"), ("after", "right after the drop"), ("end", "at the end")):
        quality = logged_quality(trainer, when)
        for name, value in ({} if quality is None else quality.values).items():
            figures[f"Validation {name} {words}"] = f"{value:.4f}"
    path = directory / SPEED_FILE
    # the file may be of an earlier run in the same directory
    if path.is_file() and any(name.startswith(SPEED) for name in trainer.callback_metrics):
        try:
            phases = report_from(json.loads(path.read_text(encoding="utf-8"))).phases
        except (OSError, ValueError, KeyError, TypeError):
            phases = {}
        figures |= {f"{name.capitalize()} speed": str(phase) for name, phase in phases.items()}
    return figures


def exported(folder: Path) -> str:
    """Name and bytes of the weights of a saved folder; empty if there are none."""
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    return f"{folder.name}, {short_bytes(sum(sizes))} of weights" if sizes else ""


def loss_label(pl_module: LightningModule) -> str:
    """Name of the loss on the axis of a picture: only a causal language model is sure to have nats per token."""
    try:
        causal = predicts_next_token(find_transformer(pl_module))
    except LayershedError:
        causal = False
    return "loss (nats per token)" if causal else "loss"


def model_name(pl_module: LightningModule) -> str:
    """The name of the transformer, or of the class if it has none."""
    try:
        transformer = find_transformer(pl_module)
    except ValueError:
        return type(pl_module).__name__
    source: str = getattr(getattr(transformer, "config", None), "name_or_path", "")
    return (Path(source).stem if source.endswith(".gguf") else source) or type(transformer).__name__
