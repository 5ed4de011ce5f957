"""Finding the one transformer that a module is or holds, however it is wrapped."""

import re

import pytest
import torch
from torch import nn

from layershed.discovery.find import find_sublayers, find_transformer
from layershed.errors import AmbiguousModelError, NoSublayersFoundError
from layershed.planning.plan import Sublayer
from tests.support.models import build_model

LLAMA = tuple(
    Sublayer(i, kind, f"model.layers.{i}.{module}")
    for i in range(4)
    for kind, module in (("attention", "self_attn"), ("mlp", "mlp"))
)
GPT2 = tuple(
    Sublayer(i, kind, f"transformer.h.{i}.{module}")
    for i in range(4)
    for kind, module in (("attention", "attn"), ("mlp", "mlp"))
)


def test_module_without_a_transformer_is_refused():
    with pytest.raises(NoSublayersFoundError, match="Linear holds no Hugging Face transformer"):
        find_sublayers(nn.Linear(2, 2))


class Holder(nn.Module):
    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def test_transformer_is_found_in_a_lightning_module(llama):
    from lightning.pytorch import LightningModule

    class Task(LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = Holder(network=llama, head=nn.Linear(2, 2))

    assert find_transformer(Task()) is llama
    assert find_sublayers(Task()) == LLAMA  # paths start at the transformer


def test_transformer_is_found_in_a_compiled_model(llama):
    compiled = torch.compile(llama, backend="eager")
    assert find_transformer(compiled) is llama
    assert find_sublayers(compiled) == LLAMA


def test_model_compiled_in_place_has_the_same_sublayers(llama, tokens):
    """Compiled code calls no module, so that nothing could be recorded."""
    llama.compile(backend="eager")
    llama.model.layers[0].compile(backend="eager")
    with torch.no_grad():
        llama(tokens)
    assert find_sublayers(llama) == LLAMA


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_transformer_is_found_in_a_peft_model():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build_model("llama"), peft.LoraConfig(r=2, target_modules="all-linear"))
    assert find_sublayers(model) == LLAMA
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_" not in name)


def test_transformer_is_found_in_distributed_data_parallel(llama, tmp_path):
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(llama)
        assert find_transformer(wrapped) is llama
        assert find_sublayers(wrapped) == LLAMA
    finally:
        distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_transformer_is_found_through_all_wrappers_at_once(llama):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(llama, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert find_sublayers(Holder(inner=torch.compile(adapted, backend="eager"))) == LLAMA


def test_transformer_without_a_head_is_found(llama):
    found = find_sublayers(llama.model)
    assert [s.path for s in found[:2]] == ["layers.0.self_attn", "layers.0.mlp"]


def test_module_with_two_transformers_requires_a_name(llama):
    gpt2 = build_model("gpt2")
    both = Holder(student=llama, teachers=Holder(first=gpt2))
    with pytest.raises(AmbiguousModelError, match=r"2 transformers: student, teachers\.first"):
        find_sublayers(both)
    assert find_transformer(both, name="student") is llama
    assert find_sublayers(both, name="teachers.first") == GPT2
    assert find_transformer(both, name="teachers") is gpt2


@pytest.mark.parametrize("name", ["pupil", "student.layers.99", "student.lm_head"])
def test_wrong_transformer_name_is_refused(llama, name):
    with pytest.raises(NoSublayersFoundError, match=f"no module named '{re.escape(name)}'|Linear holds no"):
        find_sublayers(Holder(student=llama), name=name)


def test_one_transformer_held_twice_is_not_ambiguous(llama):
    assert find_transformer(Holder(model=llama, loss=Holder(model=llama))) is llama
