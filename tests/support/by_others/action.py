"""What somebody does to a model, as an entry of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.support.by_others.world import ARCHITECTURES, Model, World

EVERY = tuple(ARCHITECTURES)
CAUSAL = ("llama", "gpt2", "opt", "mixtral")  # without a norm after the add; their zero branches survive training


@dataclass(frozen=True)
class Action:
    """Something that others do.

    Args:
        name: What they do, in a few words.
        do: Does it, and yields the model after each of its steps. The last one is judged.
        architectures: Names of the models that it is tried on.
        steps: How often it yields.
        moments: After how many of its steps sublayers are dropped.
        follows: Whether the action changes what the model computes, so that the reference must undergo it, too.
        trains: Whether it trains. Then the reference becomes zero at the moment of the drop, instead of before.
        named: Whether the result is a model of which one may ask what is dropped, and which layershed may save.
        tolerance: Largest difference of the logits.
    """

    name: str
    do: Callable[[World], Iterator[Model]]
    architectures: tuple[str, ...]
    steps: int
    moments: tuple[int, ...]
    follows: bool
    trains: bool
    named: bool
    tolerance: float


@dataclass(frozen=True)
class Case:
    """An action on one architecture, with the drop at one moment."""

    architecture: str
    action: Action
    moment: int

    @property
    def name(self) -> str:
        """Such as ``llama: peft merges, drop first``."""
        last = self.action.steps
        when = "first" if self.moment == 0 else "last" if self.moment == last else f"after step {self.moment}"
        return f"{self.architecture}: {self.action.name}, drop {when}"


Table = dict[str, Action]


def action(
    table: Table,
    name: str,
    architectures: tuple[str, ...] = EVERY,
    *,
    steps: int = 1,
    moments: tuple[int, ...] | None = None,
    follows: bool = False,
    trains: bool = False,
    named: bool = True,
    tolerance: float = 1e-4,
) -> Callable[[Callable[[World], Iterator[Model]]], Callable[[World], Iterator[Model]]]:
    """Enter a function in a table; without ``moments`` the drop is tried at each moment."""

    def enter(do: Callable[[World], Iterator[Model]]) -> Callable[[World], Iterator[Model]]:
        when = tuple(range(steps + 1)) if moments is None else moments
        table[name] = Action(name, do, architectures, steps, when, follows or trains, trains, named, tolerance)
        return do

    return enter


def cases(table: Table) -> Iterator[Case]:
    """Every case of a table."""
    for entry in table.values():
        for architecture in entry.architectures:
            for moment in entry.moments:
                yield Case(architecture, entry, moment)
