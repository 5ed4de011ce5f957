"""Protocols by which callbacks recognize each other by attributes, not classes: no callback imports another one."""

from __future__ import annotations

from typing import Any, Literal, Protocol, runtime_checkable

from layershed.integration.namespaces import LightningModule, Trainer
from layershed.performance.degradation import Degradation
from layershed.planning.schedule import DropSchedule
from layershed.quality import RoundQuality


@runtime_checkable
class Placed(Protocol):
    """Has a place in the order drop (1), quantize (2), LoRA (3), quantize at the end (4), export (5)."""

    @property
    def layershed_place(self) -> int:
        """The place."""


@runtime_checkable
class ActsAtStep(Protocol):
    """Changes the model at an optimizer step."""

    @property
    def first_step(self) -> int | None:
        """The step; None for that of the drop."""


@runtime_checkable
class Drops(Protocol):
    """Drops sublayers, as SublayerDrop does."""

    schedule: DropSchedule
    quality_batches: int


@runtime_checkable
class Replaces(Protocol):
    """A callback that drops sublayers, and may put linear maps in their place."""

    @property
    def places_maps(self) -> bool:
        """Whether it puts linear maps in their place."""


@runtime_checkable
class MeasuresRounds(Protocol):
    """Measures the quality around every round of drops, as SublayerDrop does."""

    rounds: list[RoundQuality]


@runtime_checkable
class KeepsScores(Protocol):
    """Keeps block, kind and importance of every sublayer at the last round of drops, as SublayerDrop does."""

    scored: list[tuple[int, str, float]]


@runtime_checkable
class MeasuresDegradation(Protocol):
    """Computes the SDR, as SpeedMonitor does."""

    degradations: dict[str, Degradation]


@runtime_checkable
class Quantizes(Protocol):
    """Quantizes the model, as Quantization does."""

    @property
    def quantizes_before_recovery(self) -> bool:
        """Whether LoRA is trained on quantized weights."""


@runtime_checkable
class TrainsLoRA(Protocol):
    """May train LoRA, as LoRARecovery does."""

    began: int | None
    options: dict[str, Any]

    @property
    def trains_lora(self) -> bool:
        """Whether it does."""

    @property
    def keeps_lora(self) -> bool:
        """Whether it leaves LoRA in the model at the end."""


@runtime_checkable
class Exports(Protocol):
    """Writes the dropped model into a folder, as Export does."""

    folder: str

    @property
    def layershed_place(self) -> Literal[5]:
        """Its place in the order: the last."""


@runtime_checkable
class LoadsShards(Protocol):
    """Must bring the model into the checkpoint's structure before FSDP2 reads weights and optimizer states."""

    def before_sharded_load(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any]) -> None:
        """Called with the callback's own state of the checkpoint."""


@runtime_checkable
class WritesHistory(Protocol):
    """Writes into importance.csv, as RedundancyMonitor does."""

    history_was_lost: bool


@runtime_checkable
class Refreezes(Protocol):
    """A callback that keeps parameters frozen."""

    def refreeze(self) -> None:
        """Freeze again what others unfroze, and keep it out of the optimizers."""
