"""Quantize a model in memory with bitsandbytes, without reloading it, and dequantize it.

NF4 and FP4 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314) keep a weight in blocks of 64 as 4-bit codes with a scale
for each; double quantization quantizes the scales as well. LLM.int8() (arXiv 2208.07339) keeps 8 bits a weight, and a
scale for each row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from layershed.arguments import as_names
from layershed.discovery.find import find_transformer, secure_quantized
from layershed.errors import QuantizationError, UnknownNameError
from layershed.extras import needs
from layershed.recovery.lora import adapted_modules, inject_at, lora_settings, remove_lora, set_enabled
from layershed.spellings import should_convert
from layershed.stand_ins.install import MARK
from layershed.stand_ins.record import exchange

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

QuantizationMode = Literal["nf4", "fp4", "int8"]
BITS: dict[str, int] = {"nf4": 4, "fp4": 4, "int8": 8}
ComputeDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Quantized:
    """How a model is quantized.

    Args:
        mode: ``nf4``, ``fp4`` or ``int8``.
        double_quant: Whether the scales of 4-bit weights are quantized, too.
        compute_dtype: Dtype of the products with 4-bit weights.
        skip_modules: Names of what is not quantized.
    """

    mode: QuantizationMode
    double_quant: bool
    compute_dtype: ComputeDtype
    skip_modules: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields as primitives."""
        return {**asdict(self), "skip_modules": list(self.skip_modules)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Quantized:
        """The inverse of :meth:`to_dict`.

        Raises:
            QuantizationError: If the content does not describe a quantization.
        """
        try:
            found = cls(**{**content, "skip_modules": tuple(content["skip_modules"])})
        except (TypeError, KeyError) as error:
            raise QuantizationError(f"This does not say how a model is quantized: {error}.") from None
        check_mode(found.mode, found.compute_dtype if found.mode != "int8" else None)
        return found


def quantize(
    model: nn.Module,
    mode: QuantizationMode = "nf4",
    *,
    double_quant: bool = True,
    compute_dtype: ComputeDtype | None = None,
    skip_modules: Sequence[str] = (),
    name: str | None = None,
) -> Quantized:
    """Quantize the linear maps of a model in place, on their present device.

    - Dropped sublayers stay dropped.
    - Embeddings, norms, the output embedding and experts that are no linear modules keep their precision.
    - Quantized weights are frozen.

    Args:
        model: A Hugging Face transformer, or a module that holds one.
        mode: ``"nf4"``, ``"fp4"`` or ``"int8"``.
        double_quant: Quantize the scales of 4-bit weights, too: 0.37 bits a weight less. Not for int8.
        compute_dtype: Dtype of the products with 4-bit weights; None for the model's own.
        skip_modules: Further modules to leave as they are, by the end or the beginning of their paths, such as
            ``["down_proj"]`` or ``["model.layers.2"]``; upstream's ``llm_int8_skip_modules``.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Returns:
        The quantization of the model.

    Raises:
        QuantizationError: If the model is quantized already, carries LoRA, is not from Hugging Face, or has nothing to
            quantize.
    """
    transformer = find_transformer(model, name=name)
    check_mode(mode, compute_dtype)
    skip_modules = as_names(skip_modules, "skip_modules", QuantizationError)
    check_quantizable(transformer, skip_modules)
    if getattr(transformer, "is_quantized", False):
        raise QuantizationError("quantize: the model is quantized already; call layershed.dequantize(model) first.")
    if getattr(transformer, "peft_config", None):
        raise QuantizationError(
            "quantize: the model carries adapters, but the order is drop, quantize, LoRA. Merge them first "
            "(layershed.merge_lora), or quantize before LoRA, which then recovers this loss too."
        )
    own: Any = str(transformer.dtype).removeprefix("torch.")
    quantize_as(transformer, Quantized(mode, double_quant, compute_dtype or own, skip_modules))
    done = quantization_of(transformer)
    assert done is not None
    return done


def check_mode(mode: str, compute_dtype: str | None = None) -> None:
    """Refuse invalid options; no model is needed.

    Raises:
        UnknownNameError: If the mode or the dtype does not exist.
        QuantizationError: If the mode does not use a compute dtype.
    """
    if mode not in get_args(QuantizationMode):
        raise UnknownNameError("quantization mode", mode, get_args(QuantizationMode))
    if compute_dtype is not None and compute_dtype not in get_args(ComputeDtype):
        raise UnknownNameError("compute dtype", str(compute_dtype), get_args(ComputeDtype))
    if compute_dtype is not None and mode == "int8":
        raise QuantizationError(
            f"compute_dtype={compute_dtype!r}: int8 products have a dtype of their own; leave it out."
        )


def check_quantizable(model: nn.Module, skip_modules: Sequence[str] = (), *, name: str | None = None) -> None:
    """Refuse a model that :func:`quantize` cannot quantize; call it before anything else is done.

    Raises:
        MissingExtraError: If bitsandbytes is not installed.
        QuantizationError: If the model is not from Hugging Face, or a module to skip does not exist.
    """
    with needs("quantization", "quantize"):
        import bitsandbytes  # noqa: F401
    transformer = find_transformer(model, name=name)
    if not isinstance(transformer, PreTrainedModel):
        raise QuantizationError(
            f"quantize: {type(transformer).__name__} is not a Hugging Face model. Only the config of such a model can "
            "record how it is quantized."
        )
    linear = [path for path, module in transformer.named_modules() if type(module) in (nn.Linear, Conv1D)]
    for skipped in as_names(skip_modules, "skip_modules", QuantizationError):
        if linear and all(should_convert(path, [skipped]) for path in linear):
            raise QuantizationError(
                f"skip_modules: no linear module's path ends or begins with {skipped!r}. Available, for "
                f"example: {', '.join(linear[:2])}."
            )


def quantize_as(transformer: PreTrainedModel, how: Quantized) -> None:
    """Quantize exactly as described, without the checks of :func:`quantize`."""
    from transformers.quantizers.auto import AutoHfQuantizer  # imported here, because it imports bitsandbytes

    with needs("quantization", "A quantized model"):
        import bitsandbytes  # noqa: F401
    config = _upstream_config(how)
    quantizer: Any = AutoHfQuantizer.from_config(config, pre_quantized=True)
    # upstream's own list: the output embedding, modules tied to it, and modules that must stay in float32
    left = quantizer.get_modules_to_not_convert(transformer, None, transformer._keep_in_fp32_modules)
    config.llm_int8_skip_modules = sorted({*left, *how.skip_modules})
    paths = [
        path
        for path, module in transformer.named_modules()
        if type(module) in (nn.Linear, Conv1D) and should_convert(path, config.llm_int8_skip_modules)
    ]
    if not paths:
        raise QuantizationError(f"quantize: {type(transformer).__name__} has no linear map to quantize.")
    for path in paths:
        exchange(transformer, path, _quantized(transformer.get_submodule(path), how))
    transformer.config.quantization_config = config
    quantizer.quantization_config = config
    mark_quantized(transformer, quantizer)


def mark_quantized(transformer: PreTrainedModel, quantizer: Any) -> None:
    """Record in the model, for transformers and peft, that it is quantized."""
    transformer.hf_quantizer, transformer.is_quantized = quantizer, True
    transformer.quantization_method = quantizer.quantization_config.quant_method
    bits = "4" if quantizer.quantization_config.load_in_4bit else "8"
    setattr(transformer, f"is_loaded_in_{bits}bit", True)
    transformer._weight_conversions = None


def quantization_of(model: nn.Module, *, name: str | None = None) -> Quantized | None:
    """How a model is quantized by bitsandbytes, or None."""
    config = getattr(getattr(find_transformer(model, name=name), "config", None), "quantization_config", None)
    if not isinstance(config, BitsAndBytesConfig):
        return None
    mode: Any = "int8" if config.load_in_8bit else config.bnb_4bit_quant_type
    dtype: Any = str(config.bnb_4bit_compute_dtype).removeprefix("torch.")
    skipped = tuple(config.llm_int8_skip_modules or ())
    return Quantized(mode, bool(config.bnb_4bit_use_double_quant) and mode != "int8", dtype, skipped)


def dequantize(model: nn.Module, *, name: str | None = None) -> None:
    """Turn quantized weights into ordinary ones of the same values; LoRA stays, and can then be merged exactly.

    4-bit weights get the dtype that they were quantized from. 8-bit weights get the dtype of the model, which may round
    them.

    Args:
        model: A transformer, or a module that holds one.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Raises:
        QuantizationError: If the model is not quantized.
    """
    transformer: Any = find_transformer(model, name=name)
    if quantization_of(transformer) is None:
        raise QuantizationError(f"dequantize: {type(transformer).__name__} is not quantized by bitsandbytes.")
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    secure_quantized(transformer)
    # peft has other classes for quantized weights: LoRA is removed here, and injected again below
    lora = lora_settings(transformer)
    learned = {path: layer.state_dict() for path, layer in adapted_modules(transformer).items()}
    switched_off = any(layer.disable_adapters for layer in adapted_modules(transformer).values())
    if lora is not None:
        remove_lora(transformer)
    for path, module in list(transformer.named_modules()):
        if isinstance(module, Linear4bit | Linear8bitLt):
            exchange(transformer, path, _dequantized(module, transformer.dtype))
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        transformer.__dict__.pop(attribute, None)
    del transformer.config.quantization_config
    if lora is not None:
        inject_at(transformer, set(lora["targets"]), lora["settings"])
        for path, layer in adapted_modules(transformer).items():
            own = {key: value for key, value in learned[path].items() if not key.startswith("base_layer.")}
            layer.load_state_dict(own, strict=False, assign=True)  # in the dtype of their training
        set_enabled(transformer, not switched_off)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all saved parameters and buffers, including the scales of quantized weights."""
    saved = (tensor for name, tensor in model.state_dict().items() if not name.endswith(MARK))
    return sum(tensor.numel() * tensor.element_size() for tensor in saved)


def _upstream_config(how: Quantized) -> BitsAndBytesConfig:
    if how.mode == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=how.mode,
        bnb_4bit_use_double_quant=how.double_quant,
        bnb_4bit_compute_dtype=how.compute_dtype,
    )


def _quantized(module: Any, how: Quantized) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Params4bit

    from layershed.discovery.bnb_layers import Linear4bit, Linear8bitLt

    weight = module.weight.detach()
    if isinstance(module, Conv1D):
        weight = weight.T.contiguous()
    sizes = (weight.shape[1], weight.shape[0], module.bias is not None)
    new: Any
    if how.mode == "int8":
        new = Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0, device="meta")
        new.weight = Int8Params(weight.cpu(), requires_grad=False).to(weight.device)
    else:
        dtype = getattr(torch, how.compute_dtype)
        new = Linear4bit(*sizes, dtype, compress_statistics=how.double_quant, quant_type=how.mode, device="meta")
        options = {"compress_statistics": how.double_quant, "quant_type": how.mode, "module": new}
        new.weight = Params4bit(weight, requires_grad=False, **options).to(weight.device)
    new.bias = module.bias
    new.source_trainable = module.weight.requires_grad
    new.source_cls = type(module)  # upstream's name; marks Conv1D, whose weight is transposed
    return new


def _dequantized(module: Linear4bit | Linear8bitLt, dtype: torch.dtype) -> nn.Module:
    from layershed.discovery.bnb_layers import dequantized_weight

    weight = dequantized_weight(module).to(dtype)
    rows, columns = weight.shape
    new: Any
    if getattr(module, "source_cls", nn.Linear) is Conv1D:
        new, weight = Conv1D(rows, columns), weight.T.contiguous()
        new.bias = module.bias
    else:
        new = nn.Linear(columns, rows, bias=False, device="meta")
        new.bias = module.bias
    new.weight = nn.Parameter(weight, requires_grad=getattr(module, "source_trainable", False))
    return new
