"""Which models can be saved, and their whole weights where FSDP2 shards them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from layershed.discovery.find import find_transformer, refuse_strangers
from layershed.errors import ExportError
from layershed.recovery.lora import ADAPTER, adapted_modules
from layershed.saving.standalone import check_standalone
from layershed.stand_ins.carried import dropped_parameter_names


def check_savable(model: nn.Module, *, standalone: bool = False, name: str | None = None) -> PreTrainedModel:
    """Refuse a model that :func:`save_pretrained` cannot save; call it before anything is computed.

    Returns:
        The transformer.

    Raises:
        ExportError: If it is not from Hugging Face, or carries adapters of the user, or standalone is impossible.
    """
    transformer = find_transformer(model, name=name)
    if not isinstance(transformer, PreTrainedModel):
        raise ExportError(
            f"save_pretrained: {type(transformer).__name__} is no Hugging Face model. Use layershed.save_weights, "
            "and layershed.load_weights on an instance of its class."
        )
    refuse_strangers(transformer)
    _refuse_lora(model, transformer, standalone)
    if standalone:
        check_standalone(transformer)
    refuse_packed(transformer, "save_pretrained")
    _refuse_undescribed(transformer)
    return transformer


def refuse_packed(transformer: nn.Module, what: str) -> None:
    """Refuse a state dict with entries that are no tensors.

    Args:
        transformer: The model.
        what: The function that would save it, for the message.

    Raises:
        ExportError: If there is one.
    """
    packed = [name for name, value in transformer.state_dict().items() if not isinstance(value, Tensor)]
    if packed:
        raise ExportError(
            f"{what}: {packed[0]} is no tensor, as after torch's dynamic quantization, and safetensors cannot hold it. "
            "Save the model before it is quantized."
        )


def holds_shards(transformer: nn.Module) -> bool:
    """Whether this rank holds only shards of the weights."""
    return any(isinstance(parameter, DTensor) for parameter in transformer.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, if this rank holds only a shard; call it on every rank."""
    found: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach()


def _refuse_undescribed(transformer: PreTrainedModel) -> None:
    """Refuse weights that bitsandbytes packed without the knowledge of the config: no folder of them can be loaded."""
    if getattr(transformer.config, "quantization_config", None) is not None:
        return
    left_out = dropped_parameter_names(transformer)
    for name, parameter in transformer.named_parameters(remove_duplicate=False):
        if type(parameter).__name__ in ("Params4bit", "Int8Params") and name not in left_out:
            raise ExportError(
                f"save_pretrained: bitsandbytes packed {name}, but the config has no quantization_config, so no "
                "folder of it could be loaded. Quantize with layershed.quantize, or save the model before that."
            )


def _refuse_lora(model: nn.Module, transformer: PreTrainedModel, standalone: bool) -> None:
    # prompts of a PeftModel leave no trace in the transformer itself
    around = [m for m in model.modules() if m is not transformer and getattr(m, "base_model", None) is transformer]
    prompts = {name for outer in around for name in getattr(outer, "peft_config", ())}
    # peft before 0.19 leaves its config on a model that it merged
    inside = any(type(module).__module__.startswith("peft.") for module in transformer.modules())
    others = ({*(getattr(transformer, "peft_config", ()) if inside else ())} | prompts) - {ADAPTER}
    if others or any(".base_layer." in key for key in transformer.state_dict()) > bool(adapted_modules(transformer)):
        raise ExportError(
            "save_pretrained: the model carries adapters of peft; merge them first (merge_and_unload()), or save them "
            "by peft's own save_pretrained. In a run, leave the callback Export out, and save after training."
        )
    if standalone and adapted_modules(transformer):
        raise ExportError(
            "save_pretrained: standalone=True takes no adapters; merge them first (layershed.merge_lora)."
        )
