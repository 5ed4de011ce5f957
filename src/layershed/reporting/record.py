"""What a run recorded, as its report and its table show it. No model, no torch, no matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from layershed.performance.degradation import Degradation
from layershed.performance.speed_report import MeasuredSpeed
from layershed.planning.plan import DropPlan, Sublayer
from layershed.quality import OwnQuality, Quality, RoundQuality

PANELS = {"attention": "Attention", "cross_attention": "Cross-attention", "mlp": "MLP", "block": "Whole block"}


@dataclass(frozen=True)
class ImportancePoint:
    """One measured importance.

    Args:
        step: The optimizer step at which it was measured.
        block: Index of the block, from 0.
        kind: A key of ``PANELS``: a kind of sublayer, or ``"block"``.
        metric: Name of the importance metric.
        value: The importance; low means redundant.
    """

    step: int
    block: int
    kind: str
    metric: str
    value: float


@dataclass(frozen=True)
class LossPoint:
    """One logged loss.

    Args:
        step: The optimizer step at which it was logged.
        split: ``"train"`` or ``"val"``.
        loss: The loss; of a causal language model the mean cross-entropy per predicted token, in nats.
    """

    step: int
    split: str
    loss: float


@dataclass(frozen=True)
class MetricPoint:
    """What a validation logged under one name.

    Args:
        step: The optimizer step of the validation.
        value: The value.
    """

    step: int
    value: float


@dataclass(frozen=True)
class Sample:
    """What a causal language model wrote after a prompt, greedily.

    Args:
        prompt: Text of the validation.
        dense: The continuation before the first drop.
        dropped: The continuation at the end.
    """

    prompt: str
    dense: str
    dropped: str


@dataclass(frozen=True)
class DropRound:
    """One round of drops.

    Args:
        dropped: What was dropped.
        quality: The step, and the quality around the round.
        sdr: The SDR of this round; None if unknown.
    """

    dropped: tuple[Sublayer, ...]
    quality: RoundQuality
    sdr: Degradation | None = None


@dataclass(frozen=True)
class Control:
    """What a control logged: the same steps without the drop.

    Args:
        folder: Its run directory, as it was given.
        end: Its last step; of another run the last step of which its log has a loss.
        start: The step of the checkpoint that it began from; None for a run from the beginning.
        quality: The quality at its end on SublayerDrop's batches, by name; empty for another run.
        losses: Its losses.
        metrics: What else it logged in its validations: by name, then by step.
        without: The callbacks that it left out.
        doubts: What else differs from the run, in words.
    """

    folder: str
    end: int
    start: int | None = None
    quality: Mapping[str, float] = field(default_factory=dict)
    losses: tuple[LossPoint, ...] = ()
    metrics: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunRecord:
    """Everything that a report shows of a run; each part may be missing.

    Args:
        model: Name or path of the model. Never trusted: it is escaped wherever it is shown.
        importance: The importances measured over training.
        losses: The losses logged over training.
        plan: What was dropped, with the steps at which it happened.
        quality: Validation quality by moment: ``"before"`` and ``"after"`` the drop, and at the ``"end"`` of the run.
        speed: Measured speed, dense against dropped.
        measured: How often importance was measured, by metric, where ``importance`` does not hold all of it.
        sdr: The SDR by moment: ``"after"`` the drop, at the ``"end"``, or at the last ``"validation"``.
        rounds: The rounds of an iterative schedule.
        metrics: What the module logs in validation, by name: the last before the drop, if any, and the last.
        changes: What else changed the model, as rows of the table: quantization, LoRA, the exported folder.
        loss_label: Name of the loss, with its unit.
        steps: The last step; None outside training.
        validations: Step and loss of the module's own validations.
        control: The same steps without the drop.
        control_pending: Whether a control is meant, but has not ended.
        control_failed: Whether a control was meant, but was stopped or failed.
        curves: What else was noted over training, by its name: points of step and value.
        events: What changed the model beside the drops: step and words.
        scores: The importances by which the last round was chosen.
        samples: What the model wrote.
        facts: How it ran, as rows: the command, the seed, versions, the processor, date and duration.
        config: The configuration as text.
        usage: How to load and serve the dropped model: headings and commands.
    """

    model: str
    importance: tuple[ImportancePoint, ...] = ()
    losses: tuple[LossPoint, ...] = ()
    plan: DropPlan | None = None
    quality: Mapping[str, Quality | OwnQuality] = field(default_factory=dict)
    speed: MeasuredSpeed | None = None
    measured: Mapping[str, int] = field(default_factory=dict)
    sdr: Mapping[str, Degradation] = field(default_factory=dict)
    rounds: tuple[DropRound, ...] = ()
    metrics: Mapping[str, tuple[MetricPoint | None, MetricPoint]] = field(default_factory=dict)
    changes: tuple[tuple[str, str], ...] = ()
    loss_label: str = "loss (nats per token)"
    steps: int | None = None
    validations: tuple[tuple[int, float], ...] = ()
    control: Control | None = None
    control_pending: bool = False
    control_failed: bool = False
    curves: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    events: tuple[tuple[int, str], ...] = ()
    scores: tuple[ImportancePoint, ...] = ()
    samples: tuple[Sample, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    config: str = ""
    usage: tuple[tuple[str, str], ...] = ()


def drop_steps(plan: DropPlan | None) -> list[int]:
    """The steps at which something was dropped."""
    return sorted({drop.step for drop in plan.drops if drop.step is not None}) if plan else []
