"""Folders that others wrote, of models that share a config object or hold weights that no config describes."""

import json

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

import layershed as ls
from layershed.errors import ExportError
from tests.support.architectures import tiny_model
from tests.support.models import build_model

OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32}


def chosen(model):
    return [s for s in ls.find_sublayers(model) if (s.block, s.kind) in {(1, "attention"), (2, "mlp")}]


def run(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 15)[None]).logits


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "opt"])
def test_dense_model_with_the_config_of_a_dropped_one_is_loaded_dense_or_refused_with_advice(model_type, tmp_path):
    teacher = build_model(model_type, **OPT) if model_type == "opt" else build_model(model_type)
    student = type(teacher)(teacher.config).eval()
    student.load_state_dict(teacher.state_dict())
    ls.bypass(student, chosen(student))
    ls.save_pretrained(teacher, tmp_path / "ours")
    assert torch.equal(run(ls.load_pretrained(tmp_path / "ours")), run(teacher))
    teacher.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ExportError, match=r"delete dropped_modules from config\.json"):
        ls.load_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    del config["dropped_modules"]
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    loaded = ls.load_pretrained(tmp_path / "theirs")
    assert torch.equal(run(loaded), run(teacher))
    assert ls.dropped_sublayers(loaded) == ()
    student.save_pretrained(tmp_path / "dropped")
    assert torch.equal(run(ls.load_pretrained(tmp_path / "dropped")), run(student))


def test_folder_that_lacks_weights_of_one_of_its_dropped_sublayers_is_refused(tmp_path):
    teacher = build_model("llama")
    student = type(teacher)(teacher.config).eval()
    ls.bypass(student, chosen(student))
    weights = {k: v for k, v in teacher.state_dict().items() if not k.startswith("model.layers.2.mlp.")}
    teacher.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ExportError, match="unexpected keys"):
        ls.load_pretrained(tmp_path)


def packed(module):
    """The layer with weights that bitsandbytes packs."""
    new = bnb.nn.Linear4bit(module.in_features, module.out_features, compute_dtype=torch.float32, quant_type="nf4")
    new.weight = bnb.nn.Params4bit(module.weight.data.clone(), requires_grad=False, quant_type="nf4")
    new.bias = None if module.bias is None else nn.Parameter(module.bias.data.clone(), requires_grad=False)
    return new.to("cpu")


@pytest.mark.parametrize(
    ("family", "path"), [("bert", "cls.predictions.decoder"), ("llama", "model.layers.0.mlp.up_proj")]
)
def test_weights_packed_by_hand_are_refused_before_anything_is_written(family, path, tmp_path):
    model = tiny_model(family)
    ls.bypass(model, ls.find_sublayers(model)[:1])
    model.set_submodule(path, packed(model.get_submodule(path)))
    with pytest.raises(ExportError, match=f"bitsandbytes packed {path}"):
        ls.save_pretrained(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ExportError, match="load_pretrained"):
        ls.load_pretrained(tmp_path / "theirs")


def test_weights_packed_by_hand_in_a_dropped_sublayer_are_no_obstacle(tmp_path):
    model = tiny_model("llama")
    ls.bypass(model, [s for s in ls.find_sublayers(model) if s.path == "model.layers.0.mlp"])
    module = model.model.layers[0].mlp.up_proj
    model.set_submodule("model.layers.0.mlp.up_proj", packed(module))
    ls.save_pretrained(model, tmp_path / "saved")
    assert torch.equal(run(ls.load_pretrained(tmp_path / "saved")), run(model))
