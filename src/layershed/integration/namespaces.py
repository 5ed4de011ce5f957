"""Lightning under both of its names: the packages ``lightning`` and ``pytorch_lightning`` hold the same classes twice.

A class of one is none of the other: ``isinstance(pytorch_lightning_strategy, lightning.pytorch...DDPStrategy)`` is
False. All of layershed takes Lightning's names from here, and no other file imports Lightning:

- Classes to recognize things by, such as ``DDPStrategy``, recognize those of every namespace that is loaded.
- Classes to inherit from, such as ``Callback``, inherit from those of every namespace that is loaded.
- Functions come from one of the namespaces: they do the same.

Nothing here imports the second namespace. If none is loaded, ``lightning`` is imported, or else ``pytorch_lightning``.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

from layershed.errors import MissingLightningError
from layershed.integration.warning_place import naming_the_outside


class Namespace(NamedTuple):
    """The two packages of one of Lightning's names."""

    pytorch: str
    fabric: str


NAMESPACES = (Namespace("lightning.pytorch", "lightning.fabric"), Namespace("pytorch_lightning", "lightning_fabric"))


def loaded() -> tuple[Namespace, ...]:
    """The namespaces that the program has imported."""
    return tuple(namespace for namespace in NAMESPACES if namespace.pytorch in sys.modules)


def own() -> Namespace:
    """The namespace whose functions layershed calls: the first that is loaded, or installed.

    Raises:
        MissingLightningError: If none is installed.
    """
    for namespace in loaded():
        return namespace
    for namespace in NAMESPACES:
        if find_spec(namespace.pytorch.partition(".")[0]) is not None:
            importlib.import_module(namespace.pytorch)
            return namespace
    raise MissingLightningError


def function(place: str, name: str) -> Any:
    """A function or an enum of Lightning, from one namespace.

    Args:
        place: Its module within a namespace, such as ``pytorch.utilities.seed``.
        name: Its name there.
    """
    return getattr(importlib.import_module(_module(own(), place)), name)


class _Kind(type):
    """The class of a stand-in for a class of Lightning, for ``isinstance`` and ``issubclass``."""

    place: str

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, classes(cls))

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, classes(cls))


def kind(place: str, name: str) -> Any:
    """A stand-in for a class of Lightning: the instances of the class in every loaded namespace are its instances.

    Args:
        place: The class's module within a namespace, such as ``pytorch.strategies``.
        name: Its name there. A namespace of an older version may lack it.
    """
    return _Kind(name, (), {"place": place, "__module__": __name__})


def classes(stands_for: Any) -> tuple[type, ...]:
    """The classes that a stand-in of :func:`kind` stands for, one of each loaded namespace that has it."""
    modules = (sys.modules.get(_module(namespace, stands_for.place)) for namespace in loaded())
    found = (getattr(module, stands_for.__name__, None) for module in modules)
    return tuple(dict.fromkeys(each for each in found if each is not None))


def base(place: str, name: str) -> Any:
    """A class to inherit from: Lightning takes instances of its subclasses for its own, under either name.

    If the second namespace is loaded later, the next instance that is made adds its class to the bases. That is in
    time: nobody asks for the class of an instance before.

    Args:
        place: The class's module within a namespace.
        name: Its name there.
    """
    stands_for = kind(place, name)
    importlib.import_module(_module(own(), place))

    def new(cls: type, *_: object, **__: object) -> Any:
        missing = tuple(each for each in classes(stands_for) if not issubclass(inheriting, each))
        if missing:
            # impossible below a class of the user's own that names the second namespace's class before ours
            with suppress(TypeError):
                inheriting.__bases__ = (*inheriting.__bases__, *missing)
        return object.__new__(cls)

    content = {"__new__": new, "__module__": __name__, "__doc__": f"Lightning's {name}, under both of its names."}
    inheriting: Any = type(name, classes(stands_for), content)
    return inheriting


def follow_trainer(inheriting: Any) -> Any:
    """Make a class of :func:`base` inherit first from the class of a Trainer's namespace, once that Trainer takes it.

    The Trainer would take the other class's hooks for hooks that the user has overridden. It does not ask callbacks so.

    Args:
        inheriting: The class, of LightningModule or LightningDataModule.
    """

    def theirs(self: Any) -> Any:
        """The property of LightningModule; None for LightningDataModule, where it is a plain attribute."""
        found = getattr(super(inheriting, type(self)), "trainer", None)
        return found if isinstance(found, property) else None

    def get(self: Any) -> Any:
        own_property = theirs(self)
        return vars(self).get("trainer") if own_property is None else own_property.fget(self)

    def take(self: Any, trainer: Any) -> None:
        known = [_root(each) for each in classes(Trainer) if isinstance(trainer, each)]
        ordered = tuple(sorted(inheriting.__bases__, key=lambda each: _root(each) not in known))
        if known and ordered != inheriting.__bases__:
            inheriting.__bases__ = ordered
        own_property = theirs(self)
        if own_property is None:
            vars(self)["trainer"] = trainer
        else:
            own_property.fset(self, trainer)

    inheriting.trainer = property(get, take)
    return inheriting


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
else:
    Callback = base("pytorch.callbacks", "Callback")
    InheritedModule = follow_trainer(base("pytorch", "LightningModule"))
    InheritedDataModule = follow_trainer(base("pytorch", "LightningDataModule"))
    InheritedCheckpointIO = base("fabric.plugins.io", "TorchCheckpointIO")

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
