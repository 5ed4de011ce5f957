"""The names under which the callbacks log, each spelled once."""

from __future__ import annotations

DROP, SPEED = "drop/", "speed/"

REACHED_SPEEDUP = f"{DROP}speedup"
SDR = f"{SPEED}sdr"
SDR_END = f"{SPEED}sdr_end"
REGAINED = "recovery/regained"
TRAINABLE_PARAMETERS = "recovery/trainable_parameters"
LR_FACTOR = "recovery/lr_factor"
BYTES_BEFORE = "quantization/bytes_before"
BYTES = "quantization/bytes"


def quality_name(what: str, when: str) -> str:
    """What SublayerDrop measures around a drop.

    Args:
        what: ``loss`` or ``accuracy``.
        when: ``before``, ``after`` or ``end``.
    """
    return f"{DROP}{what}_{when}"


def dropped_name(kind: str) -> str:
    """How many sublayers of a kind are dropped."""
    return f"{DROP}{kind}"


def task_name(task: str, when: str) -> str:
    """The score of a task, or of all as ``tasks``, at a moment: before, after, validation or end."""
    return f"tasks/{task}_{when}"


def speed_name(what: str) -> str:
    """A figure of SpeedMonitor, such as ``decode_speedup``."""
    return f"{SPEED}{what}"


def importance_group(metric: str) -> str:
    """The group of an importance metric: two monitors of different metrics must not log under one name."""
    return "importance" if metric == "cosine" else f"importance_{metric}"


def importance_name(group: str, kind: str, block: int | str) -> str:
    """An importance: of a sublayer or block by its number, or ``mean`` over the kind."""
    return f"{group}/{kind}_mean" if block == "mean" else f"{group}/{kind}.{block}"


def skipped_name(group: str) -> str:
    """How many forward passes of a measured step were left out."""
    return f"{group}/skipped"
