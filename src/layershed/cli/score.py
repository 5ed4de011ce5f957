"""``train.py score``: measures the importance of every sublayer; shows a table and bars."""

from __future__ import annotations

import lightning.pytorch as pl
from rich.console import Console

from layershed.cli.console import importance_table, tell_files
from layershed.cli.run_folder import check_scoring, name_of, prepare, score_sublayers
from layershed.discovery.find import find_sublayers
from layershed.planning.plan import ImportanceScores
from layershed.reporting.bars import importance_bars
from layershed.reporting.record import ImportancePoint
from layershed.training.causal_lm import CausalLM
from layershed.training.text_data import TextData


def score(trainer: pl.Trainer, model: CausalLM, data: TextData, metric: str, batches: int) -> ImportanceScores:
    """Measure the importances, print a table, write files. Arguments: see :meth:`layershed.cli.trainer.Trainer.score`.

    Raises:
        LayershedError: Before measuring, if an argument is invalid.
    """
    check_scoring(metric, batches)
    find_sublayers(model)  # fails early if there are none

    console, folder = Console(), prepare(trainer, model, data)
    scores = score_sublayers(trainer, model, data, metric, batches, folder)
    figure = importance_bars(importance_points(scores))
    figure.suptitle(f"{name_of(model)}: importance ({metric})", fontsize=11, parse_math=False)
    figure.savefig(folder / "importance.png", dpi=150)
    console.print(importance_table(scores))
    console.print(f"#1 is the most redundant and would be dropped first; measured over {scores.tokens:,} tokens.")
    tell_files(console, Importances=folder / "importance.csv", Picture=folder / "importance.png")
    return scores


def importance_points(scores: ImportanceScores) -> tuple[ImportancePoint, ...]:
    """The importances as points of a figure, at step 0."""
    return tuple(ImportancePoint(0, block, kind, scores.metric, value) for block, kind, value in scores.rows())
