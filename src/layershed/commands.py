"""The commands beside training: score a pretrained model, prune it, benchmark what came of it, or plan for it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from matplotlib.figure import Figure
from rich.console import Console
from transformers import PreTrainedModel

from layershed.benchmarking import LIFTED, Bench, Benchmark, QualityName, check_comparison, shown_quality
from layershed.console import (
    benchmark_notes,
    benchmark_tables,
    importance_table,
    prediction_notes,
    prediction_table,
    tell_files,
    wide_console,
)
from layershed.data import TextData
from layershed.discovery import find_sublayers
from layershed.errors import SelectionError
from layershed.export import check_folder, save_pretrained
from layershed.figures import ImportancePoint, RunRecord, importance_heatmap
from layershed.frontier import FrontierPoint, frontier_figure
from layershed.latency import measure_latency
from layershed.module import CausalLM
from layershed.plan import DropPlan, ImportanceScores, Scope
from layershed.prediction import Prediction, ceilings_of, deepest_sublayers, plan_of, predict
from layershed.report import summary_table, write_report
from layershed.running import (
    TrainerError,
    check_scoring,
    check_writable,
    held_out_quality,
    load_base,
    load_checkpoint,
    name_of,
    next_version,
    open_folder,
    prepare,
    run_directory,
    score_sublayers,
)
from layershed.selection import Objective, check_selection, select_sublayers
from layershed.speed import measure_speed
from layershed.stopwatch import SpeedSettings
from layershed.surgery import bypass, dropped_sublayers


class Trainer(pl.Trainer):
    """A Lightning Trainer with training-free commands, and CSV and TensorBoard logs in one numbered directory.

    Args:
        logger: Loggers; true or null for CSV and TensorBoard files in default_root_dir/version_N, false for none.
        default_root_dir: Folder for the results of all runs; each run gets a version_N of its own in it.
        kwargs: As of lightning.pytorch.Trainer.

    Raises:
        TrainerError: If nothing can be written to the folder, or Lightning refuses an argument.
    """

    def __init__(
        self,
        *,
        logger: Logger | Iterable[Logger] | bool | None = None,
        default_root_dir: str | Path = "runs",
        **kwargs: Any,
    ) -> None:
        root = Path(default_root_dir)
        check_writable(root)
        if logger is None or logger is True:
            version = next_version(root)
            logger = [kind(root, name="", version=version) for kind in (CSVLogger, TensorBoardLogger)]
        try:
            super().__init__(logger=logger, default_root_dir=str(default_root_dir), **kwargs)
        except (MisconfigurationException, ValueError) as error:
            raise TrainerError(f"trainer: {error}") from error

    def score(
        self, model: CausalLM, datamodule: TextData, metric: str = "cosine", batches: int = 16
    ) -> ImportanceScores:
        """Measure the importance of every sublayer of a pretrained model: a table and a heat map, no training.

        Writes ``importance.csv`` and ``importance.png`` into the run directory.

        Args:
            model: The model to score.
            datamodule: Where the text comes from; its training split is scored.
            metric: cosine, relative_magnitude or angular.
            batches: Number of batches to score.

        Returns:
            The importances.

        Raises:
            LayershedError: Before anything is measured, if an argument has no meaning.
        """
        check_scoring(metric, batches)
        find_sublayers(model)  # or say that there are none before the text is read

        console, folder = Console(), prepare(self, model, datamodule)
        scores = score_sublayers(self, model, datamodule, metric, batches, folder)
        figure = importance_heatmap(_points(scores))
        figure.suptitle(f"{name_of(model)}: importance ({metric})", fontsize=11)
        figure.savefig(folder / "importance.png", dpi=150)
        console.print(importance_table(scores))
        console.print(f"#1 is the most redundant and would go first; measured over {scores.tokens:,} tokens.")
        tell_files(console, Importances=folder / "importance.csv", Picture=folder / "importance.png")
        return scores

    def prune(
        self,
        model: CausalLM,
        datamodule: TextData,
        scope: Scope = "joint",
        count: int | None = None,
        ratio: float | None = None,
        metric: str = "cosine",
        objective: Objective = "importance",
        protect: Sequence[int] = (),
        batches: int = 16,
        quality_batches: int = 16,
        prompt_tokens: int = 128,
        new_tokens: int = 32,
        runs: int = 5,
        output: str = "pruned",
    ) -> DropPlan:
        """Drop sublayers of a pretrained model without training: score, drop, measure, save.

        Writes ``importance.csv``, ``drop_plan.json``, ``speed.json``, the dropped model and ``report.html``.

        Args:
            model: The model to prune.
            datamodule: Where the text comes from; the training split is scored, the held-out one is for quality.
            scope: What is ranked, and dropped: attention, mlp, block, or joint (attention and MLP in one ranking).
            count: How many to drop: blocks with scope block, else sublayers. Give this or ratio.
            ratio: Share to drop, in (0, 1): of the blocks with scope block, else of the sublayers. Give this or count.
            metric: cosine, relative_magnitude or angular.
            objective: importance (the least important goes first) or speed (what costs least importance per measured
                millisecond of decoding).
            protect: Indices of blocks that stay whole, such as [0, -1]; negative ones count from the end.
            batches: Number of batches to score.
            quality_batches: Number of held-out batches for loss and accuracy.
            prompt_tokens: Tokens per prompt of the speed measurement.
            new_tokens: Tokens decoded by the speed measurement.
            runs: Pairs of dense and dropped runs of the speed measurement.
            output: Folder for the dropped model; a relative path is one inside the run directory.

        Returns:
            What was dropped.

        Raises:
            LayershedError: Before anything is measured, if that cannot be dropped, measured or saved.
        """
        check_selection(scope, count=count, ratio=ratio)
        check_scoring(metric, batches, quality_batches)
        speed_settings: dict[str, Any] = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "runs": runs}
        SpeedSettings(**speed_settings).check(model.model)
        check_folder(run_directory(self) / output)
        if gone := dropped_sublayers(model):
            raise SelectionError(
                f"prune: the model already lacks {', '.join(sublayer.name for sublayer in gone)}, so that there is no "
                "dense one to compare with; prune the model that it came from."
            )
        everything = find_sublayers(model)
        equal = ImportanceScores(dict.fromkeys(everything, 0.0), blocks=dict.fromkeys((s.block for s in everything), 0))
        select_sublayers(equal, scope, count=count, ratio=ratio, protect=protect)

        console, folder = Console(), prepare(self, model, datamodule)
        scores = score_sublayers(self, model, datamodule, metric, batches, folder)
        latency = None
        if objective == "speed":
            with self.precision_plugin.forward_context(), console.status("Measuring latency"):
                latency = measure_latency(model, **speed_settings).sublayers
        wanted: dict[str, Any] = {"count": count, "ratio": ratio, "protect": protect}
        plan = select_sublayers(scores, scope, objective=objective, latency=latency, **wanted)
        quality = {"before": held_out_quality(self, model, datamodule, quality_batches, "before the drop")}
        bypass(model, plan)
        quality["after"] = held_out_quality(self, model, datamodule, quality_batches, "after the drop")
        with self.precision_plugin.forward_context(), console.status("Measuring speed"):
            speed = measure_speed(model, **speed_settings)
        (folder / "speed.json").write_text(json.dumps(speed.to_dict(), indent=2) + "\n", encoding="utf-8")
        plan.save(folder / "drop_plan.json")
        saved = save_pretrained(model, folder / output, plan=plan, tokenizer=datamodule.tokenizer)
        record = RunRecord(name_of(model), importance=_points(scores), plan=plan, quality=quality, speed=speed)
        report = write_report(record, folder / "report.html")
        console.print(summary_table(record))
        tell_files(console, Model=saved, Report=report)
        return plan

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

        console, folder = wide_console(), prepare(self, model, datamodule)
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
        name, what = ckpt_path or name_of(model), base or (name_of(model) if counts else LIFTED)
        result = Benchmark(name, what, dense, tuple(measured), quality, bench.ceilings, used, bench.machine())
        files = {"Measurements": folder / "benchmark.json"}
        files["Measurements"].write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
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

        console, folder = wide_console(), open_folder(self, model)
        prediction = predict(transformer, chosen, ceilings, settings)
        path = folder / "prediction.json"
        path.write_text(json.dumps(prediction.to_dict(), indent=2) + "\n", encoding="utf-8")
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
        return DropPlan.load(plan)
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


def _points(scores: ImportanceScores) -> tuple[ImportancePoint, ...]:
    return tuple(ImportancePoint(0, block, kind, scores.metric, value) for block, kind, value in scores.rows())
