"""``train.py plan``: predicts size and speed after a drop on a device, from the model's config alone."""

from __future__ import annotations

import json

import lightning.pytorch as pl
from transformers import PreTrainedModel

from layershed.cli.console import (
    prediction_notes,
    prediction_table,
    tell_files,
    wide_console,
)
from layershed.cli.run_folder import (
    name_of,
    open_folder,
)
from layershed.discovery.find import find_sublayers
from layershed.discovery.model_record import check_plan, model_record
from layershed.discovery.uneven import warn_left_alone
from layershed.errors import SelectionError
from layershed.files.atomic import write_text
from layershed.performance.prediction import Prediction, ceilings_of, deepest_sublayers, predict
from layershed.performance.stopwatch import SpeedSettings
from layershed.planning.plan import DropPlan, Scope
from layershed.surgery import dropped_sublayers
from layershed.training.causal_lm import CausalLM


def predict_plan(
    trainer: pl.Trainer,
    model: CausalLM,
    *,
    scope: Scope,
    count: int | None,
    ratio: float | None,
    plan: str | None,
    device: str,
    speed: SpeedSettings,
) -> Prediction:
    """Predict, print tables, write files. Arguments: see :meth:`layershed.cli.trainer.Trainer.plan`.

    Raises:
        LayershedError: If the drop is impossible or cannot be predicted.
    """
    transformer = speed.check(model.model)
    warn_left_alone(transformer)
    chosen = _planned(transformer, scope, count, ratio, plan)
    dtype = next(transformer.parameters()).dtype
    ceilings = ceilings_of(device, trainer.strategy.root_device, dtype)

    prediction = predict(transformer, chosen, ceilings, speed)
    console, folder = wide_console(), open_folder(trainer, model)
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
    """The plan to predict; None if the model has already been dropped."""
    if plan is not None:
        if count is not None or ratio is not None:
            raise SelectionError(
                f"plan={plan!r}, count={count}, ratio={ratio}: give only one of plan, count and ratio."
            )
        given = DropPlan.load(plan)
        if not given.drops:
            raise SelectionError(f"plan={plan!r}: it drops nothing, so there is nothing to predict; give another plan.")
        check_plan(f"plan={plan!r}", given, transformer, model_record(transformer))
        return given
    if gone := dropped_sublayers(transformer):
        if count is not None or ratio is not None:
            raise SelectionError(
                f"plan: the model already lacks {', '.join(sublayer.name for sublayer in gone)}; leave out count and "
                "ratio to predict for these, or plan for the dense model."
            )
        return None
    if count is None and ratio is None:
        ratio = 0.5
    return deepest_sublayers(find_sublayers(transformer), scope, count=count, ratio=ratio)
