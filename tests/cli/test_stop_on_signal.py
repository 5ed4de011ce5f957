"""Ctrl-C and SIGTERM in ``fit``: a checkpoint is left, the command that goes on is named, and it ends as if alone."""

import shlex
import signal
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from tests.support.command_line import FIT, callbacks, run
from tests.support.runs import same

pytestmark = [
    pytest.mark.usefixtures("own_world", "one_parser"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]
STEPS = ["--trainer.max_steps=6", "--trainer.accumulate_grad_batches=2", "--trainer.limit_train_batches=12"]


class Signal(pl.Callback):
    """Sends this process a signal within a batch, so many times."""

    def __init__(self, number: int, batch: int, times: int = 1) -> None:
        self.number, self.batch, self.times = number, batch, times

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for _ in range(self.times if batch_idx == self.batch else 0):
            signal.raise_signal(self.number)


def write_config(**settings):
    saving = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": True}}
    Path("fit.yaml").write_text(callbacks({"class_path": f"{__name__}.Signal", "init_args": settings}, saving))
    return ["fit", "--config", "fit.yaml", *FIT[1:], *STEPS]


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(("number", "word", "code"), [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)])
def test_fit_stopped_by_a_signal_names_the_command_that_ends_as_the_uninterrupted_run(capsys, number, word, code):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert run(write_config(number=0, batch=-1)) == 0
    # in the middle of the third step, of two batches each
    assert run(write_config(number=int(number), batch=4)) == code
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-2] == f"Stopped by {word} after step 3. To go on:"
    program, script, *words = shlex.split(told[-1])
    assert (program, script) == ("python", "train.py")
    assert torch.load(words[-1], weights_only=True)["global_step"] == 3
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    write_config(number=0, batch=-1)
    assert run(words) == 0
    first, _, last = (Path("runs") / f"version_{i}" / "checkpoints" / "last.ckpt" for i in range(3))
    assert same(weights(last), weights(first))


def test_second_ctrl_c_interrupts_at_once():
    assert run(write_config(number=int(signal.SIGINT), batch=4, times=2)) != 0
    assert not list(Path("runs").rglob("last.ckpt"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
