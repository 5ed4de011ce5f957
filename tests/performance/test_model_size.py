"""Sizes of weights against the files that hold them."""

import pytest
import torch

from layershed.discovery.find import find_sublayers
from layershed.performance.model_size import adapter_parameters, weight_shape, weight_sizes
from layershed.quantization import quantize
from layershed.recovery.lora import inject_lora
from layershed.saving.pretrained import save_pretrained
from layershed.surgery import bypass, remove
from tests.support.model_types import MODEL_TYPES
from tests.support.models import build_model
from tests.support.thinned import one_of


def saved_bytes(folder):
    """Bytes of the tensors in a folder: the files without their headers, whose length is in the first 8 bytes."""
    files = list(folder.glob("**/*.safetensors"))
    assert files
    return sum(file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") for file in files)


MODELS = [
    *((model_type, {}) for model_type in (*MODEL_TYPES, "phi", "opt", "bloom", "mixtral")),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 4}),
]


@pytest.mark.parametrize("dtype", one_of([torch.bfloat16, torch.float32]), ids=str)
@pytest.mark.parametrize(("model_type", "overrides"), MODELS, ids=["-".join((name, *own)) for name, own in MODELS])
def test_weight_bytes_equal_the_saved_file_dense_and_dropped(tmp_path, model_type, overrides, dtype):
    model = build_model(model_type, **overrides).to(dtype)
    dense = weight_sizes(model)
    assert dense.bytes == saved_bytes(save_pretrained(model, tmp_path / "dense"))
    assert dense.parameters == sum(parameter.numel() for parameter in model.parameters())
    bypass(model, find_sublayers(model)[:5:2])
    dropped = weight_sizes(model)
    assert dropped.bytes == saved_bytes(save_pretrained(model, tmp_path / "dropped")) < dense.bytes
    assert dense.bytes - dropped.bytes == (dense.parameters - dropped.parameters) * dtype.itemsize
    assert weight_sizes(model, lifted=True) == dense
    remove(model, None)
    assert weight_sizes(model) == dropped
    assert weight_sizes(model, lifted=True) == dropped  # removed sublayers cannot be lifted


def test_shared_weights_count_once():
    tied, untied = (weight_sizes(build_model(tie_word_embeddings=tie)) for tie in (True, False))
    assert untied.parameters - tied.parameters == 97 * 32
    assert untied.bytes - tied.bytes == 97 * 32 * 4


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_quantized_weights_have_fewer_bytes_and_equal_parameters(tmp_path, model_type, mode):
    model = build_model(model_type, hidden_size=64, intermediate_size=128)
    dense = weight_sizes(model)
    quantize(model, mode)
    quantized = weight_sizes(model)
    assert quantized.parameters == dense.parameters
    assert quantized.bytes == saved_bytes(save_pretrained(model, tmp_path / "dense")) < 0.6 * dense.bytes
    bypass(model, find_sublayers(model)[:3])
    dropped = weight_sizes(model)
    assert dropped.bytes == saved_bytes(save_pretrained(model, tmp_path / "dropped")) < quantized.bytes
    assert weight_sizes(model, lifted=True) == quantized


@pytest.mark.parametrize("quantized", [False, True])
def test_weight_sizes_exclude_adapters(quantized):
    model = build_model(hidden_size=64)
    if quantized:
        quantize(model)
    dense = weight_sizes(model)
    assert list(adapter_parameters(model)) == []
    bypass(model, find_sublayers(model)[:2])
    dropped = weight_sizes(model)
    inject_lora(model, rank=4)
    assert weight_sizes(model) == dropped
    assert weight_sizes(model, lifted=True) == dense
    lora = {id(parameter) for name, parameter in model.named_parameters() if "lora_" in name}
    assert {id(parameter) for parameter in adapter_parameters(model)} == lora != set()


def test_packed_weight_has_its_unpacked_shape():
    model = build_model(hidden_size=64)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    quantize(model)
    found = {name: weight_shape(p) for name, p in model.named_parameters()}
    assert found == shapes
    assert any(p.shape != shapes[name] for name, p in model.named_parameters())
