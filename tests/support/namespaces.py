"""The tests under Lightning's other name: what they import of ``lightning`` then comes from the second namespace.

The variable LAYERSHED_LIGHTNING chooses it, for one process and its children; tests/__init__.py reads it:

- ``second``: both are installed, and layershed's functions come from ``lightning``. This is what a project has whose
  files import layershed first, as the alphabet has it.
- ``only second``: ``lightning`` cannot be found, as if it were not installed.
"""

import builtins
import importlib
import os
import sys
from importlib.machinery import PathFinder
from typing import Any

VARIABLE = "LAYERSHED_LIGHTNING"
SECOND, ONLY_SECOND = "second", "only second"
FIRST = "lightning"
OURS = ("tests", "benchmarks")
PARENTS = ("tests", "tests.support")


class Lightning:
    """What ``import lightning`` gives to a test under the second name."""

    def __init__(self, namespace: Any) -> None:
        self.namespace = namespace

    def __getattr__(self, name: str) -> Any:
        if name in self.namespace._fields:
            return importlib.import_module(getattr(self.namespace, name))
        return getattr(importlib.import_module(self.namespace.pytorch), name)


def translate(namespace: Any) -> None:
    """Make the import statements of the tests give this namespace's modules, and nobody else's."""
    importing = builtins.__import__

    def translated(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        asking = str((globals or {}).get("__package__") or (globals or {}).get("__name__"))
        root, _, place = name.partition(".")
        if level or root != FIRST or asking.partition(".")[0] not in OURS:
            return importing(name, globals, locals, fromlist, level)
        package, _, rest = place.partition(".")
        if not package or not fromlist:
            return Lightning(namespace)
        module = ".".join(filter(None, (getattr(namespace, package), rest)))
        return importlib.import_module(module)

    builtins.__import__ = translated


def forget(*more: str) -> None:
    """Make a fork of a process with both Lightnings and layershed one that has imported none of them, nor of more."""
    roots = ("layershed", "lightning", "lightning_fabric", "pytorch_lightning", *OURS, *more)
    kept = {__name__, *PARENTS}
    for name in [name for name in sys.modules if name.partition(".")[0] in roots and name not in kept]:
        del sys.modules[name]


def hide(package: str) -> None:
    """Make a package one that is not installed."""
    assert package not in sys.modules
    found = PathFinder.find_spec
    # bound, as pytest expects it
    hiding: Any = classmethod(lambda _, name, *more: None if name.partition(".")[0] == package else found(name, *more))
    PathFinder.find_spec = hiding  # type: ignore[method-assign]


def begin() -> None:
    """Do what the variable says; the tests' modules that were imported before are imported anew."""
    asked = os.environ.get(VARIABLE)
    if not asked or builtins.__import__.__name__ == "translated":
        return
    if asked == ONLY_SECOND:
        hide(FIRST)
    from layershed.integration.namespaces import NAMESPACES, installed

    first, second = NAMESPACES
    assert installed() == ((first, second) if asked == SECOND else (second,))
    translate(second)
    kept = {__name__, *PARENTS}
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS and name not in kept]:
        del sys.modules[name]
