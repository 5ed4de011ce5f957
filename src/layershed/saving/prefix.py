"""Which of a checkpoint's weights are a module's: those of a LightningModule's transformer have a prefix."""

from __future__ import annotations

from collections.abc import Collection

from layershed.errors import CheckpointError


def prefix_of(keys: Collection[str], own: Collection[str], what: str) -> str:
    """The prefix that a module's weights have in a checkpoint; empty if they have none, or do not fit.

    Args:
        keys: The names of the checkpoint's weights.
        own: The names of the module's weights.
        what: The module's class, for the message.

    Raises:
        CheckpointError: If the weights of several parts of the checkpoint fit.
    """
    if not own or not set(own).isdisjoint(keys):
        return ""
    first = f".{min(own)}"
    found = {key.removesuffix(first) + "." for key in keys if key.endswith(first)}
    fit = sorted(each for each in found if {key for key in keys if key.startswith(each)} == {each + key for key in own})
    if len(fit) > 1:
        raise CheckpointError(
            f"it holds the weights of several modules that fit this {what}, under {' and '.join(map(repr, fit))}. Pass "
            "the LightningModule that was trained, and take the transformer from it."
        )
    return fit[0] if fit else ""


def misfit(keys: Collection[str], own: Collection[str], what: str) -> str:
    """Why a checkpoint's weights do not fit a module, and what to do."""
    found = (key.removesuffix(inside) for inside in sorted(own) for key in keys if key.endswith(f".{inside}"))
    if set(own).isdisjoint(keys) and (prefix := next(found, None)) is not None:
        return (
            f"its weights begin with {prefix!r}, and those of this {what} do not, nor do they fit otherwise. "
            "Pass the LightningModule that was trained, built from the same config."
        )
    return f"its weights do not fit this {what}. Build it from the config that it was trained with."
