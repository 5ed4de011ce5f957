"""Finding the sublayers of a transformer by what it does, and proving what was found.

One forward pass over a few tokens is recorded, operation by operation. Each block's output is followed back to its
input, so that the residual identity ``Y = X + f(norm(X))`` is read off as a fact: for any weights, zero-initialised
ones included, and on a skeleton without any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from torch import Tensor, nn
from transformers import PreTrainedModel

from layershed.discovery.branch_kinds import is_attention, is_symbolic, is_zero
from layershed.discovery.branches import Branch, LeftAlone, Tap, branches_of
from layershed.discovery.probe import gathered, outputs_of, quietly, run_probe, watch_cache
from layershed.discovery.proofs import Proofs, has_new_numbers, numbers_of
from layershed.discovery.recording import Tape
from layershed.discovery.registry import adapter_of
from layershed.discovery.residual_stream import BlockFlow, follow_block
from layershed.discovery.verification import sift
from layershed.errors import AmbiguousModelError, NoSublayersFoundError, UnprovenStructureError
from layershed.planning.plan import Sublayer
from layershed.stand_ins.stand_in import RemovedModule, StandIn


@dataclass(frozen=True)
class Anatomy:
    """What discovery found.

    Args:
        branches: The sublayers in forward order.
        left_alone: What else the blocks add to their stream, and why it cannot be dropped.
        blocks: By index, the block and where it takes X; None where it is left alone as a
            whole, or only a part of a module.
        plain: Indices of the blocks that compute X plus their sublayers' branches and nothing else.
        tokens_first: Whether X is of shape (tokens, batch, hidden), as XLNet's is.
        paths: Paths of all blocks, in the order in which they run.
    """

    branches: tuple[Branch, ...]
    left_alone: tuple[LeftAlone, ...]
    blocks: tuple[Tap | None, ...]
    plain: frozenset[int]
    tokens_first: bool
    paths: tuple[str, ...] = ()

    def copy(self) -> Anatomy:
        """The same with stand-ins of its own, as those may be changed, and without what the recording holds."""

        def own(stand_ins: tuple[tuple[str, StandIn], ...]) -> tuple[tuple[str, StandIn], ...]:
            return tuple((path, replace(stand_in, own={})) for path, stand_in in stand_ins)

        branches = (replace(b, stand_ins=own(b.stand_ins), support=own(b.support), parts=()) for b in self.branches)
        return replace(self, branches=tuple(branches))


_PROOFS: Proofs[Anatomy] = Proofs()


def find_sublayers(model: nn.Module, *, name: str | None = None) -> tuple[Sublayer, ...]:
    """Every attention and MLP sublayer of a model, in forward order, bypassed ones included.

    Args:
        model: A Hugging Face transformer, one with a :class:`SublayerAdapter`, or any module that holds one (a
            LightningModule, a PeftModel, ...).
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Returns:
        The sublayers; those that were removed are absent, and so is what :func:`find_left_alone` names. Blocks count
        from 0 in forward order, an encoder's before its decoder's.

    Raises:
        NoSublayersFoundError: If there is no transformer, or none with attention blocks.
        AmbiguousModelError: If there are several transformers and none is named.
        UnprovenStructureError: If Y = X + f(norm(X)) does not hold for a block; names it. If the weights hold NaN or
            infinite values, so that it cannot be told; names the parameter. Such as do not show in what a block gives,
            like those of the head or of a query (which fused attention may pass over), are not found.
    """
    return tuple(branch.sublayer for branch in dissect(model, name=name).branches)


def find_left_alone(model: nn.Module, *, name: str | None = None) -> tuple[LeftAlone, ...]:
    """What the blocks hold beside their sublayers, such as the state-space mixers of a hybrid, and why it stays.

    Args:
        model: As of :func:`find_sublayers`.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Raises:
        LayershedError: As :func:`find_sublayers`.
    """
    return dissect(model, name=name).left_alone


def dissect(model: nn.Module, *, name: str | None = None) -> Anatomy:
    """As :func:`find_sublayers`, with the modules around each sublayer and everything else in the blocks.

    The proof is made once for each state of a model, as long as the model lives; whether its numbers are finite is
    asked again once they are others.
    """
    transformer = find_transformer(model, name=name)
    refuse_strangers(transformer)
    secure_quantized(transformer)
    with gathered(transformer), quietly(transformer):
        proof, keep = _PROOFS.find(transformer)
        if proof is None:
            anatomy = _prove(transformer, keep)
        else:
            anatomy = proof.answer
            if has_new_numbers(transformer, proof):
                _refuse_not_finite(transformer, outputs_of(transformer, anatomy.paths))
                proof.numbers = numbers_of(transformer)
    if not anatomy.branches:
        raise NoSublayersFoundError(_nothing_found(transformer, anatomy.left_alone))
    return anatomy.copy()


def _prove(transformer: nn.Module, keep: Callable[[Anatomy, bool], None]) -> Anatomy:
    tape, slots = run_probe(transformer), watch_cache(transformer)
    anatomy, of_zeros = _take_apart(transformer, tape, slots)
    outputs = [call.output for path in anatomy.paths for call in tape.calls_of(path)]
    _refuse_not_finite(transformer, [tape.tensors[output] for output in outputs if output is not None])
    keep(anatomy, of_zeros)
    return anatomy


def _take_apart(
    transformer: nn.Module, tape: Tape, slots: Mapping[str, tuple[int, int]] | None
) -> tuple[Anatomy, bool]:
    """What the blocks consist of, and whether a branch in them gave nothing but zeros."""
    branches: list[Branch] = []
    left_alone: list[LeftAlone] = []
    blocks: list[Tap | None] = []
    plain: set[int] = set()
    tokens_first = of_zeros = False
    known: dict[object, bool] = {}
    paths = tuple(_block_paths(transformer, tape))
    for path in paths:
        calls = tape.calls_of(path)
        try:
            if len(calls) != 1:
                raise UnprovenStructureError(f"it ran {len(calls)} times in a forward pass")
            flow = follow_block(tape, calls[0])
        except UnprovenStructureError as error:
            if len(calls) == 1 and any(is_attention(tape, i) for i in range(calls[0].start, calls[0].stop)):
                raise
            left_alone.append(LeftAlone(path, str(error)))
            blocks.append(None)
            continue
        own, others = branches_of(flow, len(blocks), transformer, slots, known)
        own, failed = _sifted(transformer, flow, own, known)
        tokens_first |= calls[0].shapes[flow.source][1:2] == (1,)
        of_zeros |= any(is_zero(tape.tensors[branch.value]) for branch in flow.branches)
        if flow.plain and len(own) == 1 and not [*others, *failed]:
            plain.add(len(blocks))
        blocks += [Tap(path, flow.source)] if len(own) == 1 else [None] * len(own)
        branches += [branch for block in own for branch in block]
        left_alone += [*others, *failed]
    anatomy = Anatomy(tuple(branches), tuple(left_alone), tuple(blocks), frozenset(plain), tokens_first, paths)
    return anatomy.copy(), of_zeros


def secure_quantized(model: nn.Module) -> None:
    """Make layers of bitsandbytes that transformers loaded safe to run, to train around and to checkpoint."""
    if any(type(module).__module__.startswith("bitsandbytes.") for module in model.modules()):
        from layershed.discovery.bnb_layers import secure  # only here: it imports bitsandbytes

        secure(model)


def refuse_strangers(transformer: nn.Module) -> None:
    """Refuse a model that the modelling file of a standalone folder made, with stand-ins of its own.

    Raises:
        UnprovenStructureError: If it is one.
    """
    for module in transformer.modules():
        if type(module).__name__ == RemovedModule.__name__ and not isinstance(module, RemovedModule):
            raise UnprovenStructureError(
                f"{type(transformer).__name__} comes from a standalone folder, by that folder's own modelling file; "
                "load it by layershed.load_pretrained to go on with it here."
            )


def _sifted(
    transformer: nn.Module, flow: BlockFlow, blocks: list[list[Branch]], known: dict[object, bool]
) -> tuple[list[list[Branch]], list[LeftAlone]]:
    """Without the branches that do not stand the trial; those are left alone."""
    good, bad = sift(transformer, flow, [branch for block in blocks for branch in block], known)
    reason = "what would stand in for it does not give what a zero branch gives"
    kept = [
        [branch for branch in good if branch.sublayer.block == block[0].sublayer.block] for block in blocks if block
    ]
    return kept or [[]], [LeftAlone(branch.sublayer.path, reason) for branch in bad]


def _refuse_not_finite(transformer: nn.Module, streams: Iterable[Tensor]) -> None:
    """Refuse numbers that compare with nothing: what was left alone, or was not, may be so for no other reason."""
    if all(is_symbolic(stream) or _is_finite(stream) for stream in streams):
        return
    weights = transformer.named_parameters()
    found = [name for name, weight in weights if weight.is_floating_point() and not _is_finite(weight)]
    if not found:
        raise UnprovenStructureError(
            f"{type(transformer).__name__} gives NaN or infinite values, and its parameters hold none; load it in a "
            "wider precision (bfloat16, float32), or look at its buffers."
        )
    more = f" and {len(found) - 1} more" if found[1:] else ""
    raise UnprovenStructureError(
        f"The weights of {type(transformer).__name__} hold NaN or infinite values, in {found[0]}{more}; load some that "
        "are finite, such as a checkpoint from before its loss became NaN."
    )


def _is_finite(values: Tensor) -> bool:
    if str(values.dtype).startswith("torch.float4"):  # has no other numbers, and an older torch does not have it
        return True
    # of 8 bits torch tells it only for some formats; bfloat16 has the range of all of them
    return bool((values.bfloat16() if values.dtype.itemsize == 1 else values).isfinite().all())


def _nothing_found(transformer: nn.Module, left_alone: Sequence[LeftAlone]) -> str:
    name = type(transformer).__name__
    if not left_alone and any(isinstance(module, RemovedModule) for module in transformer.modules()):
        return f"{name} has no sublayer left: every one was removed."
    if left_alone:
        return f"{name} has no sublayer to drop; {left_alone[0].path}, for one: {left_alone[0].reason}."
    return f"{name} has no list of blocks with attention in them, so there is nothing to drop."


def _block_paths(transformer: nn.Module, tape: Tape) -> Iterator[str]:
    """Paths of the blocks: members of the outermost lists in which attention ran, in the order in which those ran."""
    attention = {i for i in range(len(tape.operations)) if is_attention(tape, i)}
    found: dict[str, int] = {}
    adapter = adapter_of(transformer)
    for path, module in transformer.named_modules():
        if any(path.startswith(f"{outer}.") for outer in found) or len(module._modules) == 0:
            continue
        if adapter is not None and adapter.blocks:
            if path not in adapter.blocks:
                continue
        elif not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        calls = [call for name in module._modules for call in tape.calls_of(f"{path}.{name}")]
        removed = any(isinstance(inner, RemovedModule) for inner in module.modules())
        if calls and (removed or any(i in call for call in calls for i in attention)):
            found[path] = calls[0].start
    for path in sorted(found, key=found.__getitem__):
        yield from (f"{path}.{name}" for name in transformer.get_submodule(path)._modules)


def find_transformer(model: nn.Module, *, name: str | None = None) -> nn.Module:
    """The transformer that a module is or holds (through Lightning, PEFT, DDP or torch.compile).

    A Hugging Face one, or one whose class has a :class:`SublayerAdapter`.

    Args:
        model: Any module.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Raises:
        NoSublayersFoundError: If it holds none, or none under that name.
        AmbiguousModelError: If it holds several; names them.
    """
    if name is not None:
        model = _submodule(model, name)
    found: dict[str, Any] = {}
    for path, transformer in _outermost_transformers(model):
        if not any(transformer is other for other in found.values()):
            found[path] = transformer
    if not found:
        raise NoSublayersFoundError(
            f"{type(model).__name__} holds no Hugging Face transformer (a PreTrainedModel), nor a module whose class "
            "has a SublayerAdapter (register_adapter)."
        )
    if len(found) > 1:
        raise AmbiguousModelError(
            f"{type(model).__name__} holds {len(found)} transformers: {', '.join(found)}. Say which: name= in "
            "the functions, transformer= in the callbacks."
        )
    return next(iter(found.values()))


def predicts_next_token(transformer: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Whether a transformer is a causal language model: neither an encoder nor one with an encoder, and with a head."""
    if not isinstance(transformer, PreTrainedModel) or transformer.config.is_encoder_decoder:
        return False
    return bool(transformer.can_generate()) and transformer.get_output_embeddings() is not None


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise NoSublayersFoundError(f"{type(model).__name__} has no module named {name!r}.") from None


def _outermost_transformers(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, PreTrainedModel) or adapter_of(module) is not None:
        yield path, module
        return
    for child_name, child in module.named_children():
        yield from _outermost_transformers(child, f"{path}.{child_name}" if path else child_name)
