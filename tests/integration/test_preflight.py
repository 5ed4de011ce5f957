"""Callbacks of this package in every order, alone and beside a user's own."""

import itertools
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest

from layershed.callbacks import Export, LoRARecovery, Quantization, SublayerDrop
from layershed.errors import ScheduleError
from layershed.integration.preflight import check_order
from tests.support.runs import fit_foreign, same

INORDER = (SublayerDrop(4, count=1), Quantization(), LoRARecovery(), Export("out"))


class Decorated(pl.Callback):
    """A user's callback, whose attributes have the names of ours, with other meanings."""

    place = start = first_step = -1
    mode, schedule, kind, finish = "max", "cosine", "mlp", "adapter"
    quality_batches = "all"


@pytest.mark.parametrize("count", range(1, 5))
def test_callbacks_are_refused_in_every_order_but_the_right_one(count):
    for given in itertools.permutations(INORDER, count):
        trainer = SimpleNamespace(callbacks=[Decorated(), *given, Decorated()])
        if list(given) == sorted(given, key=INORDER.index):
            check_order(trainer)
        else:
            with pytest.raises(ScheduleError, match="is listed before"):
                check_order(trainer)


def test_users_callback_with_attributes_named_like_ours_changes_nothing(make_trainer):
    states = []
    for others in ((), (Decorated(), Decorated())):
        trainer = make_trainer(*others, SublayerDrop(2, count=1), LoRARecovery(rank=2), *others, max_steps=4)
        module = fit_foreign(trainer)
        states.append(module.state_dict())
    assert same(*states)
