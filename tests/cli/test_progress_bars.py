"""The commands show bars on a terminal; without one plain lines where it takes long, and nothing where it does not."""

import re

import pytest

from layershed.cli import progress_bars
from layershed.cli.progress_bars import ProgressBars
from layershed.progress import listening, track
from tests.support.command_line import FIT, PRUNE, SCORE, run

pytestmark = pytest.mark.usefixtures("own_world", "one_parser")


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")


def test_score_and_prune_have_bars_on_a_terminal(terminal, capsys):
    assert run([*PRUNE, "--count=1", "--batches=3", "--quality_batches=2", "--objective=speed"]) == 0
    told = plain(capsys.readouterr().out)
    for what, total in (("Scoring", 3), ("Measuring quality", 2), ("Measuring speed", 3), ("Measuring latency", 3)):
        assert re.search(rf"{what} +[━╸╺ ]+{total}/{total}", told), what


def test_short_work_without_a_terminal_prints_nothing_of_its_progress(capsys):
    assert run([*SCORE, "--batches=3"]) == 0
    told = capsys.readouterr().out
    assert "Scoring" not in told
    assert "━ " not in told


def test_long_work_without_a_terminal_prints_plain_lines(monkeypatch, capsys):
    clock = iter(range(0, 9999, 10))
    monkeypatch.setattr(progress_bars.time, "monotonic", lambda: float(next(clock)))
    with listening(ProgressBars(bars=True)):
        list(track(range(6), "Scoring", 6))
        list(track(range(2), "Searching"))
    assert capsys.readouterr().out.splitlines() == [
        "Scoring: 2/6, 0:00:40 left",
        "Scoring: 4/6, 0:00:20 left",
        "Scoring: 6/6, 0:00:00 left",
        "Searching: 2 done",
    ]


def test_work_within_work_has_two_bars_that_go_away(terminal, capsys):
    bars = ProgressBars(bars=True)
    with listening(bars):
        for _ in track(range(2), "Outer", 2):
            list(track(range(3), "Inner", 3))
    told = plain(capsys.readouterr().out)
    assert re.search(r"Outer +[━╸╺ ]+1/2[^\n]*\n *Inner +[━╸╺ ]+3/3", told)
    assert bars._progress is None
    assert not bars._tasks


def test_bar_of_fit_shows_the_work_of_callbacks(terminal, capsys):
    speed = ["--trainer.callbacks.speed=SpeedMonitor", "--trainer.callbacks.speed.prompt_tokens=4"]
    speed += ["--trainer.callbacks.speed.new_tokens=2", "--trainer.callbacks.speed.runs=2"]
    drop = [
        "--trainer.callbacks.drop=SublayerDrop",
        "--trainer.callbacks.drop.start=1",
        "--trainer.callbacks.drop.count=1",
    ]
    assert run([*FIT, *drop, "--trainer.callbacks.drop.calibrate_on=train", *speed]) == 0
    told = plain(capsys.readouterr().out)
    assert re.search(r"Scoring +[━╸╺ ]+16/16", told)
    assert re.search(r"Speed +[━╸╺ ]+3/3", told)
    assert "Speed" not in told.splitlines()[-1]
