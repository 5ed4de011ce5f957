"""Finding the sublayers of a transformer by its structure, and proving what was found.

One forward pass over a few tokens is enough. Hooks see which module reads whose output (by object identity, so it
needs no numbers), and each branch's output is replaced by random values, so that the residual identity
``Y = X + f(norm(X))`` is proven for any weights, zero-initialised ones included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from layershed.errors import AmbiguousModelError, NoSublayersFoundError, UnprovenStructureError
from layershed.overrides import RemovedModule
from layershed.plan import Kind, Sublayer
from layershed.probe import Probe, run_probe

Topology = Literal["sequential", "parallel"]


@dataclass(frozen=True)
class Branch:
    """A sublayer with what surgery and calibration need to know about it.

    Args:
        sublayer: The sublayer.
        norm: Path of the norm that it reads, or None if it reads X itself.
        tail: Paths of the modules its output passes before the residual add (post-norm, dropout), in order.
        topology: ``"sequential"``: the MLP reads what the attention wrote; ``"parallel"``: both read the same X.
        outputs: Length of the tuple that its module returns, or 0 where it returns a tensor.
    """

    sublayer: Sublayer
    norm: str | None
    tail: tuple[str, ...]
    topology: Topology
    outputs: int

    @property
    def entry(self) -> str:
        """Path of the module whose input is X."""
        return self.norm or self.sublayer.path

    @property
    def exit(self) -> str:
        """Path of the module whose output is the branch b of Y = X + b."""
        return self.tail[-1] if self.tail else self.sublayer.path


def find_sublayers(model: nn.Module, *, name: str | None = None) -> tuple[Sublayer, ...]:
    """Every attention and MLP sublayer of a model, in forward order, bypassed ones included.

    Args:
        model: A Hugging Face transformer, or any module that holds one (a LightningModule, a PeftModel, ...).
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Returns:
        The sublayers; those that were removed are absent.

    Raises:
        NoSublayersFoundError: If there is no transformer, or none with attention blocks.
        AmbiguousModelError: If there are several transformers and none is named.
        UnprovenStructureError: If Y = X + f(norm(X)) does not hold for a branch; names its module.
    """
    return tuple(branch.sublayer for branch in find_branches(model, name=name))


def find_branches(model: nn.Module, *, name: str | None = None) -> tuple[Branch, ...]:
    """As :func:`find_sublayers`, with the modules around each sublayer."""
    transformer = find_transformer(model, name=name)
    prefix, blocks = _find_blocks(transformer)
    cores = {f"{prefix}.{i}": dict(_cores(f"{prefix}.{i}", block)) for i, block in enumerate(blocks)}
    probe = run_probe(transformer, cores)
    branches = []
    for index, (path, kinds) in enumerate(cores.items()):
        branches.extend(_prove_block(index, path, kinds, probe))
    if not branches:
        raise NoSublayersFoundError(f"{_describe(transformer)} has no sublayer left: every one was removed.")
    return tuple(branches)


def find_transformer(model: nn.Module, *, name: str | None = None) -> PreTrainedModel:
    """The Hugging Face transformer that a module is or holds (through Lightning, PEFT, DDP or torch.compile).

    Args:
        model: Any module.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Raises:
        NoSublayersFoundError: If it holds none, or none under that name.
        AmbiguousModelError: If it holds several; names them.
    """
    if name is not None:
        model = _submodule(model, name)
    found: dict[str, PreTrainedModel] = {}
    for path, transformer in _outermost_transformers(model):
        if not any(transformer is other for other in found.values()):
            found[path] = transformer
    if not found:
        raise NoSublayersFoundError(f"{type(model).__name__} holds no Hugging Face transformer (a PreTrainedModel).")
    if len(found) > 1:
        raise AmbiguousModelError(
            f"{type(model).__name__} holds {len(found)} transformers: {', '.join(found)}. Say which: name= in "
            "the functions, transformer= in the callbacks."
        )
    return next(iter(found.values()))


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise NoSublayersFoundError(f"{type(model).__name__} has no module named {name!r}.") from None


def _outermost_transformers(module: nn.Module, path: str = "") -> Iterator[tuple[str, PreTrainedModel]]:
    if isinstance(module, PreTrainedModel):
        yield path, module
        return
    for child_name, child in module.named_children():
        yield from _outermost_transformers(child, f"{path}.{child_name}" if path else child_name)


def _describe(transformer: nn.Module) -> str:
    return type(transformer).__name__


def _find_blocks(transformer: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The longest list of equal modules that hold attention."""
    lists = [
        (path, module)
        for path, module in transformer.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) > 0
        and len({type(member) for member in module}) == 1
        and any(_is_attention(inner) for member in module for inner in member.modules())
    ]
    if not lists:
        raise NoSublayersFoundError(
            f"{_describe(transformer)} has no list of equal blocks with attention in them, so there is nothing to drop."
        )
    return max(lists, key=lambda item: len(item[1]))


def _is_attention(module: nn.Module) -> bool:
    if isinstance(module, RemovedModule):
        return module.override.sublayer.kind == "attention"
    return "attention" in type(module).__name__.lower()


def _cores(block_path: str, block: nn.Module) -> Iterator[tuple[str, Kind]]:
    """The children of a block that hold a linear map, which a norm does not: one per residual branch."""
    for name, child in block.named_children():
        if any(parameter.ndim >= 2 for parameter in child.parameters()):
            yield f"{block_path}.{name}", "attention" if _is_attention(child) else "mlp"


def _prove_block(index: int, block_path: str, kinds: dict[str, Kind], probe: Probe) -> list[Branch]:
    """The branches of one block in the order in which they ran, or an error that says what does not fit."""
    ran = [trace for trace in probe.branches if trace.block == block_path]
    for path in kinds:
        if sum(trace.path == path for trace in ran) != 1:
            raise UnprovenStructureError(f"{path} did not run exactly once in a forward pass.")
    for kind in set(kinds.values()):
        several = [path for path in kinds if kinds[path] == kind]
        if len(several) > 1:
            raise UnprovenStructureError(f"{block_path} holds more than one {kind} module: {', '.join(several)}.")
    for trace in ran:
        if kinds[trace.path] == "mlp" and not trace.tokenwise:
            raise UnprovenStructureError(f"{trace.path} mixes tokens, yet its class is not named attention.")
    topology = probe.topology_of(block_path) if ran else "sequential"
    if topology is None:
        raise UnprovenStructureError(
            f"{block_path}: Y = X + f(norm(X)) does not hold for {' and '.join(kinds)}; "
            "dropping them could silently change the model."
        )
    tails = [path for trace in ran for path in trace.tail]
    # a dropout that two branches pass belongs to neither
    return [
        Branch(
            Sublayer(index, kinds[trace.path], trace.path),
            trace.norm,
            tuple(path for path in trace.tail if tails.count(path) == 1),
            topology,
            trace.outputs,
        )
        for trace in ran
    ]
