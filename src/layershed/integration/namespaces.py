"""Lightning under both of its names: the packages ``lightning`` and ``pytorch_lightning`` hold the same classes twice.

A class of one is none of the other: ``isinstance(pytorch_lightning_strategy, lightning.pytorch...DDPStrategy)`` is
False. All of layershed takes Lightning's names from here, and no other file imports Lightning:

- Classes to recognize things by, such as ``DDPStrategy``, are the unions of those of both namespaces.
- Classes to inherit from, such as ``Callback``, inherit from those of both namespaces.
- Functions come from one of the namespaces: they do the same.

Importing this module imports both namespaces, so the order of a program's imports does not matter, and no class changes
afterwards. The second one takes 0.15 s, beside 8 s of torch, Lightning and transformers.
"""

from __future__ import annotations

import functools
import importlib
import operator
import sys
from contextlib import suppress
from importlib.util import find_spec
from inspect import getattr_static, isfunction
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from layershed.errors import MissingLightningError
from layershed.integration.warning_place import naming_the_outside


class Namespace(NamedTuple):
    """The two packages of one of Lightning's names."""

    pytorch: str
    fabric: str


NAMESPACES = (Namespace("lightning.pytorch", "lightning.fabric"), Namespace("pytorch_lightning", "lightning_fabric"))


def installed() -> tuple[Namespace, ...]:
    """The namespaces that can be imported, now imported; first the one that the program had imported before layershed.

    Raises:
        MissingLightningError: If none is installed.
    """
    return _import(NAMESPACES)


@functools.cache
def _import(namespaces: tuple[Namespace, ...]) -> tuple[Namespace, ...]:
    found, failed = [], None
    for namespace in sorted(namespaces, key=lambda each: each.pytorch not in sys.modules):
        if find_spec(namespace.pytorch.partition(".")[0]) is None:
            continue
        try:
            importlib.import_module(namespace.pytorch)
        except Exception as error:  # of a version that does not suit this torch; the program cannot use it either
            failed = error
        else:
            found.append(namespace)
    if not found:
        raise failed or MissingLightningError
    return tuple(found)


def own() -> Namespace:
    """The namespace whose functions layershed calls: the first of :func:`installed`."""
    return installed()[0]


def function(place: str, name: str) -> Any:
    """A function or an enum of Lightning, from one namespace.

    Args:
        place: Its module within a namespace, such as ``pytorch.utilities.seed``.
        name: Its name there.
    """
    return getattr(importlib.import_module(_module(own(), place)), name)


def kind(place: str, name: str) -> Any:
    """The union of a class of every namespace, for ``isinstance``.

    Args:
        place: The class's module within a namespace, such as ``pytorch.strategies``.
        name: Its name there. A namespace of an older version may lack it; if all do, nothing is an instance.
    """
    return functools.reduce(operator.or_, _found(place, name) or (type(name, (), {"__module__": __name__}),))


def classes(union: Any) -> tuple[type, ...]:
    """The classes of a :func:`kind`."""
    return get_args(union) or (union,)


def base(place: str, name: str, own_name: str = "") -> Any:
    """A class to inherit from: Lightning takes instances of its subclasses for its own, under either name.

    Args:
        place: The class's module within a namespace.
        name: Its name there.
        own_name: The name of this class, where a config may give a short name that must stay Lightning's.
    """
    content = {"__module__": __name__, "__doc__": f"Lightning's {name}, under both of its names."}
    return type(own_name or name, _found(place, name), content)


def follow_trainer(inheriting: Any) -> Any:
    """Make instances of a class of :func:`base` inherit their methods from the namespace of their Trainer.

    The Trainer asks which hooks the user has overridden, and would take those of the other namespace for such. It does
    not ask callbacks so.

    Args:
        inheriting: The class, of LightningModule or LightningDataModule.
    """
    bases = inheriting.__bases__
    for name in dir(inheriting):
        methods = [getattr_static(each, name, None) for each in bases]
        if not name.startswith("_") and all(map(isfunction, methods)) and methods[0] is not methods[-1]:
            setattr(inheriting, name, _Method(name, bases))
    return inheriting


class _Method:
    """A method of several namespaces: an instance has that of its Trainer's, or the first if it has no Trainer."""

    def __init__(self, name: str, bases: tuple[type, ...]) -> None:
        self.name, self.bases = name, bases

    def __get__(self, instance: Any, owner: type) -> Any:
        trainer = None
        with suppress(RuntimeError):  # how a LightningModule says that it has none
            trainer = getattr(instance, "trainer", None)
        roots = [_root(each) for each in classes(Trainer) if isinstance(trainer, each)]
        chosen = next((each for each in self.bases if _root(each) in roots), self.bases[0])
        return getattr_static(chosen, self.name).__get__(instance, owner)


def _found(place: str, name: str) -> tuple[type, ...]:
    """The class of each namespace that has it."""
    found = []
    for namespace in installed():
        with suppress(ModuleNotFoundError):
            found.append(getattr(importlib.import_module(_module(namespace, place)), name, None))
    return tuple(dict.fromkeys(each for each in found if each is not None))


def _root(lightning_class: type) -> str:
    return lightning_class.__module__.partition(".")[0]


def _module(namespace: Namespace, place: str) -> str:
    root, _, rest = place.partition(".")
    package = getattr(namespace, root)
    return f"{package}.{rest}" if rest else str(package)


if TYPE_CHECKING:
    from lightning.fabric.plugins.io import TorchCheckpointIO as TorchCheckpointIO
    from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars as convert_tensors_to_scalars
    from lightning.fabric.utilities.data import sized_len as sized_len
    from lightning.pytorch import Callback as Callback
    from lightning.pytorch import LightningDataModule as LightningDataModule
    from lightning.pytorch import LightningModule as LightningModule
    from lightning.pytorch import Trainer as Trainer
    from lightning.pytorch.callbacks import EarlyStopping as EarlyStopping
    from lightning.pytorch.callbacks import ModelCheckpoint as ModelCheckpoint
    from lightning.pytorch.callbacks import ModelPruning as ModelPruning
    from lightning.pytorch.callbacks import StochasticWeightAveraging as StochasticWeightAveraging
    from lightning.pytorch.callbacks import WeightAveraging as WeightAveraging
    from lightning.pytorch.loggers import CSVLogger as CSVLogger
    from lightning.pytorch.loggers import Logger as Logger
    from lightning.pytorch.loggers.csv_logs import ExperimentWriter as ExperimentWriter
    from lightning.pytorch.loggers.logger import DummyLogger as DummyLogger
    from lightning.pytorch.strategies import DDPStrategy as DDPStrategy
    from lightning.pytorch.strategies import DeepSpeedStrategy as DeepSpeedStrategy
    from lightning.pytorch.strategies import ModelParallelStrategy as ModelParallelStrategy
    from lightning.pytorch.strategies import ParallelStrategy as ParallelStrategy
    from lightning.pytorch.strategies.xla import XLAStrategy as XLAStrategy
    from lightning.pytorch.trainer.states import TrainerFn as TrainerFn
    from lightning.pytorch.trainer.states import TrainerStatus as TrainerStatus
    from lightning.pytorch.utilities import CombinedLoader as CombinedLoader
    from lightning.pytorch.utilities import rank_zero_info as rank_zero_info
    from lightning.pytorch.utilities import rank_zero_warn as rank_zero_warn
    from lightning.pytorch.utilities.seed import isolate_rng as isolate_rng
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature as is_param_in_hook_signature
    from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig as OptimizerLRSchedulerConfig

    InheritedModule = LightningModule
    InheritedDataModule = LightningDataModule
    InheritedCheckpointIO = TorchCheckpointIO
    InheritedModelCheckpoint = ModelCheckpoint
else:
    Callback = base("pytorch.callbacks", "Callback")
    InheritedModule = follow_trainer(base("pytorch", "LightningModule"))
    InheritedDataModule = follow_trainer(base("pytorch", "LightningDataModule"))
    InheritedCheckpointIO = base("fabric.plugins.io", "TorchCheckpointIO")
    InheritedModelCheckpoint = base("pytorch.callbacks", "ModelCheckpoint", "InheritedModelCheckpoint")

    LightningModule = kind("pytorch", "LightningModule")
    Trainer = kind("pytorch", "Trainer")
    TorchCheckpointIO = kind("fabric.plugins.io", "TorchCheckpointIO")
    EarlyStopping = kind("pytorch.callbacks", "EarlyStopping")
    ModelCheckpoint = kind("pytorch.callbacks", "ModelCheckpoint")
    ModelPruning = kind("pytorch.callbacks", "ModelPruning")
    StochasticWeightAveraging = kind("pytorch.callbacks", "StochasticWeightAveraging")
    WeightAveraging = kind("pytorch.callbacks", "WeightAveraging")  # from Lightning 2.6 on
    CSVLogger = kind("pytorch.loggers", "CSVLogger")
    Logger = kind("pytorch.loggers", "Logger")
    ExperimentWriter = kind("pytorch.loggers.csv_logs", "ExperimentWriter")
    DDPStrategy = kind("pytorch.strategies", "DDPStrategy")
    DeepSpeedStrategy = kind("pytorch.strategies", "DeepSpeedStrategy")
    ModelParallelStrategy = kind("pytorch.strategies", "ModelParallelStrategy")
    ParallelStrategy = kind("pytorch.strategies", "ParallelStrategy")
    XLAStrategy = kind("pytorch.strategies.xla", "XLAStrategy")

    convert_tensors_to_scalars = function("fabric.utilities.apply_func", "convert_tensors_to_scalars")
    sized_len = function("fabric.utilities.data", "sized_len")
    TrainerFn = function("pytorch.trainer.states", "TrainerFn")
    TrainerStatus = function("pytorch.trainer.states", "TrainerStatus")
    CombinedLoader = function("pytorch.utilities", "CombinedLoader")
    DummyLogger = function("pytorch.loggers.logger", "DummyLogger")
    is_param_in_hook_signature = function("pytorch.utilities.signature_utils", "is_param_in_hook_signature")
    rank_zero_info = function("pytorch.utilities", "rank_zero_info")
    rank_zero_warn = naming_the_outside(function("pytorch.utilities", "rank_zero_warn"))
    isolate_rng = function("pytorch.utilities.seed", "isolate_rng")
    OptimizerLRSchedulerConfig = function("pytorch.utilities.types", "OptimizerLRSchedulerConfig")
