"""What a drop plan records of the model that it was made for. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from layershed.errors import PlanError

_RANGES = r"\d+(-\d+)?(, \d+(-\d+)?)*"
_SUBLAYERS = re.compile(rf"(\w+: {_RANGES}(; \w+: {_RANGES})*)?")
_LONGEST = 10_000


@dataclass(frozen=True)
class ModelRecord:
    """Class, size and sublayers of a model.

    Args:
        name: Name of its class.
        blocks: Number of its blocks.
        sublayers: The blocks that have a sublayer of each kind; dropped sublayers are included.

    Raises:
        PlanError: If a field is malformed.

    Example:
        >>> print(ModelRecord("LlamaForCausalLM", 4, "attention: 0-3; mlp: 0, 2-3"))
        LlamaForCausalLM with 4 blocks (attention: 0-3; mlp: 0, 2-3)
    """

    name: str
    blocks: int
    sublayers: str

    def __post_init__(self) -> None:
        for what, value, kind in (
            ("class", self.name, str),
            ("blocks", self.blocks, int),
            ("sublayers", self.sublayers, str),
        ):
            if not isinstance(value, kind) or isinstance(value, bool):
                raise PlanError(f"Drop plan: model.{what} must be of type {kind.__name__}, got {value!r}.")
        if not self.name.isidentifier() or len(self.name) > _LONGEST:
            raise PlanError(f"Drop plan: model.class must be the name of a class, got {self.name[:80]!r}.")
        if self.blocks < 0:
            raise PlanError(f"Drop plan: model.blocks must not be negative, got {self.blocks}.")
        if len(self.sublayers) > _LONGEST or not _SUBLAYERS.fullmatch(self.sublayers):
            raise PlanError(
                f"Drop plan: model.sublayers must be like 'attention: 0-3; mlp: 0, 2-3', got {self.sublayers[:80]!r}."
            )

    def __str__(self) -> str:
        return f"{self.name} with {self.blocks} block{'s' * (self.blocks != 1)} ({self.sublayers or 'no sublayers'})"

    def fits(self, model: ModelRecord, names: Collection[str] = ()) -> bool:
        """Whether a plan for this model fits another one.

        Args:
            model: The record of the other one.
            names: Names of its class and of the classes that this one is derived from; by default only the recorded
                name counts.
        """
        same = (self.blocks, self.sublayers) == (model.blocks, model.sublayers)
        return same and self.name in {model.name, *names}

    def to_dict(self) -> dict[str, Any]:
        """Convert the record to plain primitives."""
        return {"class": self.name, "blocks": self.blocks, "sublayers": self.sublayers}

    @classmethod
    def from_dict(cls, content: object) -> ModelRecord:
        """Read the result of :meth:`to_dict`. Checks every field, so that an untrusted file is safe to read.

        Raises:
            PlanError: If a field is missing or malformed. The error names the field.
        """
        if not isinstance(content, dict):
            raise PlanError(f"Drop plan: model must be of type dict, got {content!r}.")
        name, blocks, sublayers = (content.get(key) for key in ("class", "blocks", "sublayers"))
        return cls(name, blocks, sublayers)  # type: ignore[arg-type]


def compact(places: Iterable[tuple[str, int]]) -> str:
    """The compact form of (kind, block) pairs.

    Example:
        >>> compact([("mlp", 0), ("attention", 0), ("attention", 1), ("mlp", 2)])
        'attention: 0-1; mlp: 0, 2'
    """
    blocks: dict[str, set[int]] = {}
    for kind, block in places:
        blocks.setdefault(kind, set()).add(block)
    return "; ".join(f"{kind}: {', '.join(_ranges(sorted(own)))}" for kind, own in sorted(blocks.items()))


def _ranges(numbers: list[int]) -> list[str]:
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
