"""fast_dev_run ends before the callbacks act: they say so once and do nothing, and the code is tried out."""

import warnings

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import EarlyStopping

from layershed.callbacks import ExactResume, Export, LoRARecovery, Quantization, RedundancyMonitor, Report, SublayerDrop
from layershed.errors import SelectionError
from layershed.performance.stopwatch import SpeedSettings
from layershed.surgery import dropped_sublayers
from tests.support.runs import fit_foreign

TRIALS = {
    "SublayerDrop": lambda: [SublayerDrop(7, count=1), EarlyStopping("drop/loss_after")],
    "SublayerDrop and those that wait for it": lambda: [
        SublayerDrop(7, count=1),
        Quantization(),
        LoRARecovery(finish="dequantize"),
    ],
    "SublayerDrop to a speedup": lambda: [SublayerDrop(7, target_speedup=1e6, speed=SpeedSettings(8, 2))],
    "LoRARecovery": lambda: [LoRARecovery(start=5)],
    "Quantization and LoRARecovery": lambda: [Quantization(start=5), LoRARecovery(start=5, finish="dequantize")],
}


def fit(folder, *callbacks, **options):
    trainer = pl.Trainer(
        default_root_dir=folder, callbacks=list(callbacks), enable_model_summary=False, accelerator="cpu", **options
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = fit_foreign(trainer)
    names = ("SublayerDrop", "LoRARecovery", "Quantization")
    return module, trainer, [str(each.message) for each in caught if str(each.message).startswith(names)]


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("name", TRIALS)
def test_fast_dev_run_before_the_step_of_a_callback_warns_once(tmp_path, name):
    others = [RedundancyMonitor(1), *TRIALS[name](), Report(), ExactResume()]
    module, trainer, said = fit(tmp_path, *others, fast_dev_run=True)
    assert trainer.global_step == 1
    acting = ["Quantization", "LoRARecovery"] if name.startswith("Quantization") else [name.partition(" ")[0]]
    assert [text.partition(", before step")[0] for text in said] == [
        f"{each}: fast_dev_run ends after 1 steps" for each in acting
    ]
    assert dropped_sublayers(module) == ()
    assert not any("lora_" in key for key in module.state_dict())


def test_fast_dev_run_that_reaches_the_drop_drops(tmp_path):
    module, _, said = fit(tmp_path, SublayerDrop(2, count=1), Export(), fast_dev_run=4)
    assert said == []
    assert len(dropped_sublayers(module)) == 1


def test_fast_dev_run_still_refuses_what_the_model_cannot_do(tmp_path):
    with pytest.raises(SelectionError):
        fit(tmp_path, SublayerDrop(7, count=99), fast_dev_run=True)
