"""The comparison of runs as one self-contained HTML file: a table, and the curves of all runs on one axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.ticker import MaxNLocator

from layershed.errors import ResultError
from layershed.formatting import printable
from layershed.reporting.comparison import Comparison
from layershed.reporting.metrics_file import Curve
from layershed.reporting.page import page_environment, write_page
from layershed.reporting.run_files import RunFiles

GENERATOR = "layershed compare"
_CHARTS = {"val_loss": "Validation loss", "train_loss": "Training loss"}
_MOST_POINTS = 400
_MOST_MARKS = 60


@dataclass(frozen=True)
class Tick:
    """A tick of an axis, in pixels."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """The curve of one run, in pixels."""

    number: int
    name: str
    points: str
    marks: tuple[tuple[float, float, str], ...]
    drops: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Chart:
    """The curves of all runs on one axis, in pixels."""

    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]


def write_comparison(comparison: Comparison, runs: Sequence[RunFiles], path: Path) -> Path:
    """Write the page.

    Args:
        comparison: The table.
        runs: The runs, in the order of its columns.
        path: Where to write. An earlier comparison is replaced.

    Returns:
        The path.

    Raises:
        ResultError: If there is a file that is no comparison.
        ExportError: If nothing can be written there.
    """
    check_page(path)
    environment = page_environment()
    charts = []
    for metric, title in _CHARTS.items():
        curves = [run.curves.get(metric, ()) for run in runs]
        if any(len(curve) > 1 for curve in curves):
            drops = [run.drops for run in runs]
            wide, narrow = (chart_of(comparison.names, curves, drops, size) for size in ((940, 330), (360, 280)))
            ends = [
                f"{n}: {c[-1][1]:.4f} at step {c[-1][0]}" for n, c in zip(comparison.names, curves, strict=True) if c
            ]
            note = "A dotted vertical line is a drop. Values appear on hovering."
            charts.append(
                {"title": title, "note": note, "alt": f"{title}. {'; '.join(ends)}.", "wide": wide, "narrow": narrow}
            )
    html = environment.get_template("comparison.html").render(
        generator=GENERATOR,
        names=comparison.names,
        kinds=comparison.kinds,
        sections=comparison.sections,
        notes=comparison.notes,
        without_config=comparison.without_config,
        charts=charts,
    )
    return write_page(path, html)


def check_page(path: Path) -> None:
    """Refuse to overwrite a file that is no comparison.

    Raises:
        ResultError: If there is one.
    """
    if path.is_dir():
        raise ResultError(f"compare: page={str(path)!r} is a folder; give the name of a file.")
    if path.exists():
        with path.open("rb") as file:
            if GENERATOR.encode() not in file.read(4096):
                raise ResultError(
                    f"compare: page={str(path)!r} is there already and is no comparison; give another name."
                )


def chart_of(
    names: Sequence[str], curves: Sequence[Curve], drops: Sequence[Sequence[int]], size: tuple[int, int]
) -> Chart:
    """Place curves on one axis.

    Args:
        names: Names of the runs.
        curves: Their (step, value) points; runs without points have no line.
        drops: The steps of their drops.
        size: Width and height in pixels.
    """
    width, height = size
    left, right, top, bottom = 52.0, width - 12.0, 10.0, height - 40.0
    steps = [step for curve in curves for step, _ in curve]
    values = [value for curve in curves for _, value in curve]
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.5
    y_low, y_high = low - margin, high + margin
    x_low, x_high = min(steps), max(max(steps), min(steps) + 1)

    def x(step: float) -> float:
        return round(left + (right - left) * (step - x_low) / (x_high - x_low), 1)

    def y(value: float) -> float:
        return round(bottom - (bottom - top) * (value - y_low) / (y_high - y_low), 1)

    inside = MaxNLocator(8 if width > 500 else 4, integer=True).tick_values(x_low, x_high)
    levels = MaxNLocator(6).tick_values(y_low, y_high)
    lines = []
    for number, (name, curve, own) in enumerate(zip(names, curves, drops, strict=True)):
        if not curve:
            continue
        thinned = _thinned(curve, _MOST_POINTS)
        marks = _thinned(curve, _MOST_MARKS)
        lines.append(
            Line(
                number,
                printable(name),
                " ".join(f"{x(step)},{y(value)}" for step, value in thinned),
                tuple((x(step), y(value), f"{name}, step {step:,}: {value:.4f}") for step, value in marks),
                tuple((x(step), f"{name}: drop at step {step:,}") for step in own if x_low <= step <= x_high),
            )
        )
    return Chart(
        width,
        height,
        left,
        right,
        top,
        bottom,
        tuple(Tick(x(at), f"{at:,.0f}") for at in inside if x_low <= at <= x_high),
        tuple(Tick(y(at), f"{at:.4g}") for at in levels if y_low <= at <= y_high),
        tuple(lines),
    )


def _thinned(curve: Curve, most: int) -> Curve:
    """Every n-th point, and the last."""
    stride = -(-len(curve) // most)
    return tuple(point for index, point in enumerate(curve) if index % stride == 0 or index == len(curve) - 1)
