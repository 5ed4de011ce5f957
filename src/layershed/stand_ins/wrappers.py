"""Finds a stand-in inside the wrappers that other libraries put around a module's forward."""

from __future__ import annotations

from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from layershed.stand_ins.stand_in import StandIn

_DEPTH = 4  # wrappers around wrappers: accelerate's, then a user's


def override_of(module: nn.Module) -> StandIn | None:
    """The stand-in that runs if a module is called, also inside a wrapper of its forward; None without one."""
    forward = module.__dict__.get("forward")
    found = None if forward is None else _inside(forward, _DEPTH)
    return None if found is None or found.original is not None else found


def is_wrapped(module: nn.Module, stand_in: StandIn) -> bool:
    """Whether another library wrapped a stand-in of this module."""
    forward = module.__dict__.get("forward")
    return forward is not None and forward is not stand_in and _inside(forward, _DEPTH) is stand_in


def _inside(function: Any, depth: int) -> StandIn | None:
    """The stand-in that a wrapper calls: found in what it wraps, in its arguments and in its closure."""
    if isinstance(function, StandIn):
        return function
    if depth == 0:
        return None
    inner: list[Any] = [getattr(function, "__wrapped__", None)]
    if isinstance(function, partial):
        inner += [function.func, *function.args, *function.keywords.values()]
    elif isinstance(function, MethodType):
        inner += [function.__func__, function.__self__]
    elif isinstance(function, FunctionType):
        inner += [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    elif callable(function) and not isinstance(function, nn.Module | type):
        inner += vars(function).values() if hasattr(function, "__dict__") else ()
    callables = (each for each in inner if callable(each) and not isinstance(each, nn.Module | type))
    return next((found for each in callables if (found := _inside(each, depth - 1)) is not None), None)


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
