"""What a forward pass computes and moves, sublayer by sublayer, from shapes alone: also of a model on the meta device.

With m the numbers in a sublayer's matrices, n new tokens a sequence, c tokens in the cache before them, B sequences:

    FLOPs = 2 m B n + 2 B n (c + n) H (d_k + d_v)        products with weights; Q K^T and the mix of the values
    bytes = weights + activations in and out of each matrix + keys and values read and written

H is the number of query heads, d_k and d_v the sizes of a key and a value. The whole n x (c + n) square of attention
counts, as in torch's FlopCounterMode; a kernel that skips the masked half does less. A sliding window bounds c + n
while decoding. Of experts each token computes its share (k of E), and a pass reads those that some token takes,
E (1 - (1 - k/E)^(B n)) on average if all are as likely. Norms, activation functions, rotations and softmax are left
out.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from layershed.discovery.branches import Branch
from layershed.discovery.find import dissect, find_transformer, predicts_next_token
from layershed.discovery.probe import filled_cache
from layershed.errors import CostError
from layershed.performance.model_size import adapter_parameters, weight_shape
from layershed.performance.roofline import Ceilings, Cost
from layershed.performance.stopwatch import SpeedSettings
from layershed.planning.plan import Sublayer
from layershed.stand_ins.stand_in import RemovedModule
from layershed.surgery import bypassed_sublayers, stopped_by

_Convolution = nn.Conv1d | nn.Conv2d
# What configs call the number of experts that a token takes, the library's own standard name first.
_TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k", "num_experts_per_token")
# What the library calls the matrix that multi-head latent attention turns its cache into keys and values with.
_EXPANSION = "kv_b_proj"


@dataclass(frozen=True)
class PassCosts:
    """The costs of one forward pass.

    Args:
        sublayers: Of every sublayer, bypassed ones included, as if it ran.
        rest: Of everything else: embeddings, head, and what discovery leaves alone.
    """

    sublayers: Mapping[Sublayer, Cost]
    rest: Cost

    def without(self, dropped: Collection[Sublayer]) -> list[Cost]:
        """The pieces of work that remain once ``dropped`` are dropped."""
        return [*(cost for sublayer, cost in self.sublayers.items() if sublayer not in dropped), self.rest]


@dataclass(frozen=True)
class _Attention:
    """Shapes of one attention, read off the model's own cache."""

    query: int  # H (d_k + d_v)
    kept: int  # bytes in the cache per token
    window: int | None
    expansion: tuple[int, ...]  # of the matrix that turns what is cached into keys and values, of every key anew

    def keys(self, tokens: int, context: int) -> int:
        """Keys that a new token is compared with; a prompt is compared with all of itself, and masked."""
        return context + tokens if self.window is None or tokens > 1 else min(context + tokens, self.window)


@dataclass
class _Part:
    """Weights and shapes of a sublayer, or of the rest."""

    matrices: int = 0  # numbers that each token is multiplied with
    activations: int = 0  # numbers in and out of the matrices, per token
    read: int = 0  # bytes of weights that every pass reads
    rows: int = 0  # bytes of the rows that a token takes from embedding tables
    experts: list[tuple[int, int, float]] = field(default_factory=list)  # numbers, bytes, the share that a token takes
    attentions: list[_Attention] = field(default_factory=list)

    def cost(self, batch_size: int, tokens: int, context: int, element: int) -> Cost:
        rows = batch_size * tokens
        flops = 2.0 * self.matrices * rows
        moved = float(self.read + (self.rows + self.activations * element) * rows)
        for numbers, size, share in self.experts:
            flops += 2.0 * numbers * share * rows
            moved += size * (1 - (1 - share) ** rows)
        for attention in self.attentions:
            keys = attention.keys(tokens, context)
            flops += 2.0 * rows * keys * attention.query
            moved += batch_size * (keys + tokens) * attention.kept
            earlier = batch_size * (keys - tokens)  # the new ones are counted among the matrices
            flops += 2.0 * earlier * math.prod(attention.expansion)
            moved += earlier * sum(attention.expansion) * element
        return Cost(flops, moved)


class CostModel:
    """The costs of any forward pass of a causal language model, from one small probe of it.

    Args:
        model: A causal language model, or a module that holds one; on the meta device no weight is needed.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Raises:
        CostError: If the model is no causal language model, or its shapes do not tell what it computes.
        LayershedError: As :func:`~layershed.discovery.find.find_sublayers`.
    """

    def __init__(self, model: nn.Module, *, name: str | None = None) -> None:
        transformer = find_transformer(model, name=name)
        if not predicts_next_token(transformer):
            raise CostError(f"CostModel: {type(transformer).__name__} is no causal language model.")
        self.dropped = bypassed_sublayers(transformer)
        self._name, self._text = type(transformer).__name__, transformer.config.get_text_config()
        self._element = _activation_bytes(transformer)
        self._all_logits = "logits_to_keep" not in inspect.signature(transformer.forward).parameters
        branches = dissect(transformer).branches
        with _noting_runs(transformer) as ran:
            slots = self._slots(transformer, filled_cache(transformer))
        for module in transformer.modules():
            if isinstance(module, RemovedModule) and module.stand_in.layer_idx is not None:
                slots.pop(module.stand_in.layer_idx, None)  # a placeholder
        # what was counted is not counted again: weights that two share are read once
        seen = {id(parameter) for parameter in adapter_parameters(transformer)}
        self._head = self._part(transformer.get_output_embeddings(), seen)
        self._parts: dict[Sublayer, _Part] = {}
        for branch in branches:
            stopped = [path for path, _ in stopped_by(branches, {branch.sublayer})]
            part = self._part(nn.ModuleList(transformer.get_submodule(path) for path in stopped), seen)
            if branch.sublayer.kind == "attention":
                part.attentions = [slots.pop(self._slot(branch, slots))]
            self._parts[branch.sublayer] = part
        # what waits for an encoder or an image does not run for text
        self._rest = self._part(transformer, seen, ran)
        self._rest.attentions = list(slots.values())  # what discovery leaves alone

    def of_pass(self, *, batch_size: int, tokens: int, context: int = 0) -> PassCosts:
        """Costs of one forward pass.

        Args:
            batch_size: Sequences.
            tokens: New tokens of each.
            context: Tokens of each that are in the KV cache already.
        """
        sizes = (batch_size, tokens, context, self._element)
        head = self._head.cost(batch_size, tokens if self._all_logits else 1, 0, self._element)
        sublayers = {sublayer: part.cost(*sizes) for sublayer, part in self._parts.items()}
        return PassCosts(sublayers, self._rest.cost(*sizes) + head)

    def seconds(
        self, ceilings: Ceilings, settings: SpeedSettings, *, dropped: Collection[Sublayer] | None = None
    ) -> tuple[float, float]:
        """Least time of a prefill and of the cached decoding of all new tokens after it, in seconds.

        A decoding step in the middle stands for all, as costs grow evenly with what is in the cache.

        Args:
            ceilings: What the machine can do at most.
            settings: Lengths; the numbers of runs mean nothing here.
            dropped: Sublayers that do not run; None for those that are bypassed.
        """
        gone = set(self.dropped if dropped is None else dropped)
        prompt, step = (phase.without(gone) for phase in self.passes(settings))
        return ceilings.seconds(prompt), settings.new_tokens * ceilings.seconds(step)

    def passes(self, settings: SpeedSettings) -> tuple[PassCosts, PassCosts]:
        """Costs of the prefill, and of the decoding step in the middle, which stands for all of them."""
        prompt = self.of_pass(batch_size=settings.batch_size, tokens=settings.prompt_tokens)
        middle = settings.prompt_tokens + (settings.new_tokens - 1) // 2
        return prompt, self.of_pass(batch_size=settings.batch_size, tokens=1, context=middle)

    def kv_bytes(self, *, batch_size: int, tokens: int, dropped: Collection[Sublayer] | None = None) -> int:
        """Bytes of the KV cache that holds so many tokens of each sequence; arguments as of :meth:`seconds`."""
        gone = set(self.dropped if dropped is None else dropped)
        parts = [*(part for sublayer, part in self._parts.items() if sublayer not in gone), self._rest]
        held = (
            attention.kept * (tokens if attention.window is None else min(tokens, attention.window))
            for part in parts
            for attention in part.attentions
        )
        return batch_size * sum(held)

    def _slots(self, transformer: PreTrainedModel, cache: object) -> dict[int, _Attention]:
        """The attentions that the model's own cache holds keys and values of, or the latents of both."""
        heads = getattr(self._text, "num_attention_heads", None)
        expansions = {
            getattr(module, "layer_idx", None): weight_shape(module.get_submodule(_EXPANSION).weight)
            for module in transformer.modules()
            if _EXPANSION in module._modules
        }
        cache = getattr(cache, "self_attention_cache", cache)
        found = {}
        for slot, layer in enumerate(getattr(cache, "layers", ())):
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if isinstance(keys, Tensor) and isinstance(values, Tensor) and keys.ndim == 4:
                if not isinstance(heads, int):
                    raise CostError(f"CostModel: the config of {self._name} does not say how many heads it has.")
                query = heads * (keys.shape[-1] + values.shape[-1])
                # as the cache holds them, which under autocast is not what the matrices put out; fake ones tell nothing
                size = self._element if isinstance(keys, FakeTensor) else keys.element_size()
                kept = size * (keys.shape[1] * keys.shape[-1] + values.shape[1] * values.shape[-1])
                expansion = expansions.get(slot, (0, 0))
                query += expansion[0] - heads * expansion[1]  # the latent gives way to what it becomes
                found[slot] = _Attention(query, kept, getattr(layer, "sliding_window", None), expansion)
        return found

    def _slot(self, branch: Branch, slots: Mapping[int, _Attention]) -> int:
        slot = next((s.layer_idx for _, s in branch.stand_ins if s.layer_idx is not None), None)
        if slot is None or slot not in slots:
            raise CostError(
                f"CostModel: {branch.sublayer.name} of {self._name} has no keys and values in the cache, so that its "
                "costs cannot be told."
            )
        return slot

    def _part(self, root: nn.Module, seen: set[int], ran: Collection[nn.Module] | None = None) -> _Part:
        part = _Part()
        for module in root.modules():
            if ran is not None and module not in ran:
                continue
            stacked = next((p.shape[0] for p in module._parameters.values() if p is not None and p.ndim == 3), None)
            for parameter in module._parameters.values():
                if parameter is None or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                shape = weight_shape(parameter)
                if isinstance(module, nn.Embedding):
                    part.rows += shape[1] * parameter.element_size()
                elif isinstance(module, _Convolution):
                    part.read += parameter.nbytes
                    part.matrices += math.prod(shape)
                elif stacked is not None:
                    self._count_experts(part, parameter, shape)
                else:
                    part.read += parameter.nbytes
                    if len(shape) == 2:
                        part.matrices += math.prod(shape)
                        part.activations += sum(shape)
        return part

    def _count_experts(self, part: _Part, parameter: nn.Parameter, shape: tuple[int, ...]) -> None:
        taken = next((k for name in _TOP_K if isinstance(k := getattr(self._text, name, None), int)), None)
        if taken is None:
            raise CostError(
                f"CostModel: {self._name} has a stack of {shape[0]} experts, and its config does not say how many of "
                "them a token takes."
            )
        share = min(1.0, taken / shape[0])
        part.experts.append((math.prod(shape) if len(shape) == 3 else 0, parameter.nbytes, share))
        part.activations += taken * sum(shape[1:]) if len(shape) == 3 else 0


@contextmanager
def _noting_runs(transformer: nn.Module) -> Iterator[set[nn.Module]]:
    """Within the context every module that runs is added to the set that it hands out."""
    ran: set[nn.Module] = set()
    with ExitStack() as hooks:
        for module in transformer.modules():
            hooks.callback(module.register_forward_pre_hook(lambda module, _: ran.add(module)).remove)
        yield ran


def _activation_bytes(transformer: PreTrainedModel) -> int:
    """Bytes of one number in activations and cache."""
    device = transformer.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device).itemsize
    return transformer.dtype.itemsize
