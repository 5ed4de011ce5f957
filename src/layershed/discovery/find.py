"""Finding the sublayers of a transformer by what it does, and proving what was found.

One forward pass over a few tokens is recorded, operation by operation. Each block's output is followed back to its
input, so that the residual identity ``Y = X + f(norm(X))`` is proven for any weights,
including zero-initialised ones, and for a skeleton without weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from threading import RLock
from typing import Any, TypeGuard

from torch import nn
from transformers import PreTrainedModel

from layershed.discovery.anatomy import Anatomy, take_apart
from layershed.discovery.autocast import no_ambient_autocast
from layershed.discovery.branches import LeftAlone
from layershed.discovery.fingerprint import Fingerprint, fingerprint
from layershed.discovery.finite import refuse_not_finite
from layershed.discovery.probe import gathered, outputs_of, quietly, refuse_hidden_cache, run_probe, watch_cache
from layershed.discovery.proofs import Proofs
from layershed.discovery.registry import registered_adapter
from layershed.errors import AmbiguousModelError, NoSublayersFoundError, UnprovenStructureError
from layershed.planning.plan import Sublayer
from layershed.stand_ins.stand_in import RemovedModule

_PROOFS: Proofs[Anatomy] = Proofs()
_LOCK = RLock()  # a probe adds hooks to the model and removes them


def find_sublayers(model: nn.Module, *, name: str | None = None) -> tuple[Sublayer, ...]:
    """Every attention and MLP sublayer of a model, in forward order, bypassed ones included.

    Args:
        model: A Hugging Face transformer, one with a :class:`SublayerAdapter`, or any module that holds one (a
            LightningModule, a PeftModel, ...).
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Returns:
        The sublayers, without those that were removed and without what :func:`find_left_alone` names. Blocks are
        counted from 0 in forward order, an encoder's before its decoder's.

    Raises:
        NoSublayersFoundError: If there is no transformer, or none with attention blocks.
        AmbiguousModelError: If the module holds several transformers and none is named.
        UnprovenStructureError: If Y = X + f(norm(X)) does not hold for a block; the error names the block. If the
            output of a block holds NaN or infinite values; the error names the parameter that holds them. Values that
            reach no block's output are not noticed: those of the head, of unused embedding rows, or of a query that
            fused attention skips.
    """
    return tuple(branch.sublayer for branch in dissect(model, name=name).branches)


def find_left_alone(model: nn.Module, *, name: str | None = None) -> tuple[LeftAlone, ...]:
    """The parts of the blocks that cannot be dropped, such as the state-space mixers of a hybrid, with the reasons.

    Args:
        model: As of :func:`find_sublayers`.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Raises:
        LayershedError: As :func:`find_sublayers`.
    """
    return dissect(model, name=name).left_alone


def dissect(model: nn.Module, *, name: str | None = None) -> Anatomy:
    """As :func:`find_sublayers`, with the modules around each sublayer and everything else in the blocks.

    The proof is made once for each state of a model and kept as long as the model lives. With a known proof, one plain
    forward pass checks that the numbers are finite.
    """
    transformer = find_transformer(model, name=name)
    refuse_strangers(transformer)
    secure_quantized(transformer)
    with _LOCK, gathered(transformer), quietly(transformer), no_ambient_autocast(transformer):
        state = fingerprint(transformer)
        anatomy = None if state is None else _PROOFS.find(transformer, state)
        if anatomy is None:
            anatomy = _prove(transformer, state)
        else:  # torch counts no writes by fused optimizers or through tensor.data, so the numbers may have changed
            refuse_not_finite(transformer, outputs_of(transformer, anatomy.paths))
    if not anatomy.branches:
        raise NoSublayersFoundError(_nothing_found(transformer, anatomy.left_alone))
    return anatomy.copy()


def _prove(transformer: nn.Module, state: Fingerprint | None) -> Anatomy:
    tape, slots = run_probe(transformer), watch_cache(transformer)
    anatomy, of_zeros = take_apart(transformer, tape, slots)
    if slots is None and any(branch.sublayer.kind == "attention" for branch in anatomy.branches):
        refuse_hidden_cache(transformer)
    outputs = [call.output for path in anatomy.paths for call in tape.calls_of(path)]
    refuse_not_finite(transformer, [tape.tensors[output] for output in outputs if output is not None])
    if state is not None and not of_zeros:  # a branch that is zero for now may turn out to mix tokens
        _PROOFS.keep(transformer, state, anatomy)
    return anatomy


def secure_quantized(model: nn.Module) -> None:
    """Make layers of bitsandbytes that transformers loaded safe to run, to train around and to checkpoint."""
    if any(type(module).__module__.startswith("bitsandbytes.") for module in model.modules()):
        from layershed.discovery.bnb_layers import secure  # only here: it imports bitsandbytes

        secure(model)


def refuse_strangers(transformer: nn.Module) -> None:
    """Refuse a model whose stand-ins come from the modelling file of a standalone folder.

    Raises:
        UnprovenStructureError: If it is such a model.
    """
    for module in transformer.modules():
        if type(module).__name__ == RemovedModule.__name__ and not isinstance(module, RemovedModule):
            raise UnprovenStructureError(
                f"{type(transformer).__name__} was loaded by the modelling file of a standalone folder, with stand-ins "
                "of its own. Load it with layershed.load_pretrained."
            )


def _nothing_found(transformer: nn.Module, left_alone: Sequence[LeftAlone]) -> str:
    name = type(transformer).__name__
    if not left_alone and any(isinstance(module, RemovedModule) for module in transformer.modules()):
        return f"{name} has no sublayer left: every one was removed."
    if left_alone:
        return f"{name} has no sublayer to drop. For example, {left_alone[0].path}: {left_alone[0].reason}."
    return f"{name} has no list of blocks with attention in them, so nothing can be dropped."


def find_transformer(model: nn.Module, *, name: str | None = None) -> nn.Module:
    """The transformer that a module is or holds (through Lightning, PEFT, DDP or torch.compile).

    A Hugging Face one, or one whose class has a :class:`SublayerAdapter`.

    Args:
        model: Any module.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Raises:
        NoSublayersFoundError: If it holds none, or none under that name.
        AmbiguousModelError: If it holds several; the error names them.
    """
    given: Any = model
    if not isinstance(given, nn.Module):
        raise NoSublayersFoundError(
            f"The model must be a torch module, got {given!r:.60}. Load it first, such as by "
            "AutoModelForCausalLM.from_pretrained or layershed.load_pretrained."
        )
    if name is not None:
        model = _submodule(model, name)
    found: dict[str, Any] = {}
    for path, transformer in transformers_in(model):
        if not any(transformer is other for other in found.values()):
            found[path] = transformer
    if not found:
        raise NoSublayersFoundError(
            f"{type(model).__name__} holds no Hugging Face transformer (PreTrainedModel) and no module whose class has "
            "a SublayerAdapter. Register one: layershed.register_adapter."
        )
    if len(found) > 1:
        raise AmbiguousModelError(
            f"{type(model).__name__} holds {len(found)} transformers: {', '.join(found)}. Name one: name= in the "
            "functions, transformer= in the callbacks."
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


def transformers_in(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost transformers of a module, with their paths."""
    if isinstance(module, PreTrainedModel) or registered_adapter(module) is not None:
        yield path, module
        return
    for child_name, child in module.named_children():
        yield from transformers_in(child, f"{path}.{child_name}" if path else child_name)
