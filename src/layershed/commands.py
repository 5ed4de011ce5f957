"""The training-free commands: score a pretrained model, or prune it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from rich.console import Console
from rich.table import Table

from layershed.calibration import estimate_importance
from layershed.data import TextData
from layershed.export import save_pretrained
from layershed.figures import ImportancePoint, RunRecord, importance_heatmap
from layershed.metrics import get_metric
from layershed.module import CausalLM
from layershed.plan import DropPlan, ImportanceScores, Scope
from layershed.quality import evaluate_quality
from layershed.report import summary_table, write_report
from layershed.selection import check_selection, select_sublayers
from layershed.speed import check_room, measure_speed
from layershed.surgery import bypass


def score(trainer: pl.Trainer, model: CausalLM, data: TextData, *, metric: str, batches: int) -> ImportanceScores:
    """Score, print a table, and write ``importance.csv`` and ``importance.png`` into the run directory."""
    get_metric(metric)
    console, folder = Console(), _prepare(trainer, model, data)
    scores = _score(model, data, metric, batches, folder)
    importance_heatmap(_points(scores)).savefig(folder / "importance.png", dpi=150)
    console.print(_table(scores))
    console.print(f"Written: {folder}/importance.csv, importance.png", soft_wrap=True, highlight=False, markup=False)
    return scores


def prune(
    trainer: pl.Trainer,
    model: CausalLM,
    data: TextData,
    *,
    scope: Scope,
    count: int | None,
    ratio: float | None,
    metric: str,
    protect: Sequence[int],
    batches: int,
    quality_batches: int,
    prompt_tokens: int,
    new_tokens: int,
    runs: int,
    output: str,
) -> DropPlan:
    """Score, drop, measure quality and speed, save the dropped model, and write the report."""
    get_metric(metric)
    check_selection(scope, count=count, ratio=ratio)
    speed_settings: dict[str, Any] = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "runs": runs}
    check_room(model.model, batch_size=1, **speed_settings)
    console, folder = Console(), _prepare(trainer, model, data)
    scores = _score(model, data, metric, batches, folder)
    plan = select_sublayers(scores, scope, count=count, ratio=ratio, protect=protect)
    quality = {"before": evaluate_quality(model, data.val_dataloader(), max_batches=quality_batches)}
    bypass(model, plan)
    quality["after"] = evaluate_quality(model, data.val_dataloader(), max_batches=quality_batches)
    speed = measure_speed(model, **speed_settings)
    plan.save(folder / "drop_plan.json")
    (folder / "speed.json").write_text(json.dumps(speed.to_dict(), indent=2) + "\n", encoding="utf-8")
    saved = save_pretrained(model, folder / output, plan=plan, tokenizer=data.tokenizer)
    name = str(model.hparams.get("pretrained") or type(model.model).__name__)
    record = RunRecord(name, importance=_points(scores), plan=plan, quality=quality, speed=speed)
    report = write_report(record, folder / "report.html")
    console.print(summary_table(record))
    console.print(f"Model: {saved}\nReport: {report}", soft_wrap=True, highlight=False, markup=False)
    return plan


def _prepare(trainer: pl.Trainer, model: CausalLM, data: TextData) -> Path:
    data.prepare_data()
    data.setup()
    model.to(trainer.strategy.root_device)
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _score(model: CausalLM, data: TextData, metric: str, batches: int, folder: Path) -> ImportanceScores:
    scores = estimate_importance(model, data.train_dataloader(), metric, max_batches=batches)
    rows = [f"0,{block},{kind},{metric},{value!r}\n" for block, kind, value in scores.rows()]
    (folder / "importance.csv").write_text("step,block,kind,metric,value\n" + "".join(rows), encoding="utf-8")
    return scores


def _points(scores: ImportanceScores) -> tuple[ImportancePoint, ...]:
    return tuple(ImportancePoint(0, block, kind, scores.metric, value) for block, kind, value in scores.rows())


def _table(scores: ImportanceScores) -> Table:
    """Importances by block, the least important first in each column's rank."""
    by_cell = {(block, kind): value for block, kind, value in scores.rows()}
    order = {s: rank for rank, s in enumerate(sorted(scores, key=lambda s: (scores[s], s)), start=1)}
    ranks = {(sublayer.block, sublayer.kind): rank for sublayer, rank in order.items()}
    table = Table(title=f"Importance ({scores.metric}, {scores.tokens} tokens; low = redundant; #1 would go first)")
    table.add_column("block", justify="right")
    for kind in ("attention", "mlp", "block"):
        table.add_column(kind if kind != "block" else "whole block", justify="right")
    for block in sorted({block for block, _, _ in scores.rows()}):
        cells = []
        for kind in ("attention", "mlp", "block"):
            value, rank = by_cell.get((block, kind)), ranks.get((block, kind))
            cells.append("" if value is None else f"{value:.6f}" + (f"  #{rank}" if rank else ""))
        table.add_row(str(block), *cells)
    return table
