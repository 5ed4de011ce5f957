"""How an importance is written."""

from __future__ import annotations


def short_importance(value: float | None) -> str:
    """An importance with three significant digits, such as ``0.0123`` or ``2.96e-05``; the notation everywhere."""
    return "-" if value is None else f"{value:#.3g}"
