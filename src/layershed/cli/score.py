"""``train.py score``: the importance of every sublayer of a pretrained model, as a table and a heat map."""

from __future__ import annotations

import lightning.pytorch as pl
from rich.console import Console

from layershed.cli.console import importance_table, tell_files
from layershed.cli.run_folder import check_scoring, name_of, prepare, score_sublayers
from layershed.discovery.find import find_sublayers
from layershed.planning.plan import ImportanceScores
from layershed.reporting.figures import ImportancePoint, importance_heatmap
from layershed.training.causal_lm import CausalLM
from layershed.training.text_data import TextData


def score(trainer: pl.Trainer, model: CausalLM, data: TextData, metric: str, batches: int) -> ImportanceScores:
    """Measure, print and write the importances. The arguments are those of :meth:`layershed.cli.trainer.Trainer.score`.

    Raises:
        LayershedError: Before anything is measured, if an argument has no meaning.
    """
    check_scoring(metric, batches)
    find_sublayers(model)  # or say that there are none before the text is read

    console, folder = Console(), prepare(trainer, model, data)
    scores = score_sublayers(trainer, model, data, metric, batches, folder)
    figure = importance_heatmap(importance_points(scores))
    figure.suptitle(f"{name_of(model)}: importance ({metric})", fontsize=11, parse_math=False)
    figure.savefig(folder / "importance.png", dpi=150)
    console.print(importance_table(scores))
    console.print(f"#1 is the most redundant and would go first; measured over {scores.tokens:,} tokens.")
    tell_files(console, Importances=folder / "importance.csv", Picture=folder / "importance.png")
    return scores


def importance_points(scores: ImportanceScores) -> tuple[ImportancePoint, ...]:
    """The importances as a figure takes them, at step 0."""
    return tuple(ImportancePoint(0, block, kind, scores.metric, value) for block, kind, value in scores.rows())
