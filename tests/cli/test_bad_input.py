"""The table of benchmarks/bad_input.py: every bad input gives a one-sentence error, and no file is overwritten."""

import shutil

import pytest

from tests.support.bad_input import trial as bad_input
from tests.support.bad_input.damage import SCORE, Case, written
from tests.support.bad_input.trial import CASES, problems, try_case

pytestmark = pytest.mark.usefixtures("own_seed", "one_parser")


def test_bad_input_table_is_large_and_holds_every_default_case():
    assert len(CASES) >= 90
    assert set(CASES) >= BY_DEFAULT


# One of each kind of damage; make test-all tries all of them.
BY_DEFAULT = {
    "config cut",
    "hidden_size negative",
    "weights whose header lies about its length",
    "a weight of another shape",
    "gguf cut",
    "dropped_modules names no module",
    "skip of an unknown kind",
    "plan binary",
    "text binary",
    "yaml a bomb",
    "yaml in another encoding",
    "quantized to 3 bits",
    "export over the model",
    "output inside a file",
    "root in a place that takes no files",
}
ALL = [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name", ALL)
def test_bad_input_gives_a_one_sentence_error(name, world):
    answer = try_case(CASES[name], world)
    assert not list(problems(CASES[name], answer)), answer


# ---- the harness itself ----


def found(case, world):
    return list(problems(case, try_case(case, world)))


def test_harness_reports_good_input_that_goes_through(world):
    assert found(Case(SCORE, ()), world)[0] == "it went through"


def test_harness_reports_an_error_with_other_words(world):
    assert found(Case([*SCORE, "--metric=x"], ("the moon",)), world) == ["it does not say the moon"]


def test_harness_reports_a_traceback(world, monkeypatch):
    def fail(_words):
        raise RuntimeError("a bug")

    monkeypatch.setattr(bad_input, "command_line", fail)
    assert found(Case(SCORE, ()), world)[0] == "an exception left it"


@pytest.mark.parametrize(
    "write",
    [lambda: print("a second line", file=bad_input.sys.stderr), lambda: bad_input.os.write(2, b"x\n")],
    ids=["print", "os.write"],
)
def test_harness_reports_a_second_line_of_output(write, world, monkeypatch):
    run = bad_input.command_line

    def chatty(words):
        write()
        return run(words)

    monkeypatch.setattr(bad_input, "command_line", chatty)
    assert "it says 2 lines" in found(Case([*SCORE, "--metric=x"], ("cosine",)), world)


@pytest.mark.parametrize("what", ["changed", "gone", "marker"])
def test_harness_reports_changed_files(what, world, monkeypatch):
    run = bad_input.command_line

    def clumsy(words):
        if what == "changed":
            written("text.txt", "other words")(bad_input.Path())
        elif what == "gone":
            shutil.rmtree("model")
        else:
            written("marker", "")(bad_input.Path())
        return run(words)

    monkeypatch.setattr(bad_input, "command_line", clumsy)
    name = {"changed": "text.txt", "gone": "model", "marker": "marker"}[what]
    seen = found(Case(["score", "--metric=x"], ("cosine",)), world)
    assert any(problem.startswith("it changed") and name in problem for problem in seen)


def test_harness_prints_the_counts_in_its_last_line(world, monkeypatch, capsys):
    cases = {"good": Case(SCORE, ()), "bad": Case([*SCORE, "--metric=x"], ("cosine",))}
    monkeypatch.setattr(bad_input, "CASES", cases)
    monkeypatch.setattr(bad_input, "make_world", lambda folder: shutil.copytree(world, folder, dirs_exist_ok=True))
    assert bad_input.main() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "2 bad inputs tried, 1 answered in one sentence"
    monkeypatch.setattr(bad_input, "CASES", {"bad": cases["bad"]})
    assert bad_input.main() == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 bad inputs tried, 1 answered in one sentence"
