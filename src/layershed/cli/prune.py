"""``train.py prune``: drops sublayers of a pretrained model without training."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from rich.console import Console

from layershed.batches import iterate
from layershed.cli.console import tell_files
from layershed.cli.run_folder import (
    check_output,
    check_scoring,
    held_out_quality,
    name_of,
    prepare,
    score_sublayers,
)
from layershed.cli.score import importance_points
from layershed.compensation.fit import LinearMaps
from layershed.compensation.fold import compensate
from layershed.discovery.find import find_sublayers
from layershed.drop import DropMethod, choose
from layershed.errors import SelectionError
from layershed.files.atomic import write_text
from layershed.integration.gathered import exported
from layershed.integration.run import QUALITY_FILE
from layershed.performance.degradation import degradation
from layershed.performance.latency import measure_latency
from layershed.performance.speed import measure_speed
from layershed.performance.stopwatch import SpeedSettings
from layershed.planning.plan import PLAN_FILE, DropPlan, Scope
from layershed.planning.selection import Objective, check_selection, equal_scores, select_sublayers
from layershed.reporting.html_report import write_report
from layershed.reporting.record import RunRecord
from layershed.reporting.summary import summary_rows, summary_table
from layershed.saving.pretrained import save_pretrained
from layershed.saving.savable import check_savable
from layershed.surgery import bypass, dropped_sublayers
from layershed.training.causal_lm import CausalLM
from layershed.training.text_data import TextData


def prune(
    trainer: pl.Trainer,
    model: CausalLM,
    data: TextData,
    *,
    scope: Scope,
    count: int | None,
    ratio: float | None,
    method: DropMethod,
    objective: Objective,
    protect: Sequence[int],
    batches: int,
    quality_batches: int,
    speed: SpeedSettings,
    output: str,
    standalone: bool,
) -> DropPlan:
    """Score, drop, measure and save. Arguments: see :meth:`layershed.cli.trainer.Trainer.prune`.

    Raises:
        LayershedError: Before measuring, if the sublayers cannot be dropped, or the model cannot be measured or saved.
    """
    check_selection(scope, count=count, ratio=ratio)
    check_scoring(method.metric, batches, quality_batches)
    check_objective_of(method, objective)
    speed.check(model.model)
    lengths: dict[str, Any] = {"prompt_tokens": speed.prompt_tokens, "new_tokens": speed.new_tokens, "runs": speed.runs}
    if gone := dropped_sublayers(model):
        raise SelectionError(
            f"prune: the model already lacks {', '.join(sublayer.name for sublayer in gone)}, so there is no dense "
            "model to compare with; prune the dense model."
        )
    select_sublayers(equal_scores(find_sublayers(model)), scope, count=count, ratio=ratio, protect=protect)
    check_savable(model, standalone=standalone)
    check_output(trainer, output, model)

    console, folder = Console(), prepare(trainer, model, data)
    wanted: dict[str, Any] = {"count": count, "ratio": ratio, "protect": protect}
    scores, maps = None, LinearMaps()
    if method == DropMethod(method.metric):
        scores = score_sublayers(trainer, model, data, method.metric, batches, folder)
        latency = None
        if objective == "speed":
            with trainer.precision_plugin.forward_context():
                latency = measure_latency(model, **lengths).sublayers
        plan = select_sublayers(scores, scope, objective=objective, latency=latency, **wanted)
    else:
        with trainer.precision_plugin.forward_context():
            given = list(iterate(data.train_dataloader(), batches))
            plan, maps = choose(model, given, method, scope, **wanted)
    quality = {"before": held_out_quality(trainer, model, data, quality_batches)}
    bypass(model, plan, maps=maps)
    if method.replace == "fold":
        with trainer.precision_plugin.forward_context():
            compensate(model, list(iterate(data.train_dataloader(), batches)))
    quality["after"] = held_out_quality(trainer, model, data, quality_batches)
    with trainer.precision_plugin.forward_context():
        report = measure_speed(model, **lengths)
    write_text(folder / "speed.json", json.dumps(report.to_dict(), indent=2) + "\n")
    plan.save(folder / PLAN_FILE)
    sdr = degradation(quality["before"].values, quality["after"].values, report)
    noted: dict[str, Any] = {when: {**own.values, "tokens": own.tokens} for when, own in quality.items()}
    noted |= {} if sdr is None else {"sdr": {"value": None if math.isnan(sdr.ratio) else sdr.ratio, "text": str(sdr)}}
    write_text(folder / QUALITY_FILE, json.dumps(noted, indent=2) + "\n")
    points = () if scores is None else importance_points(scores)
    record = RunRecord(
        name_of(model),
        importance=points,
        scores=points,
        plan=plan,
        quality=quality,
        speed=report,
        sdr={} if sdr is None else {"after": sdr},
    )
    figures = dict(summary_rows(record))
    options: dict[str, Any] = {"plan": plan, "tokenizer": data.tokenizer, "standalone": standalone, "figures": figures}
    saved = save_pretrained(model, folder / output, **options)
    record = replace(record, changes=(("Exported", exported(saved)),))
    page = write_report(record, folder / "report.html")
    console.print(summary_table(record))
    tell_files(console, Model=saved, Report=page)
    return plan


def check_objective_of(method: DropMethod, objective: Objective) -> None:
    """Refuse an objective that the method does not see.

    Raises:
        SelectionError: If the order of speed is asked for, and a search or a fit decides.
    """
    if objective == "speed" and method != DropMethod(method.metric):
        raise SelectionError(
            "objective='speed': it orders importances that are measured once, without linear maps. Leave search, "
            "replace and method out, or leave objective out."
        )
