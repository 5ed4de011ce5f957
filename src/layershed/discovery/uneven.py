"""Sublayers that are left alone although those of the same make in other blocks can be dropped: a plan lacks them."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

from layershed.discovery.anatomy import Anatomy
from layershed.discovery.find import dissect, find_transformer
from layershed.errors import SelectionError

_DYNAMIC = ("torch.ao.nn.quantized.dynamic", "torch.ao.nn.intrinsic.quantized.dynamic")
_WARNED: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


class Part(NamedTuple):
    """A part of a block.

    Args:
        block: Index of the block.
        make: Equal for parts that are alike: their place in the block and their modules.
        what: The kind of sublayer, or for a part that is left alone, the reason.
    """

    block: int
    make: Hashable
    what: str


def uneven(found: Iterable[Part], left_alone: Iterable[Part]) -> list[str]:
    """Compare the parts that are left alone with the sublayers of other blocks: one phrase for each kind and reason."""
    kinds: dict[Hashable, dict[int, str]] = {}
    for part in found:
        kinds.setdefault(part.make, {})[part.block] = part.what
    groups: dict[tuple[str, str], list[int]] = {}
    for part in left_alone:
        others = [kind for block, kind in kinds.get(part.make, {}).items() if block != part.block]
        if others:
            groups.setdefault((others[0], part.what), []).append(part.block)
    return [
        f"{_plural(kind)} of {_blocks(sorted(set(blocks)))} {_verb(kind)} left alone ({reason}), while "
        f"{'that' if _verb(kind) == 'is' else 'those'} of other blocks can be dropped"
        for (kind, reason), blocks in groups.items()
    ]


def warn_uneven(transformer: nn.Module, anatomy: Anatomy) -> None:
    """Warn once for a model and state if a plan will lack sublayers: others of the same make, or quantized ones."""
    found = [_part(transformer, anatomy, b.sublayer.path, b.sublayer.kind) for b in anatomy.branches]
    alone = [_part(transformer, anatomy, each.path, each.reason) for each in anatomy.left_alone]
    # a block that is left alone as a whole is compared with the blocks of the sublayers
    found += [
        _part(transformer, anatomy, anatomy.paths[part.block], "block")
        for part in found
        if part is not None and part.what == "attention"
    ]
    said = _WARNED.setdefault(transformer, set())
    phrases = uneven(filter(None, found), filter(None, alone))
    if quantized := [each.path for each in anatomy.left_alone if _is_quantized_by_torch(transformer, each.path)]:
        phrases.append(
            f"{len(quantized)} parts are left alone, such as {quantized[0]}, because torch's dynamic quantization "
            "scales by all tokens of a batch at once, so that no token has its own output. Drop first, then quantize"
        )
    for phrase in phrases:
        if phrase not in said:
            said.add(phrase)
            warnings.warn(
                f"{type(transformer).__name__}: {phrase}. A plan cannot hold them. ls.find_left_alone(model) lists "
                "them.",
                stacklevel=3,
            )


def warn_left_alone(model: nn.Module, *, name: str | None = None) -> None:
    """As :func:`warn_uneven`, for a model whose anatomy is not at hand."""
    transformer = find_transformer(model, name=name)
    warn_uneven(transformer, dissect(transformer))


def _is_quantized_by_torch(transformer: nn.Module, path: str) -> bool:
    """Whether a part holds modules of torch's dynamic quantization."""
    return any(type(inner).__module__.startswith(_DYNAMIC) for inner in transformer.get_submodule(path).modules())


@contextmanager
def explaining_empty_scope(model: nn.Module, scope: str, *, name: str | None = None) -> Iterator[None]:
    """Add to a SelectionError of the context what is left alone, if the model has no sublayer of the scope.

    Raises:
        SelectionError: With the first part that is left alone, and the reason.
    """
    try:
        yield
    except SelectionError as error:
        anatomy = dissect(model, name=name)
        kinds = {branch.sublayer.kind for branch in anatomy.branches}
        wanted = {"block": {"attention", "mlp"}, "joint": set()}.get(scope, {scope})
        if not wanted - kinds or not anatomy.left_alone:
            raise
        first, *more = anatomy.left_alone
        others = f", and {len(more)} more parts" if more else ""
        raise SelectionError(
            f"{error} Left alone: {first.path} ({first.reason}){others}. ls.find_left_alone(model) lists them."
        ) from None


def _part(transformer: nn.Module, anatomy: Anatomy, path: str, what: str) -> Part | None:
    for index, block in enumerate(anatomy.paths):
        if path == block or path.startswith(f"{block}."):
            module = transformer.get_submodule(path)
            whole = path == block  # blocks of one class may differ inside, as those of hybrids do
            inside = tuple((name, type(child)) for name, child in module.named_children()) if whole else ()
            return Part(index, (block.rpartition(".")[0], path[len(block) :], type(module), inside), what)
    return None


def _plural(kind: str) -> str:
    return {"mlp": "MLPs", "block": "all parts"}.get(kind, kind.replace("_", "-"))


def _verb(kind: str) -> str:
    return "are" if kind in ("mlp", "block") else "is"


def _blocks(indices: Sequence[int]) -> str:
    if len(indices) == 1:
        return f"block {indices[0]}"
    return f"blocks {', '.join(map(str, indices[:-1]))} and {indices[-1]}"
