"""The Trainer of the command line, and its commands that change nothing by training: score, and prune."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from rich.console import Console

from layershed.cli.comparing import ComparingTrainer
from layershed.cli.console import (
    importance_table,
    tell_files,
)
from layershed.cli.run_folder import (
    TrainerError,
    check_devices,
    check_output,
    check_scoring,
    check_writable,
    held_out_quality,
    name_of,
    next_version,
    prepare,
    run_directory,
    score_sublayers,
)
from layershed.discovery.find import find_sublayers
from layershed.errors import SelectionError
from layershed.files.atomic import write_text
from layershed.integration.checkpoint_io import keep_checkpoints_whole
from layershed.performance.latency import measure_latency
from layershed.performance.speed import measure_speed
from layershed.performance.stopwatch import SpeedSettings
from layershed.planning.plan import DropPlan, ImportanceScores, Scope
from layershed.planning.selection import Objective, check_selection, equal_scores, select_sublayers
from layershed.reporting.figures import ImportancePoint, RunRecord, importance_heatmap
from layershed.reporting.html_report import summary_table, write_report
from layershed.saving.pretrained import save_pretrained
from layershed.surgery import bypass, dropped_sublayers
from layershed.training.causal_lm import CausalLM
from layershed.training.text_data import TextData


class Trainer(ComparingTrainer):
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
        check_devices(kwargs)
        if logger is None or logger is True:
            version = next_version(root)
            logger = [kind(root, name="", version=version) for kind in (CSVLogger, TensorBoardLogger)]
        try:
            super().__init__(logger=logger, default_root_dir=str(default_root_dir), **kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise TrainerError(f"trainer: {error}") from error
        keep_checkpoints_whole(self.strategy)

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
        figure.suptitle(f"{name_of(model)}: importance ({metric})", fontsize=11, parse_math=False)
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
        check_output(run_directory(self), output, model)
        if gone := dropped_sublayers(model):
            raise SelectionError(
                f"prune: the model already lacks {', '.join(sublayer.name for sublayer in gone)}, so that there is no "
                "dense one to compare with; prune the model that it came from."
            )
        select_sublayers(equal_scores(find_sublayers(model)), scope, count=count, ratio=ratio, protect=protect)

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
        write_text(folder / "speed.json", json.dumps(speed.to_dict(), indent=2) + "\n")
        plan.save(folder / "drop_plan.json")
        saved = save_pretrained(model, folder / output, plan=plan, tokenizer=datamodule.tokenizer)
        record = RunRecord(name_of(model), importance=_points(scores), plan=plan, quality=quality, speed=speed)
        report = write_report(record, folder / "report.html")
        console.print(summary_table(record))
        tell_files(console, Model=saved, Report=report)
        return plan


def _points(scores: ImportanceScores) -> tuple[ImportancePoint, ...]:
    return tuple(ImportancePoint(0, block, kind, scores.metric, value) for block, kind, value in scores.rows())
