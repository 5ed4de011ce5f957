"""The command line hides messages of other libraries by name, and no other message."""

import logging
import signal
import warnings

import lightning.pytorch as pl
import lightning_utilities.core.rank_zero as rank_zero_module
import pytest

from layershed.cli.control_callbacks import KeepBeforeDrop
from layershed.cli.quiet import quiet
from layershed.cli.stop_on_signal import StopOnSignal
from layershed.cli.stopped import Stopped
from tests.support.runs import Foreign, loader, val_loader

HIDDEN = (
    "💡 Tip: For seamless cloud logging",
    "GPU available: False",
    "Trainer already configured with model summary callbacks",
    "Restored all states from the checkpoint at last.ckpt",
    "\nDetected KeyboardInterrupt, attempting graceful shutdown ...",
)


@pytest.mark.parametrize("name", [rank_zero_module.log.name, "lightning.pytorch.utilities.rank_zero"])
def test_chatter_of_lightning_is_hidden_under_either_of_its_names(name):
    shown = []
    log = logging.getLogger(name)
    handler = logging.Handler()
    handler.emit = lambda record: shown.append(record.getMessage())
    log.addHandler(handler)
    before, level = list(log.filters), log.level
    log.setLevel(logging.INFO)
    try:
        with quiet():
            for line in (*HIDDEN, "Running in `fast_dev_run` mode"):
                log.info(line)
        assert shown == ["Running in `fast_dev_run` mode"]
        assert log.filters == before, "restored"
        log.info(HIDDEN[0])
        assert shown[-1] == HIDDEN[0]
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def test_warning_to_the_user_is_one_plain_line_and_others_name_their_place():
    before = warnings.formatwarning
    with quiet():
        told = [
            warnings.formatwarning(kind("Row 3 is left out."), kind, "/somewhere/rows.py", 88, "warn(x)")
            for kind in (UserWarning, type("PossibleUserWarning", (UserWarning,), {}), FutureWarning)
        ]
    assert told[:2] == ["warning: Row 3 is left out.\n"] * 2
    assert "rows.py:88" in told[2]
    assert warnings.formatwarning is before, "restored"


class Stop(pl.Callback):
    """Sends SIGTERM in the third batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            signal.raise_signal(signal.SIGTERM)


def test_checkpoints_before_the_drop_and_at_a_signal_are_saved_without_a_note(make_trainer, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with pytest.raises(Stopped):
        make_trainer(KeepBeforeDrop(3), StopOnSignal(), Stop()).fit(Foreign(), loader(4), val_loader())
    assert {path.name for path in tmp_path.rglob("*.ckpt")} == {"before_drop.ckpt", "last.ckpt"}
    assert "weights_only" not in caplog.text
