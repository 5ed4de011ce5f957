"""Output of the commands: tables, paths of written files."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from layershed.formatting import (
    change_of,
    counts_of,
    printable,
    short_bytes,
    short_count,
    short_number,
)
from layershed.performance.benchmark import LIFTED, Benchmark, Measurement, shown_quality
from layershed.performance.prediction import PredictedPhase, Prediction
from layershed.performance.roofline import ACCELERATORS
from layershed.performance.speed_report import PhaseSpeed, shown_speedup
from layershed.planning.notation import short_importance
from layershed.planning.plan import ImportanceScores, count_by_kind
from layershed.quality import Quality

_WIDTH = 120


def wide_console() -> Console:
    """A console that is 120 columns wide, not 80, if the output is a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


def tell_files(console: Console, **written: Path) -> None:
    """Print the path of each written file on one line, so that it can be copied."""
    for what, path in written.items():
        console.print(printable(f"{what}: {path}"), soft_wrap=True, highlight=False, markup=False)


def importance_table(scores: ImportanceScores) -> Table:
    """A table of importances by block. The rank #1 is the least important sublayer."""
    by_cell: dict[tuple[int, str], float] = {(block, kind): value for block, kind, value in scores.rows()}
    order = {s: rank for rank, s in enumerate(sorted(scores, key=lambda s: (scores[s], s)), start=1)}
    ranks: dict[tuple[int, str], int] = {(sublayer.block, sublayer.kind): rank for sublayer, rank in order.items()}
    table = Table(title=_plain(f"importance ({scores.metric}), low = redundant"))
    table.add_column("block", justify="right")
    kinds = [*count_by_kind(scores), "block"]
    for kind in kinds:
        table.add_column(kind if kind != "block" else "whole block", justify="right")
    for block in sorted({block for block, _, _ in scores.rows()}):
        cells = []
        for kind in kinds:
            value, rank = by_cell.get((block, kind)), ranks.get((block, kind))
            cells.append("" if value is None else short_importance(value) + (f"  #{rank}" if rank else ""))
        table.add_row(str(block), *cells)
    return table


def prediction_table(prediction: Prediction, model: str) -> Table:
    """A table of what is predicted for the dense and the dropped model."""
    before, after, ceilings = prediction.dense, prediction.dropped, prediction.ceilings
    sequences, tokens = prediction.batch_size, prediction.prompt_tokens + prediction.new_tokens
    title = _plain(f"{model}: {counts_of(prediction.plan)} dropped")
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column(_plain(f"predicted for {ceilings.name}"), no_wrap=True)
    for column in ("dense", "dropped", "change"):
        table.add_column(column, justify="right", no_wrap=True)

    def add(what: str, dense: float, dropped: float, show: Any) -> None:
        table.add_row(what, show(dense), show(dropped), change_of(dense, dropped) or "-")

    add("parameters", before.parameters, after.parameters, short_count)
    add(f"weights, {prediction.dtype}", before.weight_bytes, after.weight_bytes, short_bytes)
    add(f"KV cache, {sequences:,} x {tokens:,} tokens", before.kv_bytes, after.kv_bytes, short_bytes)
    if ceilings.memory is not None:
        needed = [str(side.devices(ceilings.memory)) for side in (before, after)]
        table.add_row(f"devices of {short_bytes(ceilings.memory)} to hold both", *needed, "")
    table.add_section()
    what = f"prefill, {sequences:,} x {prediction.prompt_tokens:,} tokens"
    table.add_row(what, *_phase_cells(before.prefill, after.prefill, prediction.prefill_speedup))
    table.add_row("  tokens/s", *(short_number(side.prefill.tokens_per_s) for side in (before, after)), "")
    what = f"decoding step, {sequences:,} sequence{'s' if sequences > 1 else ''}"
    table.add_row(what, *_phase_cells(before.decode, after.decode, prediction.decode_speedup))
    table.add_row("  tokens/s", *(short_number(side.decode.tokens_per_s) for side in (before, after)), "")
    table.add_section()
    for part, work in before.work.items():
        left = after.work[part]
        add(f"FLOPs per decoded token, {part}", work.flops, left.flops, lambda flops: f"{flops / 1e9:.3g} G")
        add("  bytes", work.bytes, left.bytes, short_bytes)
    return table


def prediction_notes(prediction: Prediction, *, by_depth: bool) -> Iterator[str]:
    """Notes for reading the table.

    Args:
        prediction: The prediction in the table.
        by_depth: Whether the deepest sublayers were chosen, because there are no importances.
    """
    ceilings = prediction.ceilings
    if by_depth:
        yield "The deepest sublayers go first: a skeleton has no importances."
        yield (
            "The prediction depends only on how many are dropped."
            if prediction.uniform
            else "The prediction also depends on which are dropped: give the plan of a run by --plan."
        )
    yield (
        f"Ceilings: {ceilings.flops / 1e12:.3g} TFLOP/s, {ceilings.bandwidth / 1e9:,.4g} GB/s ({ceilings.source}). "
        "The prediction is the least time they allow; a real run takes longer."
    )
    if ceilings.memory is not None and prediction.dense.devices(ceilings.memory) > 1:
        yield "Times assume one device with enough memory; n devices take 1/n of the time at best."
    if prediction.dtype == "float32" and ceilings in ACCELERATORS.values():
        yield "The ceiling is for 16-bit products; float32 computes several times slower."


def benchmark_tables(result: Benchmark) -> Iterator[Table]:
    """Three tables (size and quality, prefill, decode): a row for the dense model and one for each dropped model."""
    speeds = [one.speed for one in result.measurements]
    first = speeds[0]
    table = _table_of(f"{result.model}: size and quality", "", "parameters", "file", "peak memory", "KV cache/token")
    for column in ("loss", "accuracy", "perplexity", "SDR"):
        table.add_column(column, justify="right")
    table.add_row(
        "dense",
        *_sizes(first.parameters_dense, first.file_bytes_dense, first.peak_memory_dense, first.kv_bytes_dense),
        *_qualities(result.dense),
        "",
    )
    for one, speed in zip(result.measurements, speeds, strict=True):
        sizes = speed.parameters_dropped, speed.file_bytes_dropped, speed.peak_memory_dropped, speed.kv_bytes_dropped
        sdr = result.degradation(one)
        table.add_row(_label(one), *_sizes(*sizes), *_qualities(one.quality), "-" if math.isnan(sdr) else f"{sdr:.3f}")
    yield table

    # one table per phase: side by side, the intervals would be wrapped
    for phase, unit in (("prefill", "ms"), ("decode", "ms/token")):
        table = _table_of(phase, "", "tokens/s", unit, "speedup [95 %]", "theory")
        # one denominator for all rows: the speedups hold of each measurement, and the table of their dense median
        dense = statistics.median(speed.phases[phase].dense for speed in speeds)
        timed = 1000 * first.timed[phase]
        table.add_row("dense", short_number(dense), short_number(timed / dense), "", "")
        for one, speed in zip(result.measurements, speeds, strict=True):
            shown = replace(speed.phases[phase], dense=dense)
            table.add_row(_label(one), *_speed_cells(shown, timed / shown.dropped))
        yield table


def benchmark_notes(result: Benchmark) -> Iterator[str]:
    """Notes for reading the tables."""
    settings = result.settings
    unit = "points of accuracy" if result.quality == "accuracy" else f"hundredths of {result.quality}"
    yield printable(f"Dense: {result.base}.")
    if result.base == LIFTED:
        yield (
            "It may have been trained since the drop, so its quality is not the quality before the drop, and there is "
            "no SDR. Give the model before the drop by --base."
        )
    else:
        yield (f"SDR: {unit} lost per % of decode speed gained; - if no speedup is measurable (it takes six runs).")
    yield "Speed: dense is the median over all runs, dropped is dense times the speedup within the pairs of runs."
    yield "Theory: the speedup that this machine's ceilings predict; in brackets, measured over predicted."
    yield (
        f"Median of {settings['runs']} pairs, {settings['batch_size']} x {settings['prompt_tokens']} tokens prefill "
        f"and {settings['new_tokens']} decoded, on {result.machine['device']}; "
        f"quality over {result.dense.tokens:,} tokens."
    )


def _plain(text: str) -> Text:
    """A title without active markup or control codes: it may contain a stranger's text."""
    return Text(printable(text))


def _table_of(title: str, *columns: str) -> Table:
    table = Table(title=_plain(title), box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column else "left", no_wrap=not column)
    return table


def _label(one: Measurement) -> str:
    return f"{one.scope} {one.count}" if one.scope is not None else counts_of(one.plan) or "compared"


def _sizes(parameters: float, file: float, memory: float, cache: float) -> list[str]:
    return [short_count(parameters), *(short_bytes(size) for size in (file, memory, cache))]


def _qualities(quality: Quality) -> list[str]:
    accuracy, perplexity = shown_quality(quality, "accuracy"), shown_quality(quality, "perplexity")
    return [f"{quality.loss:.4f}", f"{accuracy:.1f} %", short_number(perplexity)]


def _speed_cells(phase: PhaseSpeed, milliseconds: float) -> list[str]:
    interval = shown_speedup(phase.speedup)
    doubt = f"\n{phase.doubt}" if phase.doubt else ""
    theory = "-"
    if phase.predicted is not None:
        theory = f"x{phase.predicted:.2f} ({phase.speedup.median / phase.predicted:.2f})"
    return [short_number(phase.dropped), short_number(milliseconds), interval + doubt, theory]


def _phase_cells(dense: PredictedPhase, dropped: PredictedPhase, speedup: float) -> list[str]:
    return [*(f"{short_number(1000 * p.seconds)} ms, {p.bound}-bound" for p in (dense, dropped)), f"x{speedup:.2f}"]
