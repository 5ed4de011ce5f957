"""What tests of SublayerDrop look at, and how a refusal is judged."""

import csv
import itertools

import lightning.pytorch as pl
import pytest

from layershed.errors import (
    LayershedError,
)
from layershed.surgery import bypassed_sublayers
from tests.support.runs import (
    Foreign,
    loader,
    same,
    state_of,
    val_loader,
)


def keys(plan):
    return [(sublayer.block, sublayer.kind) for sublayer in plan]


def endless(batches):
    return itertools.cycle(list(batches))


def refused(make_trainer, make_drop, error, match, **kwargs):
    """The run is refused before a training step: same weights, no batch seen."""

    class Count(pl.Callback):
        batches = 0

        def on_train_batch_start(self, *_):
            Count.batches += 1

    settings = {"max_steps": 6, **kwargs}
    val = settings.pop("val", val_loader())
    train = settings.pop("train", loader())
    module = settings.pop("module", None) or Foreign()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(error, match=match) as caught:
        make_trainer(make_drop(), Count(), **settings).fit(module, train, val)
    assert isinstance(caught.value, LayershedError)
    assert Count.batches == 0
    assert same(dict(module.state_dict()), before)
    assert bypassed_sublayers(module) == ()
    return str(caught.value)


def primitive(value):
    if isinstance(value, dict):
        return all(isinstance(key, str) and primitive(own) for key, own in value.items())
    if isinstance(value, list):
        return all(map(primitive, value))
    return value is None or type(value) in (bool, int, float, str)


def later_rows(folder, step):
    """What the callback logged after a step; Lightning's own rows move by one step when a run is resumed."""
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    own = [
        (int(row["step"]), {name: row[name] for name in row if name.startswith("drop/") and row[name]}) for row in rows
    ]
    return [(at, metrics) for at, metrics in own if at > step and metrics]


def outcome(trainer, module, drop):
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("drop/")}
    return state_of(trainer, module), drop.plan, drop.quality, metrics
