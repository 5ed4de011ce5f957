"""Sublayers, their importances and the drop plan. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

from layershed.arguments import as_path, check_kind, shown
from layershed.errors import PlanError
from layershed.files.atomic import write_text
from layershed.planning.bar_table import BarTable, plan_table, scores_table
from layershed.planning.model_record import ModelRecord

Kind = Literal["attention", "cross_attention", "mlp"]
Scope = Literal["attention", "cross_attention", "mlp", "block", "joint"]
Action = Literal["bypass", "linear"]

KINDS: tuple[Kind, ...] = get_args(Kind)
SCOPES: tuple[Scope, ...] = get_args(Scope)
ACTIONS: tuple[Action, ...] = get_args(Action)
PLAN_FILE = "drop_plan.json"  # its name in run directories and saved folders
_FORMAT = "layershed.drop_plan.v1"
_ACTION_NAMES = ", ".join(ACTIONS)


@dataclass(frozen=True, order=True)
class Sublayer:
    """One residual branch of a block, ``Y = X + f(norm(X))``.

    Args:
        block: Index of its block, from 0.
        kind: ``"attention"``, ``"cross_attention"`` (a decoder's attention to the encoder's output) or ``"mlp"``.
        path: Dotted path of the module that computes f, from the transformer's root.

    Example:
        >>> Sublayer(3, "attention", "model.layers.3.self_attn").name
        'attention.3'
    """

    block: int
    kind: Kind
    path: str

    @property
    def name(self) -> str:
        """Short name for logs and tables, such as ``attention.3``."""
        return f"{self.kind}.{self.block}"


class ImportanceScores(dict[Sublayer, float]):
    """Importance of every sublayer, and of every block, from one pass over the data.

    A ``dict[Sublayer, float]``; low means redundant, droppable. Sublayers that are already dropped are absent.

    Args:
        scores: Importance by sublayer.
        blocks: Importance by block index, measured from a block's input to its output.
        metric: Name of the metric that measured them.
        tokens: Number of tokens in the average.
        model: The record of the measured model; None if unknown.
    """

    def __init__(
        self,
        scores: Mapping[Sublayer, float],
        *,
        blocks: Mapping[int, float] | None = None,
        metric: str = "cosine",
        tokens: int = 0,
        model: ModelRecord | None = None,
    ) -> None:
        for value, what in ((scores, "scores"), ({} if blocks is None else blocks, "blocks")):
            if not isinstance(value, Mapping):
                raise PlanError(f"ImportanceScores: {what} must be a mapping to numbers, got {shown(value)}.")
        super().__init__(scores)
        self.blocks = dict(blocks or {})
        self.metric = metric
        self.tokens = tokens
        self.model = model

    def __repr__(self) -> str:
        return (
            f"ImportanceScores({super().__repr__()}, blocks={self.blocks!r}, metric={self.metric!r}, "
            f"tokens={self.tokens!r}, model={self.model!r})"
        )

    def __str__(self) -> str:
        return self._table().text()

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> BarTable:
        values: dict[tuple[int, str], float] = {
            (sublayer.block, sublayer.kind): value for sublayer, value in self.items()
        }
        return scores_table(values, KINDS, self.metric, self.tokens)

    def rows(self) -> Iterator[tuple[int, str, float]]:
        """Yield rows (block, kind, importance): first all sublayers, then all blocks."""
        for sublayer in sorted(self):
            yield sublayer.block, sublayer.kind, self[sublayer]
        for block in sorted(self.blocks):
            yield block, "block", self.blocks[block]


@dataclass(frozen=True)
class Drop:
    """One entry of a drop plan.

    Args:
        sublayer: The sublayer to drop.
        score: The importance that it was chosen by. With scope ``"block"`` this is the importance of the block.
        step: The optimizer step of the drop; None outside training.
        action: ``"bypass"``: nothing runs in its place. ``"linear"``: a linear map of its norm's output does.
        rank: Rank of the linear map; None for a full matrix.
    """

    sublayer: Sublayer
    score: float | None = None
    step: int | None = None
    action: Action = "bypass"
    rank: int | None = None


@dataclass(frozen=True)
class DropPlan:
    """The ordered sublayers to drop, with scores and provenance. Iterating yields the sublayers.

    Args:
        drops: The entries, in the order in which they were chosen.
        scope: The scope of the ranking, one of ``SCOPES``.
        metric: Name of the importance metric; None for a plan written by hand.
        model: The record of the model that it was made for; None if unknown. Other models refuse the plan.

    Raises:
        PlanError: If a sublayer appears twice or a field is invalid.

    Example:
        >>> plan = DropPlan((Drop(Sublayer(1, "mlp", "model.layers.1.mlp"), 0.02),), scope="mlp", metric="cosine")
        >>> DropPlan.from_json(plan.to_json()) == plan
        True
    """

    drops: tuple[Drop, ...] = field(default=())
    scope: Scope = "joint"
    metric: str | None = None
    model: ModelRecord | None = None

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise PlanError(f"DropPlan(scope={self.scope!r}): scope must be one of {', '.join(SCOPES)}.")
        check_kind(self.drops, (tuple, list), "DropPlan: drops", PlanError)
        seen: set[tuple[int, Kind]] = set()
        for drop in self.drops:
            check_kind(drop, Drop, "DropPlan: each of drops", PlanError)
            sublayer = drop.sublayer
            check_kind(sublayer, Sublayer, "DropPlan: the sublayer of a drop", PlanError)
            if drop.action not in ACTIONS:
                raise PlanError(f"DropPlan: action {drop.action!r} of {sublayer.name} must be one of {_ACTION_NAMES}.")
            if drop.rank is not None and (drop.rank < 1 or drop.action != "linear"):
                raise PlanError(f"DropPlan: rank {drop.rank} of {sublayer.name}: only a linear map has one, from 1 on.")
            if sublayer.kind not in KINDS:
                kinds = ", ".join(KINDS)
                raise PlanError(f"DropPlan: {sublayer} has the kind {sublayer.kind!r}; it must be one of {kinds}.")
            if (sublayer.block, sublayer.kind) in seen:
                raise PlanError(f"DropPlan: {sublayer.name} appears twice. List it once.")
            seen.add((sublayer.block, sublayer.kind))

    def __iter__(self) -> Iterator[Sublayer]:
        return (drop.sublayer for drop in self.drops)

    def __len__(self) -> int:
        return len(self.drops)

    def __contains__(self, sublayer: object) -> bool:
        return any(sublayer == own for own in self)

    def __str__(self) -> str:
        return self._table().text()

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> BarTable:
        counts = ", ".join(f"{number} {kind}" for kind, number in count_by_kind(self).items() if number)
        by = f", by {self.metric}" if self.metric else ""
        drops = [(_label(drop), drop.score, drop.step) for drop in self.drops]
        return plan_table(f"drop plan ({self.scope}{by}): {counts or 'nothing'}", drops)

    def __add__(self, later: DropPlan) -> DropPlan:
        """Append a later round of the same schedule.

        Raises:
            PlanError: If the two are for different models, or a sublayer is in both.
        """
        if None not in (self.model, later.model) and self.model != later.model:
            raise PlanError(f"The two plans are for different models: {self.model}, and {later.model}.")
        return replace(later, drops=self.drops + later.drops, model=later.model or self.model)

    def at_step(self, step: int) -> DropPlan:
        """Copy the plan and set the optimizer step of every entry."""
        return replace(self, drops=tuple(replace(drop, step=step) for drop in self.drops))

    def with_action(
        self, action: Action, sublayers: Iterable[Sublayer] | None = None, *, rank: int | None = None
    ) -> DropPlan:
        """Copy the plan and set the action of some entries, or of all.

        Raises:
            PlanError: If there is no such action.
        """
        chosen = set(self if sublayers is None else sublayers)
        drops = (replace(d, action=action, rank=rank) if d.sublayer in chosen else d for d in self.drops)
        return replace(self, drops=tuple(drops))

    def to_dict(self) -> dict[str, Any]:
        """Convert the plan to plain primitives, for JSON and for checkpoints."""
        return {
            "format": _FORMAT,
            "scope": self.scope,
            "metric": self.metric,
            **({} if self.model is None else {"model": self.model.to_dict()}),
            "drops": [_drop_to(drop) for drop in self.drops],
        }

    @classmethod
    def from_dict(cls, content: object) -> DropPlan:
        """Read the result of :meth:`to_dict`. Checks every field, so that an untrusted file is safe to read.

        Raises:
            PlanError: If a field is missing or of the wrong type. The error names the field.
        """
        fields = _typed(content, dict, "the plan")
        if fields.get("format") != _FORMAT:
            raise PlanError(f"Drop plan: format is {fields.get('format')!r}, expected {_FORMAT!r}.")
        drops = tuple(_drop_from(entry) for entry in _typed(fields.get("drops"), list, "drops"))
        metric = None if fields.get("metric") is None else _typed(fields["metric"], str, "metric")
        model = None if fields.get("model") is None else ModelRecord.from_dict(fields["model"])
        return cls(drops, cast(Scope, _typed(fields.get("scope"), str, "scope")), metric, model)

    def to_json(self) -> str:
        """Convert the plan to JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> DropPlan:
        """Read the result of :meth:`to_json`.

        Raises:
            PlanError: If the text is not JSON or not a drop plan.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"Drop plan: not JSON ({error}).") from None
        return cls.from_dict(content)

    def save(self, path: str | Path) -> None:
        """Write the plan as a JSON file, atomically.

        Raises:
            ExportError: If the disk is full or the path is not writable.
        """
        write_text(as_path(path, "Drop plan: the file", PlanError), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> DropPlan:
        """Read a plan that :meth:`save` wrote.

        Raises:
            PlanError: If the file does not exist or holds no drop plan. The error names the file.
        """
        path = as_path(path, "Drop plan: the file", PlanError)
        if not path.is_file():
            raise PlanError(f"Drop plan: there is no file {str(path)!r}. Check the path.")
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (PlanError, UnicodeDecodeError) as error:
            raise PlanError(f"{path}: {error}") from None


def count_by_kind(sublayers: Iterable[Sublayer]) -> dict[Kind, int]:
    """Count the sublayers of each kind. Zeros are included, except for cross-attention, which few models have."""
    kinds = [sublayer.kind for sublayer in sublayers]
    return {kind: kinds.count(kind) for kind in KINDS if kind in kinds or kind != "cross_attention"}


def _typed(value: object, kind: type, where: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise PlanError(f"Drop plan: {where} must be of type {kind.__name__}, got {value!r}.")
    return value


def _number(value: object, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise PlanError(f"Drop plan: {where} must be a number, got {value!r}.")
    try:
        number = float(value)
    except OverflowError:
        raise PlanError(f"Drop plan: {where} is too large for a float.") from None
    if math.isnan(number):
        raise PlanError(f"Drop plan: {where} must be a number, got {number}.")
    return number


def sublayer_from(entry: object) -> Sublayer:
    """Build a sublayer from a mapping that was read from a file. Checks every field.

    Raises:
        PlanError: If a field is missing or of the wrong type. The error names the field.
    """
    fields = _typed(entry, dict, "a sublayer")
    block = _typed(fields.get("block"), int, "block")
    if block < 0:
        raise PlanError(f"Drop plan: block must not be negative, got {block}.")
    kind, path = _typed(fields.get("kind"), str, "kind"), _typed(fields.get("path"), str, "path")
    if kind not in KINDS:
        raise PlanError(f"Drop plan: unknown kind {kind!r}; it must be one of {', '.join(KINDS)}.")
    return Sublayer(block, cast(Kind, kind), path)


def _drop_from(entry: object) -> Drop:
    fields = _typed(entry, dict, "an entry of drops")
    score, step = fields.get("score"), fields.get("step")
    if step is not None and _typed(step, int, "step") < 0:
        raise PlanError(f"Drop plan: step must not be negative, got {step}.")
    action = _typed(fields.get("action", "bypass"), str, "action")
    return Drop(
        sublayer_from(fields),
        None if score is None else _number(score, "score"),
        step,
        cast(Action, action),
        None if fields.get("rank") is None else _typed(fields["rank"], int, "rank"),
    )


def _drop_to(drop: Drop) -> dict[str, Any]:
    action: dict[str, Any] = {} if drop.action == "bypass" else {"action": drop.action, "rank": drop.rank}
    return {**asdict(drop.sublayer), "score": drop.score, "step": drop.step, **action}


def _label(drop: Drop) -> str:
    size = "" if drop.rank is None else f" of rank {drop.rank}"
    return drop.sublayer.name if drop.action == "bypass" else f"{drop.sublayer.name}, {drop.action}{size}"
