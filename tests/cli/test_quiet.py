"""The command line hides messages of other libraries by name, and no other message."""

import logging

import lightning_utilities.core.rank_zero as rank_zero_module
import pytest

from layershed.cli.quiet import quiet

HIDDEN = (
    "💡 Tip: For seamless cloud logging",
    "GPU available: False",
    "Trainer already configured with model summary callbacks",
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
