"""Imports layershed and both Lightnings in the order of its arguments, and asks what a program of each can ask.

tests/integration/test_both_names.py runs it in processes that have imported none of them.
"""

import importlib
import sys

NAMES = ("lightning.pytorch", "pytorch_lightning")


def main(order: list[str]) -> None:
    assert not any(name.partition(".")[0] in {each.partition(".")[0] for each in order} for name in sys.modules)
    early = []
    for name in order:
        importlib.import_module(name)
        if name == "layershed.callbacks":
            early.append(importlib.import_module(name).SublayerDrop(4, count=1))
    ours = importlib.import_module("layershed.callbacks")
    for name in NAMES:
        pl = importlib.import_module(name)
        for callback in (*early, ours.SublayerDrop(4, count=1)):
            assert isinstance(callback, pl.Callback)
            trainer = pl.Trainer(
                callbacks=callback, logger=False, enable_checkpointing=False, enable_progress_bar=False
            )
            assert callback in trainer.callbacks
        for each in ours.__all__:
            assert issubclass(getattr(ours, each), pl.Callback), (name, each)
    print("all are callbacks")


if __name__ == "__main__":
    main(sys.argv[1:])
