"""What a validation of its own must leave as it was: the attributes, buffers and metrics of the module."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from layershed.integration.namespaces import LightningModule

_Restore = Callable[[], None]
_OF_TORCH = frozenset(vars(nn.Module()))
_CONTAINERS = (list, tuple, dict, set, deque)
_DATA = (int, float, complex, str, bytes, type(None), Tensor, np.ndarray, *_CONTAINERS)


@contextmanager
def state_kept(pl_module: LightningModule) -> Iterator[None]:
    """Within the context torchmetrics are fresh; afterwards data, buffers and metrics of all modules are as before.

    Data are numbers and texts, tensors and arrays that may change in place, and what containers hold at any depth.
    Other objects keep what the validation does to them. Parameters are left alone.
    """
    plain = [module for module in pl_module.modules() if not isinstance(module, Metric)]
    before, seen = dict(vars(pl_module)), set[int]()
    restores = [restore for module in plain for restore in _attributes(module, seen)]
    restores += _metrics(pl_module)
    try:
        yield
    finally:
        own = vars(pl_module)
        for name in own.keys() - before.keys():
            del own[name]
        own.update(before)
        with torch.no_grad():
            for restore in restores:
                restore()


def _attributes(module: nn.Module, seen: set[int]) -> Iterator[_Restore]:
    # buffers and attributes together: a module may note in one what it keeps in the other
    data = {n: v for n, v in vars(module).items() if n not in _OF_TORCH and isinstance(v, _DATA)}
    yield lambda: vars(module).update(data)
    yield from _contents([*data.values(), module._buffers], seen)


def _contents(value: Any, seen: set[int]) -> Iterator[_Restore]:
    """How to restore a tensor, an array or a container, and everything inside it."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter):
            yield _tensor(value)
    elif isinstance(value, np.ndarray):
        yield _array(value)
    elif isinstance(value, _CONTAINERS):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _contents(each, seen)
        if not isinstance(value, tuple):
            yield _container(value)


def _tensor(tensor: Tensor) -> _Restore:
    if tensor.is_inference():  # nothing can change it in place
        return lambda: None
    version, kept = tensor._version, tensor.detach().clone()
    # by the version: comparing the values would wait for the device
    return lambda: None if tensor._version == version else _write(tensor, kept)


def _write(tensor: Tensor, kept: Tensor) -> None:
    tensor.detach().copy_(kept)


def _array(array: np.ndarray[Any, Any]) -> _Restore:
    kept = array.copy()
    return lambda: array.__setitem__(..., kept) if array.flags.writeable else None


def _container(container: Any) -> _Restore:
    kept = container.copy()

    def refill() -> None:
        container.clear()
        if isinstance(container, list | deque):
            container.extend(kept)
        else:
            container.update(kept)

    return refill


def _metrics(pl_module: nn.Module) -> list[_Restore]:
    """How to give the module's metrics back what they hold now; they are reset, for the context."""
    metrics = [module for module in pl_module.modules() if isinstance(module, Metric)]
    states = [{k: list(v) if isinstance(v, list) else v for k, v in vars(metric).items()} for metric in metrics]
    for metric in metrics:
        metric.reset()
    return [partial(vars(metric).update, state) for metric, state in zip(metrics, states, strict=True)]
