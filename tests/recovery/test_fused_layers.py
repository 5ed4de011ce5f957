"""LoRA in torch's own encoder layers, whose fast path calls no part: against weights that are altered by hand."""

import copy
import io

import pytest
import torch
from torch import nn

import layershed as ls
import layershed.discovery.registry as registry
from tests.support.lora import learn, values

X = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1))
PADDED = torch.arange(7) >= torch.tensor([[7], [5], [4]])  # left-aligned: the encoder makes nested tensors of it


def encoder(*, norm_first=False, nested=False):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()


@pytest.fixture(autouse=True)
def adapter(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", {})
    ls.register_adapter(nn.TransformerEncoder, ls.SublayerAdapter(lambda model: {"src": torch.randn(1, 4, 16)}))


def outputs(model):
    with torch.no_grad():
        return model(X, src_key_padding_mask=PADDED).masked_fill(PADDED[..., None], 0)


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


def folder(model, path, **options):
    ls.save_adapter(model, path)
    loaded = encoder(**options)
    ls.load_adapter(loaded, path)
    return loaded.eval()


def hooks(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"nested": True}], ids=str)
def test_adapters_in_torch_encoder_layers_run_in_eval_mode(options, tmp_path):
    plain, by_hand, model = (encoder(**options) for _ in range(3))
    ls.inject_lora(model, rank=4, alpha=8)
    learned = values(learn(model))
    with torch.no_grad():
        for path in (f"layers.{block}.linear{number}" for block in (0, 1) for number in (1, 2)):
            a, b = (learned.pop(f"{path}.{part}.recovery.weight") for part in ("lora_A", "lora_B"))
            by_hand.get_submodule(path).weight.add_(2 * b @ a)
    assert not learned
    expected = outputs(by_hand)
    assert not torch.allclose(outputs(plain), expected, atol=1e-2)
    for same in (model, copy.deepcopy(model), pickled(model), folder(model, tmp_path / "adapter", **options)):
        torch.testing.assert_close(outputs(same), expected, rtol=1e-4, atol=1e-4)
        ls.merge_lora(same)
        torch.testing.assert_close(outputs(same), expected, rtol=1e-4, atol=1e-4)
        assert hooks(same) == hooks(plain) == 0
