"""bitsandbytes' linear layers, made safe to train around, to checkpoint and to load strictly.

Import it only where weights are quantized: it imports bitsandbytes, which is slow and logs messages.
"""

from __future__ import annotations

import logging
from typing import Any

import bitsandbytes as bnb
from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse, dequantize_4bit, int8_vectorwise_dequant
from torch import Tensor, nn
from torch.nn.functional import linear

from layershed.discovery.probe import probing


class Linear4bit(bnb.nn.Linear4bit):
    """A 4-bit linear map whose weight stays as it was stored.

    On a CPU with AVX512-BF16, bitsandbytes repacks a weight in place at the first forward pass in eval mode without
    gradients. After that, its gradients and its state dict are silently wrong. This class never repacks.
    """

    weight: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.support_avx512bf16_for_cpu = False

    def forward(self, x: Tensor) -> Tensor:
        """As bitsandbytes; in a probe the plain product with the dequantized weight."""
        return _plain(self, x) if probing() else super().forward(x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = f"{prefix}weight"
        parts = {name.removeprefix(f"{key}."): name for name in state_dict if name.startswith(f"{key}.")}
        # bitsandbytes would report these as unexpected, and keep the old ones if that is tolerated
        device = self.weight.device
        statistics = {part: state_dict.pop(name).to(device, copy=True) for part, name in parts.items()}
        if statistics and key in state_dict:
            weight = state_dict[key].to(device, copy=True)
            self.weight = bnb.nn.Params4bit.from_prequantized(weight, statistics, device=device, module=self)
            state_dict[key] = self.weight.data
        super()._load_from_state_dict(state_dict, prefix, *args)


class Linear8bitLt(bnb.nn.Linear8bitLt):
    """An 8-bit linear map that loads its scales whether it has run before or not."""

    weight: Any

    def forward(self, x: Tensor) -> Tensor:
        """As bitsandbytes; in a probe the plain product with the dequantized weight."""
        return _plain(self, x) if probing() else super().forward(x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight, scales = state_dict.get(f"{prefix}weight"), state_dict.pop(f"{prefix}SCB", None)
        state_dict.pop(f"{prefix}weight_format", None)
        if weight is not None and scales is not None:
            # bitsandbytes moves both from the weight to the state at the first forward pass
            self.state.CB = self.state.SCB = None
            weight, scales = (tensor.to(self.weight.device, copy=True) for tensor in (weight, scales))
            self.weight = bnb.nn.Int8Params(weight, requires_grad=False, CB=weight, SCB=scales)
        super()._load_from_state_dict(state_dict, prefix, *args)


def secure(model: nn.Module) -> None:
    """Turn bitsandbytes' own layers, which transformers puts into a model, into the classes above."""
    module: Any
    for module in model.modules():
        if type(module) is bnb.nn.Linear4bit:
            module.__class__ = Linear4bit
            module.support_avx512bf16_for_cpu = False
            _unpack(module)
        elif type(module) is bnb.nn.Linear8bitLt:
            module.__class__ = Linear8bitLt


def _unpack(module: Linear4bit) -> None:
    """Undo the repacking of a layer of bitsandbytes that has run. Its scales stay rounded to bfloat16."""
    state = module.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return
    if not state.original_nested:
        # bitsandbytes transposes these and its inverse does not transpose them back
        state.absmax = state.absmax.T.reshape(-1).float().contiguous()
    weight, state = _convert_weight_packed_for_cpu_inverse(module.weight.data, state)
    module.weight.data, module.weight.quant_state, module.quant_state = weight, state, state


def dequantized_weight(module: bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) -> Tensor:
    """The weight in the dtype that it was quantized from (8 bit: float32), shape (out_features, in_features)."""
    if isinstance(module, bnb.nn.Linear4bit):
        return dequantize_4bit(module.weight.data, module.weight.quant_state)
    scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    return int8_vectorwise_dequant(module.weight.data, scales)


def _plain(module: Linear4bit | Linear8bitLt, x: Tensor) -> Tensor:
    bias = None if module.bias is None else module.bias.to(x.dtype)
    return linear(x, dequantized_weight(module).to(x.dtype), bias)


class _Once(logging.Filter):
    """Lets a message through once. bitsandbytes logs it for every layer at every forward pass."""

    said = False

    def filter(self, record: logging.LogRecord) -> bool:
        if "inputs will be cast" not in record.getMessage():
            return True
        first, self.said = not self.said, True
        return first


logging.getLogger("bitsandbytes.autograd._functions").addFilter(_Once())
