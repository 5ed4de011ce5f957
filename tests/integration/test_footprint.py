"""A callback that only watches changes no method, loop, strategy or logger of the user's Trainer."""

import re
import types
from contextlib import suppress

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from layershed.callbacks import ExactResume, RedundancyMonitor, Report, SpeedMonitor
from layershed.integration.namespaces import NAMESPACES
from tests.support.killed import Kill, Killed, stateful
from tests.support.runs import Foreign, val_loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
    pytest.mark.usefixtures("unpainted"),
]

LIGHTNING = tuple(package for names in NAMESPACES for package in names)
WATCHERS = {
    "RedundancyMonitor": lambda: [RedundancyMonitor(2)],
    "Report": lambda: [Report(every_n_steps=1)],
    "SpeedMonitor": lambda: [SpeedMonitor(6, 2, runs=1, quality=None)],
    "all of them": lambda: [RedundancyMonitor(2), SpeedMonitor(6, 2, runs=1, quality=None), Report()],
}
DATA = (torch.Tensor, torch.nn.Parameter, pl.Callback, torch.utils.data.Dataset)


def looked_at(root):
    """Every attribute that can be reached from an object, by its path: its class, or the function that it is."""
    found, seen, left = {}, set(), [("", root)]
    while left:
        path, value = left.pop()
        if callable(value) and not isinstance(value, type | torch.nn.Module) and not hasattr(value, "__dict__"):
            found[path] = repr(getattr(value, "__qualname__", type(value)))
            continue
        if isinstance(value, types.FunctionType | types.MethodType | type):
            found[path] = f"{value.__module__}.{value.__qualname__}"
            if isinstance(value, types.MethodType):
                found[path] += f" of {type(value.__self__).__qualname__}"
            continue
        found[path] = f"{type(value).__module__}.{type(value).__qualname__}"
        if id(value) in seen or isinstance(value, DATA):
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            left += [(f"{path}[{key!r}]", each) for key, each in value.items() if not str(key).startswith("importance")]
        elif isinstance(value, list | tuple):
            left += [(f"{path}[{index}]", each) for index, each in enumerate(value)]
        elif type(value).__module__.startswith((*LIGHTNING, "torch.utils", "torchdata", "tests")):
            left += [(f"{path}.{name}", each) for name, each in getattr(value, "__dict__", {}).items()]
    return found


class Look(pl.Callback):
    """Notes everything of the Trainer before the fit, within it, at its end, and after an error."""

    def __init__(self):
        self.seen = {}

    def look(self, when, trainer):
        found = looked_at(trainer)
        found.update({f"class of {each}": str(type(getattr(trainer, each))) for each in ("strategy", "fit_loop")})
        # the list of callbacks differs, and what they log is data
        self.seen[when] = {
            path: what for path, what in found.items() if not re.search(r"callback|\.metrics(_keys)?\[", path)
        }

    def setup(self, trainer, pl_module, stage):
        self.look("setup", trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 3:
            self.look("training", trainer)

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self.look("validation", trainer)

    def teardown(self, trainer, pl_module, stage):
        self.look("teardown", trainer)

    def on_exception(self, trainer, pl_module, exception):
        self.look("exception", trainer)


def fit(folder, callbacks, *extra):
    look, module = Look(), Foreign()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=6,
        default_root_dir=folder,
        logger=CSVLogger(folder, name=""),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[*callbacks, *extra, look, ModelCheckpoint(folder / "kept", every_n_train_steps=2)],
    )
    methods = set(vars(module))
    with suppress(Killed):
        trainer.fit(module, stateful(), val_loader())
    look.look("after", trainer)
    return look.seen, {name for name in vars(module) if name not in methods}


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """The same fits with none of our callbacks."""
    left_alone = fit(tmp_path_factory.mktemp("alone"), [])
    died = fit(tmp_path_factory.mktemp("died"), [], Kill(tmp_path_factory.mktemp("at") / "cut.ckpt", 4))
    return left_alone, died


def test_footprint_covers_loops_fetchers_strategy_loggers_and_connectors(without):
    seen, _ = without[0]
    assert {"setup", "training", "validation", "teardown", "after"} <= seen.keys()
    for path in (
        "epoch_loop.val_loop._data_source",
        "._data_fetcher._combined_loader",
        "._checkpoint_io",
        "._lightning_module",
        "._experiment.metrics",
        "._logger_connector",
        "._checkpoint_connector",
        "._signal_connector",
    ):
        assert any(found.endswith(path) for found in seen["training"]), path


@pytest.mark.parametrize("watcher", WATCHERS)
def test_watching_callback_replaces_nothing_of_trainer_loops_strategy_loggers_or_module(without, tmp_path, watcher):
    (plain, own), _ = without
    seen, added = fit(tmp_path, WATCHERS[watcher]())
    for when in plain:
        assert seen[when] == plain[when], when
    assert added == own


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("callbacks", [*WATCHERS.values(), lambda: [ExactResume()]], ids=[*WATCHERS, "ExactResume"])
def test_after_an_error_nothing_of_the_trainer_is_replaced(without, tmp_path, callbacks):
    _, (plain, own) = without
    seen, added = fit(tmp_path, callbacks(), Kill(tmp_path / "cut.ckpt", 4))
    if isinstance(callbacks()[0], ExactResume):  # a checkpoint may still be written
        plain = {when: without_io(found) for when, found in plain.items()}
        seen = {when: without_io(found) for when, found in seen.items()}
    assert seen["after"] == plain["after"]
    assert added == own


def test_exact_resume_gives_everything_but_the_checkpoint_io_back(without, tmp_path):
    (plain, own), _ = without
    seen, added = fit(tmp_path, [ExactResume()])
    assert seen["setup"] != plain["setup"]
    for when in ("teardown", "after"):
        assert without_io(seen[when]) == without_io(plain[when])
    assert added == own


def without_io(found):
    return {path: what for path, what in found.items() if "checkpoint_io" not in path}
