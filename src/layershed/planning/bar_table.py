"""Tables with bars, as text for ``print`` and as HTML for notebooks. Needs no other library."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layershed.planning.notation import short_importance

_LETTERS = 12  # of the longest bar; ASCII, so that any terminal can show it


@dataclass(frozen=True)
class Bar:
    """A cell with a bar.

    Args:
        value: Its length.
        longest: The value whose bar has the full length.
        label: The text after it.
    """

    value: float
    longest: float
    label: str

    @property
    def share(self) -> float:
        """Length over full length, in [0, 1]; 0 for a value that is negative, NaN or infinite."""
        if not (math.isfinite(self.value) and math.isfinite(self.longest)) or self.longest <= 0:
            return 0.0
        return min(1.0, max(0.0, self.value / self.longest))

    def __str__(self) -> str:
        return f"{'=' * max(1 if self.share else 0, round(_LETTERS * self.share)):{_LETTERS}} {self.label}"


@dataclass(frozen=True)
class BarTable:
    """A table whose cells are text or bars.

    Args:
        title: A line about it.
        columns: Their names.
        rows: A cell for each column.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Bar]]

    def text(self) -> str:
        """The table as lines of equal columns."""
        cells = [list(self.columns), *([str(cell) for cell in row] for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        return "\n".join([self.title, *lines])

    def html(self) -> str:
        """The table as HTML without scripts. Its colours follow the page, light or dark."""
        head = "".join(f"<th>{html.escape(column)}</th>" for column in self.columns)
        body = "".join(f"<tr>{''.join(_html_cell(cell) for cell in row)}</tr>" for row in self.rows)
        caption = html.escape(self.title)
        return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def scores_table(values: Mapping[tuple[int, str], float], kinds: Sequence[str], metric: str, tokens: int) -> BarTable:
    """A table of importances: a row for each block, a column for each kind. #1 is the least important sublayer.

    Args:
        values: Importance by block and kind.
        kinds: The order of the columns.
        metric: Name of the metric.
        tokens: Number of tokens in the average; 0 if unknown.
    """
    there = [kind for kind in kinds if any(kind == other for _, other in values)]
    longest = {kind: max(value for (_, other), value in values.items() if other == kind) for kind in there}
    ranks = {cell: rank for rank, cell in enumerate(sorted(values, key=lambda cell: (values[cell], cell)), start=1)}
    bars = {
        cell: Bar(value, longest[cell[1]], f"{short_importance(value)} #{ranks[cell]}")
        for cell, value in values.items()
    }
    blocks = sorted({block for block, _ in values})
    measured = f"over {tokens:,} tokens; " if tokens else ""
    title = f"importance ({metric}) of {len(values)} sublayers, {measured}#1 would be dropped first"
    rows = [[f"{block:5}", *(bars.get((block, kind), "") for kind in there)] for block in blocks]
    return BarTable(title, ["block", *there], rows)


def plan_table(title: str, drops: Sequence[tuple[str, float | None, int | None]]) -> BarTable:
    """A table of a drop plan: a row for each drop, in the order in which they were chosen.

    Args:
        title: A line about the plan.
        drops: Name of the sublayer, importance and optimizer step, where known.
    """
    longest = max((score for _, score, _ in drops if score is not None), default=0.0)
    rows: list[list[str | Bar]] = []
    for place, (name, score, step) in enumerate(drops, start=1):
        bar = "" if score is None else Bar(score, longest, short_importance(score))
        rows.append([f"{place:5}", name, bar, "" if step is None else f"{step:4}"])
    kept = [i for i in range(4) if i < 2 or any(row[i] != "" for row in rows)]
    columns = ["order", "sublayer", "importance", "step"]
    return BarTable(title, [columns[i] for i in kept], [[row[i] for i in kept] for row in rows])


def _html_cell(cell: str | Bar) -> str:
    if isinstance(cell, str):
        return f"<td>{html.escape(cell)}</td>"
    bar = f"display:inline-block;height:0.7em;width:{6 * cell.share:.2f}em;background:currentColor;opacity:0.5"
    rest = f"display:inline-block;width:{6 * (1 - cell.share):.2f}em"
    return (
        f'<td style="text-align:left"><span style="{bar}"></span><span style="{rest}"></span> '
        f"{html.escape(cell.label)}</td>"
    )
