"""What is wrong with the text is found before the weights of the model are loaded."""

import pytest
import torch
from transformers import ByT5Tokenizer

import layershed as ls
from layershed.saving import load_model
from layershed.training import causal_lm
from layershed.training.causal_lm import CausalLM
from tests.support.command_line import DATA, FIT, SCORE, TRAINER, model_of, run
from tests.support.small_world import TINY

pytestmark = pytest.mark.usefixtures("own_world", "one_parser")


@pytest.fixture
def no_model(monkeypatch):
    """Fails if a model with weights is built."""
    monkeypatch.setattr(causal_lm, "build_model", lambda *_: pytest.fail("it built the model"))


@pytest.fixture
def saved():
    """A model in a folder, dense and with a sublayer dropped."""
    torch.manual_seed(0)
    model = CausalLM(config=TINY).model
    model.save_pretrained("dense")
    ls.bypass(model, ls.find_sublayers(model)[:1])
    ls.save_pretrained(model, "dropped")


SMALL_VOCABULARY = model_of(**{**TINY, "vocab_size": 100})
WRONG = {
    "missing file": ([model_of(**TINY), "--data.source=nope.txt"], "no such file"),
    "too few embeddings": ([SMALL_VOCABULARY, *DATA], "only 100"),
    "too few positions": ([model_of(**TINY), *DATA, "--data.block_size=65", "--data.max_tokens=null"], "64 positions"),
    "no tokenizer": ([model_of(**TINY), *DATA, "--data.tokenizer=./nowhere"], "tokenizer"),
    "too few positions of a folder": (
        ["--model.pretrained=./dense", "--data.block_size=65", "--data.tokenizer=bytes"],
        "64",
    ),
    "too few positions of a dropped folder": (
        ["--model.pretrained=./dropped", "--data.block_size=65", "--data.tokenizer=bytes"],
        "64 positions",
    ),
}


@pytest.mark.default_cases(9)
@pytest.mark.parametrize("command", ["fit", "validate", "score"])
@pytest.mark.parametrize("case", list(WRONG))
def test_wrong_text_is_refused_before_the_model_is_built(command, case, saved, no_model, capsys, monkeypatch):
    monkeypatch.setattr(load_model, "_loaded", lambda *_: pytest.fail("it read weights"))
    words, said = WRONG[case]
    assert run([command, *words, *TRAINER]) == 1
    told = capsys.readouterr().err
    assert said in told
    assert len(told.splitlines()) == 1


def test_model_that_cannot_be_built_is_refused_by_its_own_error(capsys):
    assert run(["fit", "--model.pretrained=./nope", *DATA]) == 1
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("words", [FIT, [*SCORE, "--batches=1"]], ids=["fit", "score"])
def test_tokenizer_is_loaded_once(words, monkeypatch):
    made = []
    build = ByT5Tokenizer.__init__
    monkeypatch.setattr(
        ByT5Tokenizer, "__init__", lambda self, **options: (made.append(self), build(self, **options))[1]
    )
    assert run(words) == 0
    assert len(made) == 1
