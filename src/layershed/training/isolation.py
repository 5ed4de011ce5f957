"""Whether a model keeps packed conversations apart: measured, not looked up."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from layershed.discovery.find import find_transformer, predicts_next_token
from layershed.discovery.probe import evaluating
from layershed.errors import LayershedError
from layershed.integration.namespaces import rank_zero_warn

_TOKENS = 6  # of each of the two conversations of the probe
_NEAR = 1e-3  # times the spread of the logits; a leak is larger, the rounding of float32 smaller


def packs(module: nn.Module, where: str) -> bool:
    """Whether conversations may be packed for a model; says so once if not.

    Args:
        module: A module that holds a causal language model.
        where: How the message names the data.
    """
    reason = why_not_apart(module)
    if reason is not None:
        rank_zero_warn(
            f"{where}: each conversation is padded to a row of its own, because {type(module).__name__} {reason}. Set "
            "data.packing to false to do so without this message."
        )
    return reason is None


def why_not_apart(module: nn.Module) -> str | None:
    """Why conversations must not be packed for a model, in a few words; None if they may.

    A packed sequence holds two conversations, with positions that begin again at 0 and without an attention mask. The
    logits of the second must not change with the tokens of the first, and must equal those of the second alone. Two
    such sequences run in one batch, in eval mode, without gradients; the random states do not move. The trial
    counts only if the first tokens do change something in one conversation.

    Args:
        module: A module that holds a causal language model.
    """
    try:
        transformer = find_transformer(module)
    except LayershedError:
        return "holds no transformer that is known before training"
    if not predicts_next_token(transformer) or "position_ids" not in inspect.signature(transformer.forward).parameters:
        return "takes no position_ids"
    parameter = next(transformer.parameters(), None)
    if parameter is None or parameter.is_meta:
        return "has no weights yet, so it cannot be tried"
    ids = _token_ids(transformer).to(parameter.device)  # (2, 3, tokens)
    first, other, second = ids.unbind(1)
    row = torch.arange(_TOKENS, device=ids.device).expand(2, -1)
    twice, running = torch.cat([row, row], 1), torch.cat([row, row + _TOKENS], 1)

    def run(places: Tensor, *parts: Tensor) -> Tensor:
        output = transformer(input_ids=torch.cat(parts, 1), position_ids=places, use_cache=False)
        logits: Tensor = output.logits[:, -_TOKENS:]
        return logits

    try:
        with warnings.catch_warnings(), torch.no_grad(), evaluating(transformer):
            warnings.simplefilter("ignore")  # of a trial, not of the run
            packed, changed, alone = run(twice, first, second), run(twice, other, second), run(row, second)
            joined, otherwise = run(running, first, second), run(running, other, second)
    except Exception as error:  # a model of any kind, on any device: such as a kernel that needs a GPU
        return f"cannot be tried ({next(iter(str(error).splitlines()), type(error).__name__)})"
    if _near(joined, otherwise):
        return "shows no effect of earlier tokens, so it cannot be tried"  # such as attention that starts at zero
    if not (_near(packed, changed) and _near(packed, alone)):
        return "lets the tokens of one conversation change the logits of another"
    return None


def _token_ids(transformer: Any) -> Tensor:
    """Random token ids of three conversations in two rows, all different in each place."""
    size = transformer.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(size, (2, 1, _TOKENS), generator=generator)
    step = torch.arange(3).view(1, 3, 1) * max(1, size // 3)
    return (start + step) % size


def _near(one: Tensor, other: Tensor) -> bool:
    one, other = one.float(), other.float()
    return bool((one - other).abs().max() <= _NEAR * one.std())
