"""A hand-written model: LoRA, saving, and loading into an instance of its own class."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, set_seed

import layershed as ls
import layershed.discovery.registry as registry
from layershed.errors import ExportError, PlanError
from tests.support.hand_written import GPT
from tests.support.models import build_model


class Tied(GPT):
    """Its head is its embedding."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.head.weight = self.wte.weight


@pytest.fixture(autouse=True)
def adapter(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTERED", {})
    ls.register_adapter(GPT, ls.SublayerAdapter(lambda model: {"idx": torch.arange(4)[None]}))


@pytest.fixture
def ids():
    return torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(0))


def dropped(kind=GPT, how=ls.bypass, **sizes):
    set_seed(0)
    model = kind(**sizes).eval()
    found = ls.find_sublayers(model)
    how(model, [found[0], found[3]])
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(ids)[0]


def train_lora(model):
    ls.inject_lora(model, rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()


@pytest.mark.parametrize("how", [ls.bypass, ls.remove])
@pytest.mark.parametrize("kind", [GPT, Tied])
def test_saved_weights_give_the_same_logits_in_a_new_instance(tmp_path, ids, kind, how):
    model = dropped(kind, how)
    before = copy.deepcopy(model)
    ls.save_weights(model, tmp_path / "out")
    assert torch.equal(logits(model, ids), logits(before, ids))
    set_seed(1)
    fresh = kind().eval()
    ls.load_weights(fresh, tmp_path / "out")
    assert torch.equal(logits(fresh, ids), logits(model, ids))
    assert ls.dropped_sublayers(fresh) == ls.dropped_sublayers(model)
    assert (fresh.head.weight is fresh.wte.weight) == (kind is Tied)


def test_folder_holds_kept_weights_plan_and_the_name_of_the_adapter(tmp_path):
    model = dropped(Tied)
    ls.save_weights(model, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.safetensors",
        "drop_plan.json",
        "layershed.json",
    }
    weights = load_file(tmp_path / "out" / "model.safetensors")
    silent = ("h.0.attn.", "h.0.ln_1.", "h.1.mlp.", "h.1.ln_2.")
    expected = {name for name, _ in model.named_parameters() if not name.startswith(silent)}
    assert weights.keys() == expected  # tied weights once
    noted = json.loads((tmp_path / "out" / "layershed.json").read_text())
    assert noted["adapter"] == "GPT"
    assert noted["aliases"] == {"head.weight": "wte.weight"}
    assert tuple(sorted(ls.DropPlan.load(tmp_path / "out" / "drop_plan.json"))) == ls.dropped_sublayers(model)


def test_dense_model_is_saved_and_loaded(tmp_path, ids):
    set_seed(0)
    model, fresh = GPT(), GPT()
    ls.save_weights(model, tmp_path / "out")
    ls.load_weights(nn.Sequential(fresh), tmp_path / "out")
    assert torch.equal(logits(fresh, ids), logits(model, ids))


def test_lora_of_a_hand_written_model_is_injected_saved_merged_and_removed(tmp_path, ids):
    model = dropped(Tied)
    plain = logits(model, ids)
    train_lora(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert not [name for name in trained if name.startswith(("h.0.attn", "h.1.mlp", "head"))]
    adapted = logits(model, ids)
    assert not torch.allclose(adapted, plain)
    ls.save_weights(model, tmp_path / "out")
    fresh = Tied().eval()
    ls.load_weights(fresh, tmp_path / "out")
    assert torch.equal(logits(fresh, ids), adapted)
    ls.remove_lora(fresh)
    assert torch.equal(logits(fresh, ids), plain)
    ls.merge_lora(model)
    torch.testing.assert_close(logits(model, ids), adapted, atol=1e-3, rtol=1e-4)
    ls.save_weights(model, tmp_path / "merged")
    fresh = Tied().eval()
    ls.load_weights(fresh, tmp_path / "merged")
    assert torch.equal(logits(fresh, ids), logits(model, ids))


def test_lora_takes_a_path_that_ends_another_path(ids):
    """peft compares ends of paths: the map ``head`` must not stand for ``inner.head``."""

    class Nested(GPT):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"head": nn.LayerNorm(11)})

        def forward(self, idx):
            return self.inner["head"](super().forward(idx)[0]), None

    model = dropped(Nested)
    expected = logits(model, ids)
    config = ls.inject_lora(model)
    assert "head" in config.target_modules
    assert isinstance(model.inner["head"], nn.LayerNorm)
    torch.testing.assert_close(logits(model, ids), expected)


def test_load_weights_refuses_what_does_not_fit(tmp_path):
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.gpt = GPT()

    ls.save_weights(dropped(), tmp_path / "out")
    with pytest.raises(ExportError, match="holds no model of save_weights"):
        ls.load_weights(GPT(), tmp_path / "missing")
    with pytest.raises(ExportError, match=r"has the shape .* Build the model with the saved sizes"):
        ls.load_weights(GPT(width=32), tmp_path / "out")
    with pytest.raises(PlanError, match=r"was made for GPT with 4 blocks.*this model is GPT with 3 blocks"):
        ls.load_weights(GPT(layers=2), tmp_path / "out")
    other = GPT()
    ls.bypass(other, ls.find_sublayers(other)[-1:])
    with pytest.raises(ExportError, match="lacks sublayers that were saved"):
        ls.load_weights(other, tmp_path / "out")
    ls.register_adapter(Other, ls.SublayerAdapter(lambda model: {"idx": torch.arange(4)[None]}))
    with pytest.raises(ExportError, match=r"was saved from a GPT, but the model is a .*Other"):
        ls.load_weights(Other(), tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for change, said in (
        ({"more": torch.ones(1)}, "more is left over"),
        ({"head.weight": None}, "head.weight is missing"),
    ):
        damaged = {name: value for name, value in {**weights, **change}.items() if value is not None}
        save_file(damaged, tmp_path / "out" / "model.safetensors")
        with pytest.raises(ExportError, match=said):
            ls.load_weights(GPT(), tmp_path / "out")


def test_save_weights_refuses_what_it_would_destroy_or_cannot_save(tmp_path):
    model = dropped()
    with pytest.raises(ExportError, match=r"is a Hugging Face model\. Use layershed\.save_pretrained"):
        ls.save_weights(build_model(), tmp_path / "out")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="exists and holds no saved model"):
        ls.save_weights(model, tmp_path / "notes")
    with pytest.raises(PlanError, match="the plan drops 1 sublayers, but the model lacks 2"):
        ls.save_weights(model, tmp_path / "out", plan=ls.DropPlan((ls.Drop(ls.find_sublayers(model)[0]),)))
    ls.save_weights(model, tmp_path / "out")
    ls.save_weights(model, tmp_path / "out")  # replaces its own


@pytest.mark.parametrize("family", ["bert", "roberta", "vit"])
def test_folder_of_a_body_without_its_pooler_loads(tmp_path, family):
    """Constructors take add_pooling_layer=False, and no config records it."""
    set_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    sizes |= {"image_size": 8, "patch_size": 4} if family == "vit" else {"vocab_size": 97}
    model = AutoModel.from_config(AutoConfig.for_model(family, **sizes), add_pooling_layer=False).eval()
    ls.bypass(model, ls.find_sublayers(model)[:1])
    ls.save_pretrained(model, tmp_path / "out")
    loaded = ls.load_pretrained(tmp_path / "out")
    inputs = torch.randn(1, 3, 8, 8) if family == "vit" else torch.randint(3, 97, (1, 7))
    with torch.no_grad():
        assert torch.equal(loaded(inputs)[0], model(inputs)[0])
    assert loaded.pooler is None
