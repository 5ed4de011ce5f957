"""Lines that a callback prints while a progress bar runs."""

from __future__ import annotations

from tqdm import tqdm

from layershed.formatting import counts_of
from layershed.integration.namespaces import Trainer
from layershed.planning.plan import DropPlan
from layershed.quality import AnyQuality, Quality

_NAMED = 4  # sublayers that a line names; of more it gives the numbers only


def say(trainer: Trainer, line: str) -> None:
    """Print a line on rank zero, above a progress bar of rich or tqdm if one runs."""
    if trainer.is_global_zero:
        tqdm.write(line)  # rich redirects what is printed while its bar runs


def drop_line(step: int, plan: DropPlan, before: AnyQuality | None, after: AnyQuality | None) -> str:
    """What one round dropped, and the quality around it.

    Args:
        step: The optimizer step.
        plan: The sublayers of this round.
        before: The quality before the round; None if it was not measured.
        after: The quality right after it.
    """
    what = f"step {step}: dropped {counts_of(plan)}" if plan.drops else f"step {step}: nothing left to drop"
    names = f" ({', '.join(sublayer.name for sublayer in sorted(plan))})" if 0 < len(plan) <= _NAMED else ""
    if before is None or after is None:
        return what + names
    shown = ["loss"] if isinstance(before, Quality) else list(before.values)
    changes = [
        f"{name} {before.values[name]:.4f} -> {after.values[name]:.4f}" for name in shown if name in after.values
    ]
    return f"{what}{names}; validation {', '.join(changes)}" if changes else what + names
