"""Finds callbacks that never act because ``--trainer.max_steps`` shortened a run, before the model is built."""

from __future__ import annotations

import pydoc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from layershed.cli.named_callbacks import OPTION
from layershed.errors import ScheduleError
from layershed.files.run_config import named_entries

_SHARE = 0.6  # of the run, after which the last change of the model is suggested


@dataclass(frozen=True)
class _Acting:
    """A callback of a config that acts at steps: its name in the config, its class and its options."""

    name: str | None
    kind: str
    options: dict[str, int]

    @property
    def changes(self) -> bool:
        """Whether it changes the model, so that training must follow."""
        return "start" in self.options

    @property
    def last(self) -> int:
        """The last step at which it changes the model, or the first at which it measures."""
        every = self.options.get("every_n_steps", 0)
        return self.options.get("start", every) + every * (self.options.get("rounds", 1) - 1)

    def acts_in(self, steps: int) -> bool:
        return self.last < steps if self.changes else self.last <= steps

    def moved(self, share: float) -> _Acting:
        options = {name: max(1, int(value * share)) for name, value in self.options.items() if name != "rounds"}
        return replace(self, options={**self.options, **options})

    def set(self) -> str:
        """What to add to the command line, or to the config if the callback has no name, to have these options."""
        named = [(name, value) for name, value in self.options.items() if name != "rounds"]
        if self.name is None:
            return ", ".join(f"{name}: {value}" for name, value in named)
        return " ".join(f"--{OPTION}.{self.name}.{name} {value}" for name, value in named)

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(f'{name}={value}' for name, value in self.options.items())})"


def check_steps(trainer: Any) -> list[str]:
    """Refuse a run that ends before a callback of layershed changes the model.

    Args:
        trainer: The Trainer's parsed config.

    Returns:
        Notes about callbacks that only measure, and never do.

    Raises:
        ScheduleError: If a drop, a quantization or a recovery starts too late. It names the options to move.
    """
    steps = trainer.get("max_steps")
    if steps is None or steps < 1 or trainer.get("fast_dev_run"):
        return []
    acting = list(_acting(trainer.get("callbacks")))
    changing = [one for one in acting if one.changes]
    late = next((one for one in changing if not one.acts_in(steps)), None)
    if late is not None:
        # all move together, so that they keep their order
        moved = [one.moved(_SHARE * steps / max(one.last for one in changing)) for one in changing]
        verb = "never acts" if late.options["start"] >= steps else "does not finish"
        told = f"{late} {verb} in max_steps={steps}"
        if not all(one.acts_in(steps) for one in moved):
            raise ScheduleError(f"{told}: train longer, at least {max(one.last for one in changing) + 1} steps.")
        raise ScheduleError(f"{told}: {_advice(moved)}.")
    measuring = [one for one in acting if not one.changes and not one.acts_in(steps)]
    return [f"{one} never acts in max_steps={steps}: {_advice([one.moved(steps / one.last / 6)])}" for one in measuring]


def _acting(callbacks: Any) -> Iterator[_Acting]:
    for name, entry in named_entries(callbacks):
        kind = pydoc.locate(entry.class_path) if entry is not None else None
        given = entry.get("init_args") or {} if kind is not None else {}
        options = {key: given[key] for key in ("start", "every_n_steps", "rounds") if type(given.get(key)) is int}
        if "rounds" in options and options["rounds"] == 1:
            del options["rounds"]
        ours = isinstance(kind, type) and kind.__module__.startswith("layershed.callbacks.")
        if ours and {"start", "every_n_steps"} & options.keys():
            yield _Acting(name, entry.class_path.rpartition(".")[2], options)


def _advice(moved: list[_Acting]) -> str:
    named = [one.set() for one in moved if one.name is not None]
    return f"add {' '.join(named)}" if named else f"set {'; '.join(one.set() for one in moved)} in the config"
