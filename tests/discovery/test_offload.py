"""Models whose weights accelerate keeps elsewhere, models with flex attention, and the advice after a failed probe."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

import layershed as ls
from layershed.discovery.probe_failures import advice
from layershed.discovery.registry import SublayerAdapter, register_adapter
from layershed.errors import ExportError, UnprovenStructureError
from layershed.surgery import dropped_sublayers
from tests.support.models import build_model, some

CPU = torch.device("cpu")
IDS = torch.arange(1, 9)[None]


def on_disk(model, folder):
    names = [name for name, module in model.model.named_children() if name != "layers"]
    where = {"lm_head": "cpu", **{f"model.{name}": "cpu" for name in names}}
    where |= {f"model.layers.{i}": "cpu" if i == 0 else "disk" for i in range(len(model.model.layers))}
    return dispatch_model(model, where, main_device="cpu", offload_dir=folder)


OFFLOADS = {
    "dispatch_model": on_disk,
    "cpu_offload": lambda model, _: cpu_offload(model, execution_device=CPU),
    "disk_offload": lambda model, folder: disk_offload(model, folder, execution_device=CPU),
}


def zeroed(model, sublayers):
    """The reference: branches with zero weights."""
    model = copy.deepcopy(model)
    for sublayer in sublayers:
        for parameter in model.get_submodule(sublayer.path).parameters():
            parameter.data.zero_()
    return model


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("offload", OFFLOADS)
@torch.no_grad()
def test_offloaded_model_is_found_scored_and_dropped_as_the_model_before(offload, tmp_path):
    model = build_model()
    sublayers, expected = ls.find_sublayers(model), ls.estimate_importance(model, [IDS])
    reference, dense = zeroed(model, some(model))(IDS).logits, model(IDS).logits
    quality = ls.evaluate_quality(model, [IDS])
    moved = OFFLOADS[offload](model, tmp_path)
    assert any(parameter.is_meta for parameter in moved.parameters())
    assert ls.find_sublayers(moved) == sublayers
    assert ls.estimate_importance(moved, [IDS]) == pytest.approx(expected)
    assert ls.evaluate_quality(moved, [IDS]) == quality
    gone = some(moved)
    ls.bypass(moved, gone)
    assert dropped_sublayers(moved) == tuple(sorted(gone))
    torch.testing.assert_close(moved(IDS).logits, reference, rtol=0, atol=1e-6)
    ls.restore(moved)
    assert torch.equal(moved(IDS).logits, dense)


def test_offloaded_model_with_nan_says_so(tmp_path):
    model = build_model()
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(UnprovenStructureError, match=r"NaN or infinite values\. Its weights are offloaded"):
        ls.find_sublayers(on_disk(model, tmp_path))


def test_saving_a_model_without_reachable_weights_is_refused(tmp_path):
    model = cpu_offload(build_model(), execution_device=CPU)
    with pytest.raises(ExportError, match=r"offloaded\. Undo an offload first"):
        ls.save_pretrained(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_flex_attention_is_proven_as_plain_attention(model_type):
    model = build_model(model_type)
    expected = ls.find_sublayers(model)
    model.set_attn_implementation("flex_attention")
    assert ls.find_sublayers(model) == expected
    assert model.config._attn_implementation == "flex_attention"
    reference = zeroed(model, some(model))
    ls.bypass(model, some(model))
    for each in (model, reference):  # torch's own flex attention warns on a CPU
        each.set_attn_implementation("sdpa")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=0, atol=1e-6)


ADVICE = {
    "memory": (torch.OutOfMemoryError("CUDA out of memory"), "Memory is short"),
    "memory of the CPU": (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), "Memory"),
    "half": (RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'"), "model.to(torch.float32)"),
    "inputs": (TypeError("forward() missing pixel_values"), "register_adapter"),
}


@pytest.mark.parametrize("cause", ADVICE)
def test_advice_names_the_cause_of_a_failed_probe(cause):
    error, words = ADVICE[cause]
    assert words in advice(build_model(), error)


def test_advice_for_flash_attention_names_another_attention():
    model = build_model()
    model.config._attn_implementation_internal = "flash_attention_2"
    assert 'set_attn_implementation("sdpa")' in advice(model, RuntimeError("FlashAttention only supports Ampere GPUs"))


def test_advice_for_an_offloaded_model_that_fails_names_the_offload(tmp_path):
    model = on_disk(build_model(), tmp_path)
    assert "before the offload" in advice(model, ValueError("anything"))


class Strange(torch.nn.Module):
    def forward(self, idx):
        raise ValueError("wrong inputs")


def test_advice_for_a_registered_class_points_at_its_adapter():
    register_adapter(Strange, SublayerAdapter(lambda model: {"idx": torch.arange(4)[None]}))
    with pytest.raises(UnprovenStructureError, match="The inputs come from the SublayerAdapter of Strange"):
        ls.find_sublayers(Strange())
