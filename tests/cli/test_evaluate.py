"""``train.py evaluate`` against the functions, dense beside dropped; what is refused."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, ByT5Tokenizer

import layershed as ls
from layershed.evaluation.results import TaskResults
from tests.support.command_line import DATA, model_of, run
from tests.support.models import build_model
from tests.support.small_world import TINY

pytestmark = pytest.mark.usefixtures("own_world", "one_parser")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense model, and the same without two sublayers."""
    folder = tmp_path_factory.mktemp("model")
    fields = {name: value for name, value in TINY.items() if name != "model_type"}
    model = build_model("llama", **{**fields, "head_dim": 8, "num_hidden_layers": 3, "max_position_embeddings": 256})
    tokenizer = ByT5Tokenizer(extra_ids=0)
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    ls.bypass(model, ls.find_sublayers(model)[1:3])
    ls.save_pretrained(model, folder / "dropped", tokenizer=tokenizer)
    return folder / "dense", folder / "dropped"


def test_tasks_of_a_dropped_model_stand_beside_those_of_the_dense_one(folders, capsys):
    dense, dropped = folders
    lines = [
        {"request": {"context": "one and", "continuation": f" {answer}"}, "doc_id": n, "idx": answer, "label": n % 2}
        for n in range(4)
        for answer in range(2)
    ]
    Path("sums.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["--tasks=[sums.jsonl]", "--passkey=[150]", "--limit=3", f"--dense={dense}", "--output=found.json"]
    assert run(["evaluate", f"--model.pretrained={dropped}", *words]) == 0
    told = capsys.readouterr().out
    found = [TaskResults.from_dict(own) for own in json.loads(Path("found.json").read_text()).values()]
    for results, model in zip(
        found, (ls.load_pretrained(dropped), AutoModelForCausalLM.from_pretrained(dense)), strict=True
    ):
        tokenizer = ByT5Tokenizer.from_pretrained(dense)
        expected = ls.evaluate_tasks(model, tokenizer, ["sums.jsonl"], limit=3).scores
        assert results.scores == (*expected, *ls.passkey_retrieval(model, tokenizer, (150,), questions=3).scores)
    for text in ("sums", "passkey_150", "average", "dropped:", "dense:"):
        assert text in told


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "nothing to evaluate"),
        (["--tasks=[no.jsonl]"], "no file 'no.jsonl'"),
        (["--passkey=[9000]"], "Take at most 240"),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(folders, capsys, words, says):
    assert run(["evaluate", f"--model.pretrained={folders[1]}", *words]) != 0
    told = " ".join(capsys.readouterr().err.split())
    assert says in told
    assert told.count("error:") == 1


def test_random_weights_are_refused(capsys):
    assert run(["evaluate", model_of(**TINY), *DATA, "--passkey=[50]"]) != 0
    assert "only random weights" in " ".join(capsys.readouterr().err.split())
