"""Computes the FLOPs and bytes of a forward pass for each sublayer, from shapes alone. Works on the meta device, too.

For B sequences with n new tokens and c cached tokens each, a sublayer whose matrices hold m numbers takes

    FLOPs = 2 m B n + 2 B n (c + n) H (d_k + d_v)        products with weights; Q K^T and the mix of the values
    bytes = weights + activations in and out of each matrix + keys and values read and written

H is the number of query heads, d_k and d_v the sizes of a key and a value.

- The whole n x (c + n) square of attention counts, as in torch's FlopCounterMode. A kernel that skips the masked half
  does less. A sliding window bounds c + n while decoding.
- Each token computes k of E experts. A pass reads every expert that some token takes: E (1 - (1 - k/E)^(B n)) on
  average if all are equally likely.
- Norms, activation functions, rotations and softmax are left out.
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
from layershed.stand_ins.carried import maps_of
from layershed.stand_ins.stand_in import RemovedModule
from layershed.surgery import bypassed_sublayers, stopped_by

_Convolution = nn.Conv1d | nn.Conv2d
# Names in configs for the number of experts per token, the library's standard name first.
_TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k", "num_experts_per_token")
# The library's name for the matrix that turns the cache of multi-head latent attention into keys and values.
_EXPANSION = "kv_b_proj"


@dataclass(frozen=True)
class PassCosts:
    """Costs of one forward pass.

    Args:
        sublayers: Cost of every sublayer as if it ran, bypassed ones included.
        rest: Cost of everything else: embeddings, head and all modules outside the sublayers.
        maps: Cost of the linear maps that run in place of sublayers, by sublayer.
    """

    sublayers: Mapping[Sublayer, Cost]
    rest: Cost
    maps: Mapping[Sublayer, Cost] = field(default_factory=dict)

    def without(self, dropped: Collection[Sublayer]) -> list[Cost]:
        """Return the costs that remain after ``dropped`` are dropped, with their linear maps."""
        kept = (cost for sublayer, cost in self.sublayers.items() if sublayer not in dropped)
        return [*kept, *(cost for sublayer, cost in self.maps.items() if sublayer in dropped), self.rest]


@dataclass(frozen=True)
class _Attention:
    """Shapes of one attention, read from the model's own cache."""

    query: int  # H (d_k + d_v)
    kept: int  # bytes in the cache per token
    window: int | None
    expansion: tuple[int, ...]  # shape of the matrix that turns every cached latent into key and value, in every pass

    def keys(self, tokens: int, context: int) -> int:
        """Count the keys that a new token is compared with. A prompt is compared with all of itself and masked."""
        return context + tokens if self.window is None or tokens > 1 else min(context + tokens, self.window)


@dataclass
class _Part:
    """Weights and shapes of a sublayer, or of the rest."""

    matrices: int = 0  # numbers that are multiplied with each token
    activations: int = 0  # numbers in and out of the matrices, per token
    read: int = 0  # bytes of weights that every pass reads
    rows: int = 0  # bytes of the rows that a token takes from embedding tables
    experts: list[tuple[int, int, float]] = field(default_factory=list)  # numbers, bytes, share used by a token
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
            earlier = batch_size * (keys - tokens)  # new tokens are counted in matrices
            flops += 2.0 * earlier * math.prod(attention.expansion)
            moved += earlier * sum(attention.expansion) * element
        return Cost(flops, moved)


class CostModel:
    """Computes the costs of any forward pass of a causal language model, after one small probe of the model.

    Args:
        model: A causal language model, or a module that holds one. On the meta device no weight is needed.
        name: Path of the transformer inside ``model``; needed if the model holds several.

    Raises:
        CostError: If the model is not a causal language model, or its costs cannot be derived from its shapes.
        LayershedError: As :func:`~layershed.discovery.find.find_sublayers`.
    """

    def __init__(self, model: nn.Module, *, name: str | None = None) -> None:
        transformer = find_transformer(model, name=name)
        if not predicts_next_token(transformer):
            raise CostError(f"CostModel: {type(transformer).__name__} is not a causal language model. Use one.")
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
        # ids of counted parameters, so that shared weights count once
        seen = {id(parameter) for parameter in adapter_parameters(transformer)}
        maps = {sublayer: each for sublayer, each in maps_of(transformer).items() if sublayer in self.dropped}
        self._maps = {sublayer: self._part(each, seen) for sublayer, each in maps.items()}
        self._head = self._part(transformer.get_output_embeddings(), seen)
        self._parts: dict[Sublayer, _Part] = {}
        for branch in branches:
            stopped = [path for path, _ in stopped_by(branches, {branch.sublayer}, maps)]
            part = self._part(nn.ModuleList(transformer.get_submodule(path) for path in stopped), seen)
            if branch.sublayer.kind == "attention":
                part.attentions = [slots.pop(self._slot(branch, slots))]
            self._parts[branch.sublayer] = part
        # modules for an encoder's output or an image do not run for text
        self._rest = self._part(transformer, seen, ran)
        self._rest.attentions = list(slots.values())  # attentions outside the sublayers

    def of_pass(self, *, batch_size: int, tokens: int, context: int = 0) -> PassCosts:
        """Compute the costs of one forward pass.

        Args:
            batch_size: Number of sequences.
            tokens: New tokens per sequence.
            context: Tokens per sequence that are already in the KV cache.
        """
        sizes = (batch_size, tokens, context, self._element)
        head = self._head.cost(batch_size, tokens if self._all_logits else 1, 0, self._element)
        sublayers = {sublayer: part.cost(*sizes) for sublayer, part in self._parts.items()}
        maps = {sublayer: part.cost(*sizes) for sublayer, part in self._maps.items()}
        return PassCosts(sublayers, self._rest.cost(*sizes) + head, maps)

    def seconds(
        self, ceilings: Ceilings, settings: SpeedSettings, *, dropped: Collection[Sublayer] | None = None
    ) -> tuple[float, float]:
        """Return the least seconds of a prefill, and of the cached decoding of all new tokens after it.

        Costs grow evenly with the cache, so the middle decoding step represents all steps.

        Args:
            ceilings: The machine's ceilings.
            settings: Lengths. The numbers of runs are ignored.
            dropped: Sublayers that do not run; None for the bypassed sublayers.
        """
        gone = set(self.dropped if dropped is None else dropped)
        prompt, step = (phase.without(gone) for phase in self.passes(settings))
        return ceilings.seconds(prompt), settings.new_tokens * ceilings.seconds(step)

    def passes(self, settings: SpeedSettings) -> tuple[PassCosts, PassCosts]:
        """Return the costs of the prefill and of the middle decoding step, which represents all steps."""
        prompt = self.of_pass(batch_size=settings.batch_size, tokens=settings.prompt_tokens)
        middle = settings.prompt_tokens + (settings.new_tokens - 1) // 2
        return prompt, self.of_pass(batch_size=settings.batch_size, tokens=1, context=middle)

    def kv_bytes(self, *, batch_size: int, tokens: int, dropped: Collection[Sublayer] | None = None) -> int:
        """Return the bytes of a KV cache with ``tokens`` tokens per sequence; ``dropped`` as in :meth:`seconds`."""
        gone = set(self.dropped if dropped is None else dropped)
        parts = [*(part for sublayer, part in self._parts.items() if sublayer not in gone), self._rest]
        held = (
            attention.kept * (tokens if attention.window is None else min(tokens, attention.window))
            for part in parts
            for attention in part.attentions
        )
        return batch_size * sum(held)

    def _slots(self, transformer: PreTrainedModel, cache: object) -> dict[int, _Attention]:
        """Find the attentions whose keys and values, or latents of both, are in the model's cache, by cache slot."""
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
                    raise CostError(f"CostModel: the config of {self._name} lacks num_attention_heads. Add it.")
                query = heads * (keys.shape[-1] + values.shape[-1])
                # under autocast the cache may hold another dtype than the matrices return; fake tensors hide that
                kept = 0
                for held in (keys, values):
                    size = self._element if isinstance(held, FakeTensor) else held.element_size()
                    kept += size * held.shape[1] * held.shape[-1]
                expansion = expansions.get(slot, (0, 0))
                query += expansion[0] - heads * expansion[1]  # keys and values instead of the latent
                found[slot] = _Attention(query, kept, getattr(layer, "sliding_window", None), expansion)
        return found

    def _slot(self, branch: Branch, slots: Mapping[int, _Attention]) -> int:
        slot = next((s.layer_idx for _, s in branch.stand_ins if s.layer_idx is not None), None)
        if slot is None or slot not in slots:
            raise CostError(
                f"CostModel: the costs of {branch.sublayer.name} of {self._name} are unknown, as it has no keys and "
                "values in the cache. Measure its speed instead."
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
                f"CostModel: the costs of the {shape[0]} experts of {self._name} are unknown, as its config lacks the "
                f"number of experts per token. Add {_TOP_K[0]} to the config."
            )
        share = min(1.0, taken / shape[0])
        part.experts.append((math.prod(shape) if len(shape) == 3 else 0, parameter.nbytes, share))
        part.activations += taken * sum(shape[1:]) if len(shape) == 3 else 0


@contextmanager
def _noting_runs(transformer: nn.Module) -> Iterator[set[nn.Module]]:
    """Yield a set that collects every module that runs within the context."""
    ran: set[nn.Module] = set()
    with ExitStack() as hooks:
        for module in transformer.modules():
            hooks.callback(module.register_forward_pre_hook(lambda module, _: ran.add(module)).remove)
        yield ran


def _activation_bytes(transformer: PreTrainedModel) -> int:
    """Return the bytes of one number in activations and cache."""
    device = transformer.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device).itemsize
    return transformer.dtype.itemsize
