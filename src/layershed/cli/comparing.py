"""The commands that compare: benchmark a dropped model against its base, or plan for one from its config alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import lightning.pytorch as pl
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from layershed.cli.console import (
    benchmark_notes,
    benchmark_tables,
    prediction_notes,
    prediction_table,
    tell_files,
    wide_console,
)
from layershed.cli.run_folder import (
    check_scoring,
    held_out_quality,
    load_base,
    name_of,
    open_folder,
    prepare,
    score_sublayers,
)
from layershed.discovery.find import find_sublayers
from layershed.errors import SelectionError
from layershed.files.atomic import write_text
from layershed.performance.benchmark import Bench, Benchmark, QualityName, check_comparison, lifted_base, shown_quality
from layershed.performance.prediction import Prediction, ceilings_of, deepest_sublayers, plan_of, predict
from layershed.performance.stopwatch import SpeedSettings
from layershed.planning.plan import DropPlan, Scope
from layershed.planning.selection import Objective
from layershed.reporting.speed_frontier import FrontierPoint, frontier_figure
from layershed.saving.checkpoint import load_checkpoint
from layershed.surgery import dropped_sublayers
from layershed.training.causal_lm import CausalLM
from layershed.training.text_data import TextData


class ComparingTrainer(pl.Trainer):
    """A Lightning Trainer with the commands ``benchmark`` and ``plan``."""

    def benchmark(
        self,
        model: CausalLM,
        datamodule: TextData,
        base: str | None = None,
        ckpt_path: str | None = None,
        counts: Sequence[int] = (),
        scopes: Sequence[Scope] = ("attention", "mlp", "joint", "block"),
        metric: str = "cosine",
        objective: Objective = "importance",
        batches: int = 16,
        quality_batches: int = 16,
        quality: QualityName = "accuracy",
        prompt_tokens: int = 128,
        new_tokens: int = 32,
        batch_size: int = 1,
        runs: int = 10,
    ) -> Benchmark:
        """Measure a dropped model against its dense base, or sweep over drops of a dense one: quality beside speed.

        Writes ``benchmark.json``, and for a sweep ``frontier.png`` and ``importance.csv``.

        Args:
            model: The dropped model; for a sweep the dense one.
            datamodule: Where the text comes from; quality is measured on the held-out split.
            base: The dense model to compare with: a folder, a hub id or a GGUF file. null compares with the same
                weights, the bypass lifted, which a checkpoint still has.
            ckpt_path: A checkpoint of fit; it brings the options of its model along.
            counts: For a sweep, how many are dropped, such as [2, 4, 8]; blocks with scope block, else sublayers.
            scopes: For a sweep, what is ranked; every scope is measured with every count.
            metric: For a sweep: cosine, relative_magnitude or angular.
            objective: For a sweep: importance (the least important goes first) or speed (what costs least importance
                per measured millisecond of decoding).
            batches: For a sweep, number of batches to score.
            quality_batches: Number of held-out batches for loss and accuracy.
            quality: What the picture shows and the SDR counts: accuracy, loss or perplexity.
            prompt_tokens: Tokens per prompt of the speed measurement.
            new_tokens: Tokens decoded by the speed measurement.
            batch_size: Sequences at once of the speed measurement.
            runs: Pairs of dense and dropped runs of the speed measurement.

        Returns:
            What was measured.

        Raises:
            LayershedError: Before anything is measured, if there is nothing to compare, or too little to drop.
        """
        settings = SpeedSettings(prompt_tokens, new_tokens, batch_size, runs)
        settings.check(model.model)
        check_scoring(metric, batches, quality_batches)
        if ckpt_path is not None:
            load_checkpoint(model, ckpt_path)
        check_comparison(model, base, scopes, counts)
        other = None if base is None else load_base(self, base, model, datamodule)

        console, folder = wide_console(), prepare(self, model, datamodule, ckpt_path)
        scores = score_sublayers(self, model, datamodule, metric, batches, folder) if counts else None
        with self.precision_plugin.forward_context(), console.status("Measuring") as status:
            bench = Bench(model, lambda net: held_out_quality(self, net, datamodule, quality_batches), settings, other)
            dense, measured = bench.dense_quality(), []
            if scores is None:
                measured.append(bench.measure(plan_of(dropped_sublayers(model))))
            else:
                for one in bench.sweep(scores, scopes, counts, objective):
                    measured.append(one)
                    status.update(f"Measured {len(measured)} of {len(scopes) * len(counts)}")
        used = {**asdict(settings), "quality_batches": quality_batches}
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

    def plan(
        self,
        model: CausalLM,
        datamodule: TextData,
        scope: Scope = "attention",
        count: int | None = None,
        ratio: float | None = None,
        plan: str | None = None,
        device: str = "this",
        batch_size: int = 1,
        prompt_tokens: int = 256,
        new_tokens: int = 64,
    ) -> Prediction:
        """Predict what a drop would bring on a device, from the model's config alone: no weight is read or allocated.

        Writes ``prediction.json`` into the run directory.

        Args:
            model: A skeleton on the meta device.
            datamodule: Not used; no text is needed.
            scope: What goes, the deepest first, as there are no importances: attention, mlp or block. For joint give
                a plan.
            count: How many go: blocks with scope block, else sublayers. Give this, ratio or plan; without any, half
                of the attention goes, or of a dropped model what it lacks.
            ratio: Share that goes, in (0, 1).
            plan: A drop_plan.json that a run wrote, instead of scope, count and ratio.
            device: this, whose ceilings are measured, or one by its published ceilings (DEVICES).
            batch_size: Sequences at once.
            prompt_tokens: Tokens of each prompt.
            new_tokens: Tokens decoded after it; the KV cache is that of prompt and new tokens.

        Returns:
            What theory predicts.

        Raises:
            LayershedError: If that cannot be dropped or predicted.
        """
        settings = SpeedSettings(prompt_tokens, new_tokens, batch_size)
        transformer = settings.check(model.model)
        chosen = _planned(transformer, scope, count, ratio, plan)
        dtype = next(transformer.parameters()).dtype
        ceilings = ceilings_of(device, self.strategy.root_device, dtype)

        prediction = predict(transformer, chosen, ceilings, settings)
        console, folder = wide_console(), open_folder(self, model)
        path = folder / "prediction.json"
        write_text(path, json.dumps(prediction.to_dict(), indent=2) + "\n")
        console.print(prediction_table(prediction, name_of(model)))
        for note in prediction_notes(prediction, by_depth=plan is None and chosen is not None):
            console.print(note, highlight=False, markup=False)
        tell_files(console, Prediction=path)
        return prediction


def _planned(
    transformer: PreTrainedModel, scope: Scope, count: int | None, ratio: float | None, plan: str | None
) -> DropPlan | None:
    """What would be dropped; None for what the skeleton lacks already."""
    if plan is not None:
        if count is not None or ratio is not None:
            raise SelectionError(f"plan={plan!r}, count={count}, ratio={ratio}: give a plan, a count or a ratio.")
        given = DropPlan.load(plan)
        if not given.drops:
            raise SelectionError(f"plan={plan!r}: it drops nothing, so that there is nothing to predict.")
        return given
    if gone := dropped_sublayers(transformer):
        if count is not None or ratio is not None:
            raise SelectionError(
                f"plan: the model already lacks {', '.join(sublayer.name for sublayer in gone)}; leave out count and "
                "ratio to predict what that brings, or plan for the model that it came from."
            )
        return None
    if count is None and ratio is None:
        ratio = 0.5
    return deepest_sublayers(find_sublayers(transformer), scope, count=count, ratio=ratio)


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
