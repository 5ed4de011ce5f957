"""The same callbacks in several runs, one after the other: each run equals a run with new callbacks."""

import csv

import lightning.pytorch as pl
import pytest
import torch

from layershed.callbacks import RedundancyMonitor, Report, SpeedMonitor, SublayerDrop
from layershed.surgery import bypassed_sublayers
from tests.support.runs import Foreign, Interrupt, Interrupted, Save, fit_foreign, loader, same, val_loader
from tests.support.thinned import one_of

pytestmark = pytest.mark.usefixtures("unpainted")


def swept(calibrate_on="running", quality="val_loss", **kwargs):
    settings = {"calibration_batches": 2, "quality_batches": 2, "protect": [-1], "calibrate_on": calibrate_on}
    return [
        RedundancyMonitor(2),
        SublayerDrop(4, count=3, **{**settings, **kwargs}),
        SpeedMonitor(6, 2, runs=1, quality=quality, quality_mode="min" if quality else None),
        Report(every_n_steps=1),
    ]


def sweep(make_trainer, own, name, **settings):
    """One of a sweep; everything that its callbacks hold in the end, apart from measured times."""
    module = Foreign(**settings)
    fit_foreign(make_trainer(*own, name=name, max_steps=7, val_check_interval=3), module)
    monitor, drop, speed, report = own
    path = make_trainer(name=name).default_root_dir
    with open(f"{path}/importance.csv", newline="") as file:
        rows = list(csv.reader(file))
    return {
        "weights": dict(module.state_dict()),
        "bypassed": [sublayer.name for sublayer in bypassed_sublayers(module)],
        "drop": {key: value for key, value in drop.state_dict().items() if key != "sums"},
        "latest": monitor._latest,
        "rows": rows,
        "dense": speed._dense_quality,
        "measured": [sublayer.name for sublayer in speed._measured],
        "report": report.state_dict(),
    }


MODELS = [{"num_hidden_layers": 6}, {"num_hidden_layers": 3}]


@pytest.mark.parametrize("calibrate_on", one_of(["running", "val"]))
def test_callbacks_shared_by_a_sweep_give_for_every_model_what_new_ones_give(make_trainer, tmp_path, calibrate_on):
    own = swept(calibrate_on)
    for number, model in enumerate(MODELS):
        alone = sweep(make_trainer, swept(calibrate_on), f"alone{number}", **model)
        shared = sweep(make_trainer, own, f"shared{number}", **model)
        for part in alone:
            assert same(shared[part], alone[part]), part
        last = model.get("num_hidden_layers", 4) - 1
        assert len(shared["bypassed"]) == 3
        assert not {f"attention.{last}", f"mlp.{last}"} & set(shared["bypassed"])


@pytest.mark.parametrize("cut", one_of([5, 2]), ids=["after the drop", "before it"])
def test_callbacks_of_a_run_that_broke_off_leave_nothing_to_the_next_run(make_trainer, cut):
    own = swept(quality=None)
    with pytest.raises(Interrupted):
        fit_foreign(make_trainer(*own, Interrupt(cut), name="cut", max_steps=7, val_check_interval=3))
    alone, shared = (sweep(make_trainer, own, name) for own, name in [(swept(quality=None), "alone"), (own, "shared")])
    assert all(same(shared[part], alone[part]) for part in alone)


@pytest.mark.slow
def test_callbacks_used_before_resume_a_checkpoint_as_new_ones_do(make_trainer, tmp_path):
    path, used = tmp_path / "at.ckpt", swept(quality=None)
    fit_foreign(make_trainer(*used, Save(path, 6), name="first", max_steps=7))
    found = []
    for own, name in [(swept(quality=None), "new"), (used, "used")]:
        module = Foreign()
        trainer = make_trainer(*own, name=name, max_steps=8)
        torch.manual_seed(7)
        trainer.fit(module, loader(), val_loader(), ckpt_path=path)
        found.append((dict(module.state_dict()), own[1].plan.to_dict(), own[1].state_dict()["quality"]))
    assert same(*found)


class Stop(pl.Callback):
    """Has the run end early, once."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step == self.step


def test_second_fit_of_a_dropped_module_goes_on_with_its_plan(make_trainer):
    """Rounds at 3, 6 and 9, of which the first run makes two: by the same Trainer and by another one."""
    module, stop = Foreign(), Stop(7)
    drop = SublayerDrop(3, count=1, every_n_steps=3, rounds=3, calibration_batches=2, quality_batches=2)
    trainer = make_trainer(drop, stop, max_steps=11)
    with pytest.warns(UserWarning, match="the drop at step 9 never happened"):
        fit_foreign(trainer, module)
    plan, rounds = drop.plan, list(drop.rounds)
    assert len(plan) == 2
    fit_foreign(trainer, module)
    assert list(drop.plan)[:2] == list(plan)
    assert len(drop.plan) == len(set(drop.plan)) == 3
    assert set(drop.plan) == set(bypassed_sublayers(module))
    assert list(drop.rounds)[:2] == rounds
    fit_foreign(make_trainer(drop, max_steps=10), module)
    assert len(drop.plan) == len(set(drop.plan)) == 6
    assert set(drop.plan) == set(bypassed_sublayers(module))
    assert list(drop.rounds)[:2] == rounds
