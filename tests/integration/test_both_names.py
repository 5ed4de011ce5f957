"""Both namespaces of Lightning in one process: their command lines, their Trainers by turns, imports in any order."""

import importlib
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader

import layershed.callbacks
from layershed.callbacks import ExactResume, RedundancyMonitor, SublayerDrop
from layershed.integration.namespaces import InheritedDataModule
from layershed.training.causal_lm import CausalLM
from tests.support.forked import start_module
from tests.support.import_order import NAMES

TINY = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
ORDERS = [("layershed.callbacks", *NAMES[::-1]), (NAMES[1], "layershed.callbacks", NAMES[0])]
CONFIG = """
seed_everything: 0
trainer:
  max_steps: 4
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: out
  callbacks:
    - class_path: layershed.callbacks.RedundancyMonitor
      init_args: {every_n_steps: 2}
    - class_path: layershed.callbacks.SublayerDrop
      init_args: {start: 3, scope: attention, count: 1, quality_batches: 0}
    - class_path: layershed.callbacks.ExactResume
"""
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:'set_vital' is deprecated")


@pytest.fixture(params=NAMES)
def pl(request):
    return pytest.importorskip(request.param)


def rows():
    return torch.randint(64, (16, 12), generator=torch.Generator().manual_seed(0))


def seeded():
    torch.manual_seed(0)
    return CausalLM(config=TINY)


class Rows(InheritedDataModule):
    """Overrides the training loader alone."""

    def train_dataloader(self):
        return DataLoader([{"input_ids": row, "labels": row} for row in rows()], batch_size=4)


def test_every_callback_is_one_of_the_namespace_and_suits_its_trainer_alone(pl):
    for name in layershed.callbacks.__all__:
        assert issubclass(getattr(layershed.callbacks, name), pl.Callback)
    drop = SublayerDrop(4, count=1)
    assert isinstance(drop, pl.Callback)
    assert drop in pl.Trainer(callbacks=drop, **QUIET).callbacks


@pytest.mark.default_cases(1)
def test_command_line_takes_our_callbacks_and_our_module(pl, tmp_path, monkeypatch):
    cli = importlib.import_module(f"{pl.__name__}.cli")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(CONFIG)
    model = [f"--model.config.{name}={value}" for name, value in TINY.items()]
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # seed_everything sets them
        monkeypatch.setenv(variable, "0")
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6 calls what it deprecates
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", "config.yaml", *model])
    found = cli.LightningCLI(CausalLM, Rows).trainer
    assert isinstance(found, pl.Trainer)
    assert found.global_step == 4
    ours = [each for each in found.callbacks if isinstance(each, RedundancyMonitor | SublayerDrop | ExactResume)]
    assert len(ours) == 3
    assert len(ours[1].plan) == 1


def test_trainers_of_both_namespaces_by_turns_change_no_class_and_each_module_follows_its_own():
    modules = [seeded(), seeded()]
    kinds = [CausalLM, Rows, SublayerDrop, *(type(each) for each in modules)]
    orders = [each.__mro__ for each in kinds]
    for steps in (2, 4):
        trainers = []
        for name, module in zip(NAMES, modules, strict=True):
            pl = importlib.import_module(name)
            drop = SublayerDrop(1, scope="attention", count=1, quality_batches=0) if steps == 2 else ExactResume()
            trainers.append(pl.Trainer(callbacks=drop, max_steps=steps, **QUIET))
            trainers[-1].fit(module, datamodule=Rows())
            assert trainers[-1].global_step == steps
        for trainer, module, name in zip(trainers, modules, NAMES, strict=True):
            parent = importlib.import_module(name).LightningModule
            assert module.trainer is trainer
            assert module.val_dataloader.__code__ is parent.val_dataloader.__code__
            assert module.log.__func__ is parent.log
        assert [each.__mro__ for each in kinds] == orders
    first, second = (module.state_dict() for module in modules)
    assert all(torch.equal(value, second[name]) for name, value in first.items() if isinstance(value, torch.Tensor))
    assert first.keys() == second.keys()


@pytest.mark.parametrize("order", ORDERS, ids=["layershed first", "pytorch_lightning first"])
def test_callbacks_suit_both_namespaces_in_every_order_of_imports(order, tmp_path):
    output = tmp_path / "output.txt"
    process = start_module("tests.support.import_order", list(order), {}, output, anew=True)
    process.join(120)
    assert (process.exitcode, output.read_text().splitlines()[-1:]) == (0, ["all are callbacks"]), output.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS, ids=["layershed first", "pytorch_lightning first"])
def test_callbacks_suit_both_namespaces_in_every_order_of_imports_of_a_fresh_process(order):
    command = [sys.executable, "-m", "tests.support.import_order", *order]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["all are callbacks"], done.stderr
