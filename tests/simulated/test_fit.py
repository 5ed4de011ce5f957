"""Whole runs on the simulated device with every callback but Quantization: the CPU's results, also after a resume."""

import json
import warnings

import pytest
import torch

import layershed as ls
import layershed.performance.speed
from layershed.callbacks import (
    BestCheckpoint,
    ExactResume,
    Export,
    LoRARecovery,
    RedundancyMonitor,
    Report,
    SpeedMonitor,
    SublayerDrop,
    __all__,
)
from tests.support.runs import Foreign, Interrupt, Interrupted, Save, causal_lm, loader, same, state_of, val_loader
from tests.support.simulated.alike import alike
from tests.support.simulated.device import CALLS
from tests.support.simulated.lightning import make_trainer
from tests.support.simulated.tensors import SIM
from tests.support.ticking import MADE_UP

pytestmark = pytest.mark.usefixtures("unpainted")
LAYERS = {"num_hidden_layers": 2, "attn_implementation": "eager"}


def callbacks(**drop):
    return [
        RedundancyMonitor(every_n_steps=2),
        SublayerDrop(**{"start": 3, "count": 2, "quality_batches": 2, **drop}),
        LoRARecovery(rank=2, finish="adapter"),
        SpeedMonitor(prompt_tokens=8, new_tokens=2, runs=1),
        Export(),
        Report(every_n_steps=2),
        BestCheckpoint(),
        ExactResume(),
    ]


class OwnTransfer(Foreign):
    """Leaves its batches on the CPU and moves what its training step needs."""

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch

    def loss(self, batch):
        assert batch["input_ids"].device.type == "cpu"
        return super().loss({name: value.to(self.device) for name, value in batch.items()})


def run(folder, *more, module=None, device=SIM, ckpt_path=None, own=None, **settings):
    """A fit; returns its trainer and module."""
    settings = {"enable_checkpointing": own is None, **settings}
    trainer = make_trainer(folder, *(callbacks() if own is None else own), *more, device=device, **settings)
    module = module or Foreign(**LAYERS)
    torch.manual_seed(7)
    layershed.performance.speed.measure_ceilings = lambda *_: MADE_UP  # in this test's own process; saves seconds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how little a tiny model gains
        trainer.fit(module, loader(4), val_loader(2), ckpt_path=ckpt_path, weights_only=True)
    return trainer, module


def importances(folder):
    rows = (folder / "importance.csv").read_text().split()
    return [row.rpartition(",")[0] for row in rows], [float(row.rpartition(",")[2]) for row in rows[1:]]


def results(trainer, module, folder):
    """What a run leaves behind, without its timings."""
    plan = json.loads((folder / "drop_plan.json").read_text())
    logged = {
        name: value.item()
        for name, value in trainer.callback_metrics.items()
        if "speed" not in name and "sdr" not in name and "seconds" not in name
    }
    return {
        "weights": dict(module.state_dict()),
        "importances": importances(folder),
        "plan": [(drop["block"], drop["kind"]) for drop in plan["drops"]],
        "logged": {name: logged[name] for name in sorted(logged)},
        "dropped": ls.dropped_sublayers(module),
        "exported": {
            name: value
            for name, value in ls.load_pretrained(folder / "pruned").state_dict().items()
            if "lora" not in name
        },
    }


def test_every_callback_but_quantization_is_in_the_runs():
    assert {type(callback).__name__ for callback in callbacks()} == set(__all__) - {"Quantization", "TaskEvaluation"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Foreign(**LAYERS),
        pytest.param(lambda: OwnTransfer(**LAYERS), marks=pytest.mark.slow),
        pytest.param(lambda: causal_lm(distillation=ls.Distillation()), marks=pytest.mark.slow),
    ],
    ids=["batches moved by Lightning", "batches left on the CPU", "our own module with distillation"],
)
def test_fit_with_every_callback_gives_what_the_cpu_gives(make, tmp_path, unpainted):
    found = results(*run(tmp_path / SIM, module=make()), tmp_path / SIM)
    assert {"Event.record", "max_memory_allocated"} <= set(CALLS)
    CALLS.clear()
    expected = results(*run(tmp_path / "cpu", module=make(), device="cpu"), tmp_path / "cpu")
    assert not [name for name in CALLS if name.startswith("Event")]
    assert len(expected["dropped"]) == 2
    assert expected["importances"][1]
    alike(found, expected, tolerance=1e-3)
    assert (tmp_path / SIM / "report.html").is_file()


CHANGING = (RedundancyMonitor, SublayerDrop, LoRARecovery, ExactResume)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "kinds"),
    [(6, (object,)), (3, (object,)), (3, CHANGING)],
    ids=["before the drop", "after the drop", "after the drop, without reports"],
)
def test_resumed_fit_equals_the_uninterrupted_one_on_the_device(start, kinds, tmp_path):
    def own():
        return [callback for callback in callbacks(start=start) if isinstance(callback, kinds)]

    step = 4  # the end of an epoch: the loader is a plain one
    expected = state_of(*run(tmp_path / "whole", own=own()))
    path = tmp_path / "run" / "last.ckpt"
    with pytest.raises(Interrupted):
        run(tmp_path / "run", Save(path, step), Interrupt(step), own=own())
    assert "set_rng_state_all" not in CALLS
    trainer, module = run(tmp_path / "run", ckpt_path=path, own=own())
    assert "set_rng_state_all" in CALLS
    assert same(state_of(trainer, module), expected)
    assert importances(tmp_path / "run") == importances(tmp_path / "whole")
    assert len(ls.dropped_sublayers(module)) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "drop",
    [
        {"calibrate_on": "train"},
        {"calibrate_on": "val", "rounds": 2, "every_n_steps": 2},
        {"scope": "block", "metric": "angular"},
    ],
    ids=["on training batches", "on validation batches, twice", "blocks"],
)
def test_drop_is_that_of_the_cpu(drop, tmp_path):
    found, expected = (
        run(tmp_path / device, device=device, own=[SublayerDrop(**{"start": 3, "count": 2, **drop})])[1]
        for device in (SIM, "cpu")
    )
    assert ls.dropped_sublayers(found) == ls.dropped_sublayers(expected)
    assert len(ls.dropped_sublayers(found)) >= 2
    alike(dict(found.state_dict()), dict(expected.state_dict()), tolerance=1e-3)
