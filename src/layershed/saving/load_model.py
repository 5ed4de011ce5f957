"""Causal language models from a config, a folder, a hub id or a GGUF file; on the meta device from the config alone."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from layershed.discovery.find import secure_quantized
from layershed.errors import LayershedError, ModelError
from layershed.files.untrusted import problem_of, refuse_unfitting
from layershed.saving.pretrained import load_pretrained
from layershed.saving.skeleton import lacks_sublayers, load_config, load_skeleton
from layershed.spellings import PreTrainedConfig

QUICKSTART_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def build_model(
    pretrained: str | None = None, config: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Build or load a causal language model; the arguments are those of :class:`CausalLM`.

    Within ``with torch.device("meta"):`` it is a skeleton: only the config is read, and no weight is allocated. In the
    skeleton of a saved folder the dropped sublayers are bypassed, so that it can be compared with the dense model.

    Raises:
        ModelError: If it cannot be built.
    """
    if (problem := problem_of(config or {})) is not None:
        raise ModelError(f"config: {problem}.")
    if pretrained is None:
        return _from_scratch(QUICKSTART_CONFIG if config is None else config, dtype)
    check_source(pretrained)
    path = Path(pretrained).expanduser()
    if path.suffix == ".gguf":
        return _from_gguf(path, config or {}, dtype)
    return _from_pretrained(str(path) if path.is_dir() else pretrained, config or {}, dtype)


def check_source(pretrained: str) -> None:
    """Refuse a path at which there is no model, without reading one. A hub id is not looked up.

    Raises:
        ModelError: If there is none.
    """
    path = Path(pretrained).expanduser()
    if path.suffix == ".gguf" and not path.is_file():
        raise ModelError(f"pretrained={str(path)!r}: there is no such GGUF file.")
    if path.suffix != ".gguf" and pretrained.startswith((".", "/", "~")) and not path.is_dir():
        raise ModelError(f"pretrained={pretrained!r}: there is no such folder.")


def _from_scratch(fields: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise ModelError("config: it needs a model_type, such as llama, to train from scratch.")
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ModelError(f"config: transformers knows no model_type {model_type!r}{hint}")
    with _as_model_error("config: no causal language model can be built from it"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields), dtype=dtype)


def _from_pretrained(source: str, fields: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    config = load_config(source)
    if fields.get("model_type", config.model_type) != config.model_type:
        raise ModelError(
            f"config: pretrained={source!r} is of model_type {config.model_type!r}, not {fields['model_type']!r}. "
            "Its weights fit no other architecture. Leave model_type out."
        )
    with _as_model_error(f"pretrained={source!r}: the model could not be loaded"):
        if not lacks_sublayers(config):
            if _without_weights():
                _refuse_quantized(config, source)
                return _skeleton(AutoConfig.from_pretrained(source, trust_remote_code=False, **fields), dtype)
            model = _loaded(source, source, {**fields, "dtype": dtype})
            secure_quantized(model)
            return model
        if fields.keys() - {"model_type"}:
            raise ModelError(
                f"config: pretrained={source!r} lacks dropped sublayers, so it is loaded with its own config; leave "
                f"out {', '.join(sorted(fields))}."
            )
        if _without_weights():
            _refuse_quantized(config, source)
            return load_skeleton(source, dtype)
        return load_pretrained(source, dtype=dtype)


def _from_gguf(path: Path, fields: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    with _as_model_error(f"pretrained={str(path)!r}: the model could not be loaded"):
        try:
            if _without_weights():
                return _skeleton(AutoConfig.from_pretrained(path.parent, gguf_file=path.name, **fields), dtype)
            model = _loaded(path.parent, str(path), {**fields, "gguf_file": path.name, "dtype": dtype})
        except ImportError:
            raise ModelError("Reading GGUF needs one more package: pip install 'layershed[gguf]'.") from None
    model.config.name_or_path = str(path)  # transformers names the folder
    # the weights are dequantized; transformers would still refuse to save them as quantized ones
    del model.config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)
    return model


def _loaded(place: str | Path, source: str, options: dict[str, Any]) -> PreTrainedModel:
    """Load a model and refuse missing weights: transformers would fill them with random numbers."""
    # so mismatched shapes are reported, and refused
    asked = {**options, "output_loading_info": True, "ignore_mismatched_sizes": True, "trust_remote_code": False}
    model, report = AutoModelForCausalLM.from_pretrained(place, **asked)
    refuse_unfitting(report, model.state_dict(), source)
    return model


def _without_weights() -> bool:
    return torch.get_default_device().type == "meta"


def _refuse_quantized(config: PreTrainedConfig, source: str) -> None:
    """A skeleton would count quantized weights as full ones."""
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"pretrained={source!r}: its weights are quantized, so no plan can be made from its config. Give the "
            "model before quantization."
        )


def _skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


@contextmanager
def _as_model_error(what: str) -> Iterator[None]:
    """Turn any error of the Hugging Face libraries into a ModelError of one sentence."""
    try:
        yield
    except LayershedError:
        raise
    except Exception as error:
        reason = textwrap.shorten(str(error), 300) or type(error).__name__
        raise ModelError(f"{what} ({reason.rstrip('.')}).") from error
