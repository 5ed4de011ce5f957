"""Folders for those without layershed: loaded by transformers alone, in a process that cannot import layershed."""

import json
import site
import subprocess
import venv

import pytest
import torch
import transformers

import layershed as ls
from layershed.errors import ExportError
from tests.support.architectures import tiny_model
from tests.support.conformance import Case
from tests.support.forked import run_code

ALONE = """
import importlib.util, sys, torch
from transformers import AutoModelForCausalLM
assert importlib.util.find_spec("layershed") is None
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokens = torch.load(folder + "/tokens.pt", weights_only=True)
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    generated = model.generate(tokens, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    torch.save((logits, generated, sum(p.numel() for p in model.parameters())), folder + "/alone.pt")
"""
# code of a model's folder is copied to where a fresh process reads it from the environment
COPIED = "import sys; from transformers import dynamic_module_utils as d; d.HF_MODULES_CACHE = sys.argv.pop(1)\n"
MODEL_TYPES = ("llama", "gpt2", "bert", "bloom", "opt", "mixtral")


def in_a_fork(folders, home):
    """Load the folders where layershed cannot be imported."""
    run_code(COPIED + ALONE, [str(home / "modules"), *folders], home / "said.txt", hidden="layershed")


def in_an_environment_without_layershed(folders, home):
    """Load the folders in a virtual environment that sees every installed package but layershed."""
    venv.create(home, with_pip=False, symlinks=True)
    packages = next(home.glob("lib/python*/site-packages"))
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    done = subprocess.run(
        [home / "bin" / "python", "-c", ALONE, *folders],
        capture_output=True,
        text=True,
        timeout=300,
        env={"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("load", [in_a_fork, pytest.param(in_an_environment_without_layershed, marks=pytest.mark.slow)])
def test_transformers_alone_gives_the_same_logits_and_cached_text(load, tmp_path):
    expected = {}
    for model_type in MODEL_TYPES:
        case = Case(tiny_model(model_type))
        ls.bypass(case.model, [branch.sublayer for branch in case.several])
        folder = tmp_path / model_type
        ls.save_pretrained(case.model, folder, standalone=True)
        torch.save(case.tokens, folder / "tokens.pt")
        text = case.model.generate(case.tokens, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        ls.remove(case.model)
        expected[model_type] = case.logits(), text, case.model.num_parameters()
    folders = [str(tmp_path / model_type) for model_type in MODEL_TYPES]
    (tmp_path / "home").mkdir()
    load(folders, tmp_path / "home")
    for model_type, (logits, text, parameters) in expected.items():
        found = torch.load(tmp_path / model_type / "alone.pt", weights_only=True)
        assert torch.equal(found[0], logits), model_type
        assert torch.equal(found[1], text), model_type
        assert found[2] == parameters, model_type


def test_standalone_folder_loads_with_layershed_too(llama, tokens, tmp_path):
    ls.bypass(llama, ls.find_sublayers(llama)[:3])
    ls.save_pretrained(llama, tmp_path / "out", standalone=True)
    with torch.no_grad():
        assert torch.equal(ls.load_pretrained(tmp_path / "out")(tokens).logits, llama(tokens).logits)


def test_saved_folder_holds_no_code_unless_standalone(llama, tmp_path):
    ls.bypass(llama, ls.find_sublayers(llama)[:1])
    ls.save_pretrained(llama, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_standalone_saving_refuses_a_class_outside_transformers(llama, tmp_path):
    llama.__class__ = type("MyLlama", (type(llama),), {})
    with pytest.raises(ExportError, match="MyLlama is not a class of transformers"):
        ls.save_pretrained(llama, tmp_path / "out", standalone=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_lm_eval_scores_a_standalone_folder_like_the_dropped_model(tmp_path, monkeypatch):
    """Through its own Hugging Face model, byte-level, against log-probabilities summed by hand."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import ByT5Tokenizer

    from tests.support.models import build_model

    model = build_model("llama", vocab_size=300)
    ls.bypass(model, ls.find_sublayers(model)[:3])
    folder = ls.save_pretrained(model, tmp_path / "out", tokenizer=ByT5Tokenizer(extra_ids=0), standalone=True)
    scored = HFLM(pretrained=str(folder), trust_remote_code=True, device="cpu", dtype="float32", batch_size=1)
    assert type(scored.model).__name__ == "DroppedLlamaForCausalLM"
    context, continuation = "The cat sat", " on the mat"
    ((found, _),) = scored.loglikelihood([Instance("loglikelihood", {}, (context, continuation), 0)], disable_tqdm=True)
    given, asked = scored._encode_pair(context, continuation)
    tokens = torch.tensor([[*given, *asked]])
    with torch.no_grad():
        logs = model(tokens).logits.log_softmax(-1)[0, :-1].gather(-1, tokens[0, 1:, None])
    assert found == pytest.approx(logs[-len(asked) :].sum().item(), abs=1e-4)


@pytest.fixture
def folder(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ls.bypass(llama, ls.find_sublayers(llama)[:3])
    return ls.save_pretrained(llama, tmp_path / "out", standalone=True)


def test_standalone_folder_loads_as_body_and_refuses_other_auto_classes(llama, folder, tokens):
    """Another class would be filled in at random."""
    body = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(body(tokens).last_hidden_state, llama.model(tokens).last_hidden_state)
    for auto in (transformers.AutoModelForSequenceClassification, transformers.AutoModelForTokenClassification):
        with pytest.raises(ValueError, match="holds a LlamaForCausalLM without its dropped sublayers"):
            auto.from_pretrained(folder, trust_remote_code=True)


def test_standalone_model_loaded_by_transformers_refuses_surgery_and_saving(llama, folder, tokens, tmp_path):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    for act in (ls.find_sublayers, lambda model: ls.save_pretrained(model, tmp_path / "again")):
        with pytest.raises(ls.LayershedError, match="was loaded by the modelling file of a standalone folder"):
            act(loaded)
    loaded.save_pretrained(tmp_path / "again")
    known = ls.load_pretrained(tmp_path / "again")
    assert ls.dropped_sublayers(known) == ls.bypassed_sublayers(llama)
    with torch.no_grad():
        assert torch.equal(known(tokens).logits, llama(tokens).logits)


def test_dense_model_can_be_saved_standalone(llama, tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = ls.save_pretrained(llama, tmp_path / "out", standalone=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, llama(tokens).logits)
