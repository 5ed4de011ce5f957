"""The training-free commands: score a pretrained model, or prune it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from rich.console import Console
from rich.progress import track
from rich.table import Table

from layershed.calibration import estimate_importance
from layershed.data import TextData
from layershed.discovery import find_sublayers
from layershed.errors import CalibrationError, LayershedError, SelectionError
from layershed.export import check_folder, save_pretrained
from layershed.figures import ImportancePoint, RunRecord, importance_heatmap
from layershed.metrics import get_metric
from layershed.module import CausalLM
from layershed.plan import DropPlan, ImportanceScores, Scope, count_by_kind
from layershed.quality import Quality, evaluate_quality
from layershed.report import summary_table, write_report
from layershed.selection import check_selection, select_sublayers
from layershed.speed import check_room, measure_speed
from layershed.surgery import bypass, dropped_sublayers


class TrainerError(LayershedError, ValueError):
    """A Trainer that cannot be had on this machine."""


class Trainer(pl.Trainer):
    """A Lightning Trainer with two training-free commands, and CSV and TensorBoard logs in one numbered directory.

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
        _check_writable(root)
        if logger is None or logger is True:
            version = _next_version(root)
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
        _check_scoring(metric, batches)
        find_sublayers(model)  # or say that there are none before the text is read

        console, folder = Console(), _prepare(self, model, datamodule)
        scores = _score(self, model, datamodule, metric, batches, folder)
        figure = importance_heatmap(_points(scores))
        figure.suptitle(f"{_name(model)}: importance ({metric})", fontsize=11)
        figure.savefig(folder / "importance.png", dpi=150)
        console.print(_table(scores))
        console.print(f"#1 is the most redundant and would go first; measured over {scores.tokens:,} tokens.")
        _tell(console, Importances=folder / "importance.csv", Picture=folder / "importance.png")
        return scores

    def prune(
        self,
        model: CausalLM,
        datamodule: TextData,
        scope: Scope = "joint",
        count: int | None = None,
        ratio: float | None = None,
        metric: str = "cosine",
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
        _check_scoring(metric, batches, quality_batches)
        speed_settings: dict[str, Any] = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "runs": runs}
        check_room(model.model, batch_size=1, **speed_settings)
        check_folder(_run_directory(self) / output)
        if gone := dropped_sublayers(model):
            raise SelectionError(
                f"prune: the model already lacks {', '.join(sublayer.name for sublayer in gone)}, so that there is no "
                "dense one to compare with; prune the model that it came from."
            )
        everything = find_sublayers(model)
        equal = ImportanceScores(dict.fromkeys(everything, 0.0), blocks=dict.fromkeys((s.block for s in everything), 0))
        select_sublayers(equal, scope, count=count, ratio=ratio, protect=protect)

        console, folder = Console(), _prepare(self, model, datamodule)
        scores = _score(self, model, datamodule, metric, batches, folder)
        plan = select_sublayers(scores, scope, count=count, ratio=ratio, protect=protect)
        quality = {"before": _quality(self, model, datamodule, quality_batches, "before the drop")}
        bypass(model, plan)
        quality["after"] = _quality(self, model, datamodule, quality_batches, "after the drop")
        with self.precision_plugin.forward_context(), console.status("Measuring speed"):
            speed = measure_speed(model, **speed_settings)
        (folder / "speed.json").write_text(json.dumps(speed.to_dict(), indent=2) + "\n", encoding="utf-8")
        plan.save(folder / "drop_plan.json")
        saved = save_pretrained(model, folder / output, plan=plan, tokenizer=datamodule.tokenizer)
        record = RunRecord(_name(model), importance=_points(scores), plan=plan, quality=quality, speed=speed)
        report = write_report(record, folder / "report.html")
        console.print(summary_table(record))
        _tell(console, Model=saved, Report=report)
        return plan


def _check_writable(folder: Path) -> None:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise TrainerError(f"trainer.default_root_dir={str(folder)!r}: {str(there)!r} is a file, not a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise TrainerError(f"trainer.default_root_dir={str(folder)!r}: nothing can be written to {str(there)!r}.")


def _check_scoring(metric: str, batches: int, quality_batches: int = 1) -> None:
    get_metric(metric)
    for name, number in (("batches", batches), ("quality_batches", quality_batches)):
        if number < 1:
            raise CalibrationError(f"{name}={number}: it must be at least 1.")


def _next_version(folder: Path) -> int:
    taken = [int(path.name.removeprefix("version_")) for path in folder.glob("version_*") if path.name[8:].isdigit()]
    return max(taken, default=-1) + 1


def _run_directory(trainer: pl.Trainer) -> Path:
    return Path(trainer.log_dir or trainer.default_root_dir)


def _prepare(trainer: pl.Trainer, model: CausalLM, data: TextData) -> Path:
    """What Lightning does before it trains: data, device, precision, and the config on disk."""
    if model.hparams.get("pretrained") is None:
        note = "note: without --model.pretrained the weights are random, and so is what is measured of them"
        print(note)
    data.prepare_data()
    data.setup()
    trainer.precision_plugin.convert_module(model)
    model.to(trainer.strategy.root_device)
    folder = _run_directory(trainer)
    folder.mkdir(parents=True, exist_ok=True)
    for callback in getattr(trainer, "callbacks", ()):
        if isinstance(callback, SaveConfigCallback):
            callback.setup(trainer, model, stage="predict")
    return folder


def _score(
    trainer: pl.Trainer, model: CausalLM, data: TextData, metric: str, batches: int, folder: Path
) -> ImportanceScores:
    with trainer.precision_plugin.forward_context():
        scores = estimate_importance(model, _watched(data.train_dataloader(), batches, "Scoring"), metric)
    rows = [f"0,{block},{kind},{metric},{value!r}\n" for block, kind, value in scores.rows()]
    (folder / "importance.csv").write_text("step,block,kind,metric,value\n" + "".join(rows), encoding="utf-8")
    return scores


def _quality(trainer: pl.Trainer, model: CausalLM, data: TextData, batches: int, when: str) -> Quality:
    with trainer.precision_plugin.forward_context():
        return evaluate_quality(model, _watched(data.val_dataloader(), batches, f"Measuring quality {when}"))


def _name(model: CausalLM) -> str:
    source = str(model.hparams.get("pretrained") or type(model.model).__name__)
    return Path(source).stem if source.endswith(".gguf") else source


def _tell(console: Console, **written: Path) -> None:
    for what, path in written.items():
        console.print(f"{what}: {path}", soft_wrap=True, highlight=False, markup=False)


def _watched(loader: Any, batches: int, what: str) -> Iterable[Any]:
    """The first batches, with a progress bar on a terminal: a large model takes minutes."""
    console = Console()
    total = min(batches, len(loader))
    return track(islice(loader, batches), what, total, console=console, transient=True, disable=not console.is_terminal)


def _points(scores: ImportanceScores) -> tuple[ImportancePoint, ...]:
    return tuple(ImportancePoint(0, block, kind, scores.metric, value) for block, kind, value in scores.rows())


def _table(scores: ImportanceScores) -> Table:
    """Importances by block, the least important first in each column's rank."""
    by_cell: dict[tuple[int, str], float] = {(block, kind): value for block, kind, value in scores.rows()}
    order = {s: rank for rank, s in enumerate(sorted(scores, key=lambda s: (scores[s], s)), start=1)}
    ranks: dict[tuple[int, str], int] = {(sublayer.block, sublayer.kind): rank for sublayer, rank in order.items()}
    table = Table(title=f"importance ({scores.metric}), low = redundant")
    table.add_column("block", justify="right")
    kinds = [*count_by_kind(scores), "block"]
    for kind in kinds:
        table.add_column(kind if kind != "block" else "whole block", justify="right")
    for block in sorted({block for block, _, _ in scores.rows()}):
        cells = []
        for kind in kinds:
            value, rank = by_cell.get((block, kind)), ranks.get((block, kind))
            cells.append("" if value is None else f"{value:.6f}" + (f"  #{rank}" if rank else ""))
        table.add_row(str(block), *cells)
    return table
