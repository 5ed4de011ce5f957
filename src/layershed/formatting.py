"""Numbers as a person reads them, in ASCII so that any terminal can show them."""

from __future__ import annotations

from collections.abc import Iterable

from layershed.planning.plan import Sublayer, count_by_kind


def counts_of(sublayers: Iterable[Sublayer]) -> str:
    """How many of which kind, such as ``2 attention, 1 mlp``."""
    return ", ".join(f"{count} {kind}" for kind, count in count_by_kind(sublayers).items() if count)


def short_count(number: float) -> str:
    """A large number with four digits: ``134.5 M``."""
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:,}"


def short_bytes(size: float) -> str:
    """Decimal, as the vendors of accelerators count: ``52.0 GB``."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size:,.0f} B"


def short_number(value: float | None) -> str:
    """Three digits where there is a fraction to show, every digit where there is none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def change_of(before: float, after: float) -> str:
    """The change in percent, such as ``-13.5 %``; nothing where there is nothing to compare with."""
    return f"{(after / before - 1) * 100:+.1f} %" if before else ""


def printable(text: str) -> str:
    """The text without control codes, text direction marks and lone surrogates, which act on a terminal or a file."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
