"""Which quality SpeedMonitor counts in the SDR, and what it says if nothing measures it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import get_args

from layershed.errors import MeasurementError
from layershed.integration.namespaces import Trainer, rank_zero_warn
from layershed.integration.preflight import callbacks_of
from layershed.integration.protocols import Drops
from layershed.performance.degradation import AROUND_THE_DROP, Better
from layershed.planning.plan import Sublayer


def mode_of(quality: str | None, given: Better | None) -> Better | None:
    """Whether a higher or a lower quality is better.

    Raises:
        MeasurementError: If that is missing or contradicts the quality.
    """
    known = AROUND_THE_DROP.get(quality or "")
    if quality is not None and known is None and given not in get_args(Better):
        raise MeasurementError(
            f"SpeedMonitor(quality={quality!r}, quality_mode={given!r}): a metric of the module needs a "
            f"quality_mode. Set it to 'max' or 'min', or use a quality of SublayerDrop: {', '.join(AROUND_THE_DROP)}."
        )
    if known is not None and given not in (None, known):
        raise MeasurementError(
            f"SpeedMonitor(quality={quality!r}, quality_mode={given!r}): {known!r} is better for this quality. Leave "
            "quality_mode out."
        )
    return known or given


def check_quality(trainer: Trainer, quality: str | None) -> None:
    """Refuse a quality that nothing will measure; warn if it is only the default.

    Raises:
        MeasurementError: If nothing will measure it.
    """
    if quality is None:
        return
    if quality not in AROUND_THE_DROP:
        if not trainer.enable_validation:
            raise MeasurementError(
                f"SpeedMonitor(quality={quality!r}): the run has no validation to log it. Add one, or set quality=None."
            )
        return
    if _measures_around_drops(trainer):
        return
    text = (
        f"SpeedMonitor(quality={quality!r}): there is no SDR, as no SublayerDrop measures the quality. "
        "Add SublayerDrop with quality_batches above 0 and validation data, name a metric that the module logs in "
        "validation, or set quality=None."
    )
    if quality != "accuracy":
        raise MeasurementError(text)
    rank_zero_warn(text)


def warn_without_quality(trainer: Trainer, quality: str | None, dropped: Collection[Sublayer]) -> None:
    """Say why there is no SDR, unless somebody has."""
    if quality not in AROUND_THE_DROP:
        rank_zero_warn(
            f"SpeedMonitor(quality={quality!r}): no validation came before the drop, so there is no dense "
            "value and no SDR. Validate sooner (val_check_interval), or drop later."
        )
    # else check_quality warned; SublayerDrop itself warns of a quality that it cannot measure
    elif _measures_around_drops(trainer) and not _dropped_by_callback(trainer, dropped):
        rank_zero_warn(
            f"SpeedMonitor(quality={quality!r}): {names_of(dropped)} was not dropped by "
            "SublayerDrop, so nothing measured the quality and there is no SDR. Drop with SublayerDrop."
        )


def names_of(sublayers: Iterable[Sublayer]) -> str:
    """The names of sublayers in a sentence."""
    return ", ".join(sublayer.name for sublayer in sublayers)


def _measures_around_drops(trainer: Trainer) -> bool:
    """Whether a SublayerDrop measures quality."""
    return trainer.enable_validation and any(
        isinstance(other, Drops) and other.quality_batches > 0 for other in callbacks_of(trainer)
    )


def _dropped_by_callback(trainer: Trainer, dropped: Collection[Sublayer]) -> bool:
    """Whether a SublayerDrop has dropped all of these."""
    plans = (getattr(other, "plan", None) or () for other in callbacks_of(trainer) if isinstance(other, Drops))
    return any(set(dropped) <= set(plan) for plan in plans)
