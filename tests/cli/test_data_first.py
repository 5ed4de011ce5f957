"""What is wrong with the data is said before the model is built, and the data is read once."""

import json
from pathlib import Path

import pytest

from layershed.cli.main import main
from layershed.training.sources import Source
from tests.support.chats import CHATML, assistant, chat_of, fast_tokenizer, user
from tests.support.small_world import TINY

pytestmark = pytest.mark.usefixtures("own_world", "one_parser")


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr("layershed.training.causal_lm.build_model", lambda *_: pytest.fail("it built a model"))


def write(rows):
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("command", ["fit", "score", "prune", "benchmark", "validate"])
def test_wrong_row_is_named_before_the_model_is_built(no_model, capsys, command):
    write([{"messages": chat_of(1)}, {"messages": [user("a"), {"role": "gpt", "content": "b"}]}])
    assert main([command, "--data.source=chats.jsonl"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "row 2 of chats.jsonl: message 2 has the role 'gpt'" in said


@pytest.mark.parametrize("template", [None, CHATML], ids=["without", "with"])
def test_missing_chat_template_is_said_before_the_model_is_built(monkeypatch, capsys, template):
    write([{"messages": chat_of(number)} for number in range(9)])
    fast_tokenizer(template).save_pretrained("folder")
    Path("tiny.yaml").write_text(json.dumps({"model": {"config": {**TINY, "vocab_size": 260}}}))
    words = [
        "fit",
        "--config=tiny.yaml",
        "--data.source=chats.jsonl",
        "--data.tokenizer=folder",
        "--data.block_size=64",
        "--data.batch_size=2",
    ]
    built = []
    monkeypatch.setattr("layershed.training.causal_lm.build_model", lambda *_: built.append(1) or pytest.skip("built"))
    if template is None:
        assert main(words) == 1
        assert "'folder' has no chat template" in capsys.readouterr().err
        assert not built
    else:
        with pytest.raises(pytest.skip.Exception, match="built"):
            main(words)


def test_rows_that_were_checked_are_not_read_again(monkeypatch):
    write([{"messages": [user(f"{number}?"), assistant(f"{number}.")]} for number in range(20)])
    loads, load = [], Source.load
    monkeypatch.setattr(Source, "load", lambda self: loads.append(self.name) or load(self))
    Path("tiny.yaml").write_text(json.dumps({"model": {"config": TINY}}))
    words = ["score", "--config=tiny.yaml", "--data.source=chats.jsonl", "--data.block_size=64", "--data.batch_size=2"]
    assert main([*words, "--batches=2"]) == 0
    assert loads == ["chats.jsonl"]
    assert Path("runs/version_0/importance.csv").exists()


@pytest.mark.parametrize("command", ["fit", "prune"])
@pytest.mark.parametrize("chats", [False, True])
def test_too_few_tokens_for_a_batch_are_said_before_the_model_is_built(no_model, capsys, command, chats):
    Path("short.txt").write_text("a few words\n\nand some more\n")
    write([{"messages": chat_of(number)} for number in range(3)])
    source = "chats.jsonl" if chats else "short.txt"
    Path("tiny.yaml").write_text(json.dumps({"model": {"config": {**TINY, "vocab_size": 259}}}))
    words = ["--data.block_size=16", "--data.batch_size=64"]
    if chats:
        fast_tokenizer(CHATML).save_pretrained("folder")
        words.append("--data.tokenizer=folder")
        Path("tiny.yaml").write_text(json.dumps({"model": {"config": {**TINY, "vocab_size": 260}}}))
    assert main([command, "--config=tiny.yaml", f"--data.source={source}", *words]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "batch" in said
