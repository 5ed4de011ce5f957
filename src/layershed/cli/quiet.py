"""Hides messages of other libraries that would bury the output of a run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning_utilities.core.rank_zero as rank_zero_module
from lightning.pytorch.callbacks import Callback
from transformers.utils import logging as transformers_logging

from layershed import callbacks

LOGS = (
    "lightning.fabric.utilities.seed",
    "lightning.pytorch.utilities.rank_zero",
    "bitsandbytes.backends.cpu.ops",
    "bitsandbytes.autograd._functions",
    "datasets.packaged_modules.json.json",
    "datasets.packaged_modules.parquet.parquet",
)
# Advertisements, echoes of the config, absent hardware.
_CHATTER = (
    "Tip: For seamless",
    "Seed set to",
    "GPU available: False",
    "TPU available: False",
    "`Trainer(limit_",
    "Loading `train_dataloader` to estimate",
    "Failed to load CPU gemm_4bit_forward",
    "MatMul8bitLt: inputs will be cast",
    "Restoring states from the checkpoint",
    "Restored all states from the checkpoint",
    "Loaded model weights from the checkpoint",
    "Trainer already configured with model summary callbacks",
    "Detected KeyboardInterrupt",
    "`Trainer.fit` stopped: `max_steps=",
    "`Trainer.fit` stopped: `max_epochs=",
    # layershed raises an error with the same content
    "Failed to load JSON from file",
    "Failed to read schema from",
)


# Lightning's callbacks with weights of their own, which an evaluation needs.
_WITH_WEIGHTS = ("StochasticWeightAveraging", "WeightAveraging", "EMAWeightAveraging")


@contextmanager
def quiet(*, evaluating: bool = False) -> Iterator[None]:
    """Hide the messages of other libraries, show warnings in one plain line, and restore all settings afterwards.

    Args:
        evaluating: Whether no training follows, so that the state of callbacks in a checkpoint does not matter.
    """
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    # Lightning's two packages share one log, under the name of the one that was imported last
    logs = [rank_zero_module.log, *(logging.getLogger(name) for name in LOGS)]
    former = warnings.formatwarning
    with warnings.catch_warnings():
        warnings.formatwarning = partial(_plain, former)
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        for log in logs:
            log.addFilter(_worth_saying)
        warnings.filterwarnings("ignore", message="Precision .* is not supported by the model summary")
        if evaluating:
            warnings.filterwarnings("ignore", message=_restored_anyway())
        # every run of the command line has a folder of its own, also a resumed one
        warnings.filterwarnings("ignore", message="The dirpath has changed from")
        # a small machine gains nothing from more loader processes
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # a stream's length is that of the run
        warnings.filterwarnings("ignore", message="Your `IterableDataset` has `__len__` defined")
        # Lightning 2.6 calls functions that torch 2.13 and jsonargparse 4.53 deprecate
        warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning\.pytorch\.cli|jsonargparse")
        try:
            yield
        finally:
            warnings.formatwarning = former
            for log in logs:
                log.removeFilter(_worth_saying)
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()


def _plain(
    former: Callable[..., str], message: Warning | str, category: type[Warning], *place: Any, **line: Any
) -> str:
    """A warning to the user, without a file and a line of source that they did not write."""
    plain = issubclass(category, UserWarning)
    return f"warning: {message}\n" if plain else former(message, category, *place, **line)


def _worth_saying(record: logging.LogRecord) -> bool:
    return not any(chatter in record.getMessage() for chatter in _CHATTER)


def _restored_anyway() -> str:
    """Matches Lightning's request for callbacks none of which an evaluation needs.

    The module's own hooks bring it into the state of the checkpoint. A stranger's callback may hold weights.
    """
    theirs = [kind for kind in _subclasses(Callback) if kind.__module__.startswith(("layershed.", "lightning."))]
    known = {*callbacks.__all__, *(kind.__name__ for kind in theirs)} - {*_WITH_WEIGHTS}
    names = "|".join(sorted(known))
    one = rf"""(?:'(?:{names})'|"(?:{names})(?:{{[^"]*}})?")"""
    return rf"(?s).*Please add the following callbacks: \[{one}(?:, {one})*\]"


def _subclasses(kind: type[Callback]) -> Iterator[type[Callback]]:
    for inner in kind.__subclasses__():
        yield inner
        yield from _subclasses(inner)
