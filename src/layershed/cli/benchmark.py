"""``train.py benchmark``: compares a dropped model with its dense base, or sweeps over drops of a dense model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import lightning.pytorch as pl
from matplotlib.figure import Figure

from layershed.cli.console import (
    benchmark_notes,
    benchmark_tables,
    tell_files,
    wide_console,
)
from layershed.cli.run_folder import (
    check_scoring,
    held_out_quality,
    load_base,
    name_of,
    prepare,
    score_sublayers,
)
from layershed.files.atomic import write_text
from layershed.performance.benchmark import Bench, Benchmark, QualityName, check_comparison, lifted_base, shown_quality
from layershed.performance.prediction import plan_of
from layershed.performance.stopwatch import SpeedSettings
from layershed.planning.plan import Scope
from layershed.planning.selection import Objective
from layershed.progress import track
from layershed.reporting.speed_frontier import FrontierPoint, frontier_figure
from layershed.saving.checkpoint import load_checkpoint
from layershed.surgery import dropped_sublayers
from layershed.training.causal_lm import CausalLM
from layershed.training.text_data import TextData


def benchmark(
    trainer: pl.Trainer,
    model: CausalLM,
    data: TextData,
    *,
    base: str | None,
    ckpt_path: str | None,
    counts: Sequence[int],
    scopes: Sequence[Scope],
    metric: str,
    objective: Objective,
    batches: int,
    quality_batches: int,
    quality: QualityName,
    speed: SpeedSettings,
) -> Benchmark:
    """Measure the models, print tables, write files. Arguments: see :meth:`layershed.cli.trainer.Trainer.benchmark`.

    Raises:
        LayershedError: Before measuring, if there is nothing to compare or too few sublayers can be dropped.
    """
    speed.check(model.model)
    check_scoring(metric, batches, quality_batches)
    if ckpt_path is not None:
        load_checkpoint(model, ckpt_path)
    check_comparison(model, base, scopes, counts)
    other = None if base is None else load_base(trainer, base, model, data)

    console, folder = wide_console(), prepare(trainer, model, data, ckpt_path)
    scores = score_sublayers(trainer, model, data, metric, batches, folder) if counts else None
    with trainer.precision_plugin.forward_context():
        bench = Bench(model, lambda net: held_out_quality(trainer, net, data, quality_batches), speed, other)
        dense, measured = bench.dense_quality(), []
        if scores is None:
            measured.append(bench.measure(plan_of(dropped_sublayers(model))))
        else:
            sweep = bench.sweep(scores, scopes, counts, objective)
            measured.extend(track(sweep, "Measuring drops", len(scopes) * len(counts)))
    used = {**asdict(speed), "quality_batches": quality_batches}
    if scores is not None:
        used |= {"metric": metric, "objective": objective, "batches": batches}
    name, what = ckpt_path or name_of(model), base or (name_of(model) if counts else lifted_base(model))
    result = Benchmark(name, what, dense, tuple(measured), quality, bench.ceilings, used, bench.machine())
    files = {"Measurements": folder / "benchmark.json"}
    write_text(files["Measurements"], json.dumps(result.to_dict(), indent=2) + "\n")
    if counts:
        files["Picture"] = folder / "frontier.png"
        _frontier(result).savefig(files["Picture"])
    for table in benchmark_tables(result):
        console.print(table)
    for note in benchmark_notes(result):
        console.print(note, highlight=False, markup=False)
    tell_files(console, **files)
    return result


def _frontier(result: Benchmark) -> Figure:
    points = [
        FrontierPoint(
            one.scope,
            one.count,
            shown_quality(one.quality, result.quality),
            one.speed.prefill.speedup,
            one.speed.decode.speedup,
        )
        for one in result.measurements
        if one.scope is not None and one.count is not None
    ]
    dense = shown_quality(result.dense, result.quality)
    values = [dense, *(point.quality for point in points)]
    label = {
        "accuracy": "next-token accuracy (%)",
        "loss": "loss (nats per token), lower is better",
        "perplexity": "perplexity, lower is better",
    }[result.quality]
    title = f"{result.model} on {result.machine['device']}"
    wide = result.quality == "perplexity" and max(values) > 10 * min(values)
    return frontier_figure(points, dense, label, title=title, log_scale=wide)
