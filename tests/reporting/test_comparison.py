"""Runs side by side: what differs, what is missing, what is damaged; the page says the same and runs nothing."""

import copy
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from layershed.cli.compare import compare
from layershed.errors import ResultError
from layershed.planning.plan import Drop, DropPlan, Sublayer
from layershed.reporting.comparison import compare_runs, differences, short_names
from layershed.reporting.comparison_page import chart_of
from layershed.reporting.run_files import read_run

DROP = {"class_path": "layershed.callbacks.SublayerDrop", "init_args": {"start": 5, "count": 1}}
LORA = {"class_path": "layershed.callbacks.LoRARecovery", "init_args": {"rank": 8}}
SPEED = {"class_path": "layershed.callbacks.SpeedMonitor"}
REPORT = {"class_path": "layershed.callbacks.Report", "init_args": {}}


def config(*entries, lr=0.1, **trainer):
    return {
        "seed_everything": 0,
        "model": {"pretrained": None, "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": lr}}},
        "trainer": {"max_steps": 10, "log_every_n_steps": 1, **trainer, "callbacks": list(entries)},
    }


def named(**entries):
    return {**config(), "trainer": {**config()["trainer"], "callbacks": entries}}


def other_start(start):
    changed = copy.deepcopy(DROP)
    changed["init_args"]["start"] = start
    return changed


CASES = {
    "equal": ([config(DROP), config(DROP)], {}),
    "another value": ([config(DROP), config(DROP, lr=0.2)], {"model.optimizer.lr": ("0.1", "0.2")}),
    "null and false": ([config(a=None), config(a=False)], {"trainer.a": ("null", "false")}),
    "an option that is absent": ([config(a=1), config()], {"trainer.a": ("1", "-")}),
    "an option of a callback": (
        [config(DROP), config(other_start(6))],
        {"trainer.callbacks.SublayerDrop.start": ("5", "6")},
    ),
    "a callback that one run does not list": (
        [config(DROP, LORA), config(DROP)],
        {"trainer.callbacks.LoRARecovery": ("listed", "-")},
    ),
    "listed beside named": ([config(DROP), named(drop=DROP)], {}),
    "named by both": (
        [named(drop=DROP), named(drop=other_start(7))],
        {"trainer.callbacks.drop.start": ("5", "7")},
    ),
    "two of one class": (
        [config(DROP, other_start(8)), config(DROP, other_start(9))],
        {"trainer.callbacks.SublayerDrop#2.start": ("8", "9")},
    ),
    "one callback without a list": ([{**config(), "trainer": {"callbacks": DROP}}] * 2, {}),
    "an unknown configuration": ([config(), {}, config(lr=0.2)], {"model.optimizer.lr": ("0.1", "?", "0.2")}),
    "nothing known": ([{}, {}], {}),
    "strange types": ([{"trainer": [1]}, {"trainer": {"callbacks": [7, {"class_path": 3}]}}], {}),
}


@pytest.mark.parametrize("case", CASES)
def test_only_differing_options_are_rows(case):
    configs, expected = CASES[case]
    rows = list(differences(configs, ["fit"] * len(configs)))
    assert {row.label: row.values for row in rows} == expected


def test_option_of_another_command_is_no_difference():
    given = [config(), {**config(lr=0.2), "counts": [1, 2]}]
    assert [row.label for row in differences(given, ["fit", "benchmark"])] == ["model.optimizer.lr"]
    assert [row.label for row in differences(given, ["benchmark", "benchmark"])] == ["counts", "model.optimizer.lr"]


def test_names_lose_what_all_begin_with_and_stay_different():
    assert short_names([Path("/a/b/x/version_0"), Path("/a/b/y/version_0")]) == ("x/version_0", "y/version_0")
    assert short_names([Path("/a/b"), Path("/a/b/c")]) == ("b", "b/c")


# ---- folders of runs ----

DROPS = "drop/loss_before,drop/loss_after,drop/loss_end,speed/sdr"
ROWS = f"step,train_loss,val_loss,{DROPS},my_task,step_seconds,tokens_per_second\n"
STEPS = ROWS + "".join(f"{step},{5 - step / 10},,,,,,,0.5,100\n" for step in range(10))
WHOLE = f"{STEPS}4,,4.5,,,,,0.25,,\n4,,,4.4,4.6,,,,,\n9,,4.25,,,4.2,nan,0.5,,\n"
PLAN = DropPlan((Drop(Sublayer(1, "mlp", "a.1"), 0.1, 5),), scope="mlp", metric="cosine")
PHASE = {"speedup": {"median": 1.25, "low": 1.1, "high": 1.4}, "dropped": 120.0}
SPEED_FILE = {"phases": {"decode": PHASE}, "parameters_dropped": 1000, "kv_bytes_dropped": None}


@pytest.fixture
def make_run(tmp_path):
    def make(name, own=None, metrics=WHOLE, **files):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        contents = {
            "config.yaml": yaml.safe_dump(config(DROP, SPEED, REPORT) if own is None else own),
            "metrics.csv": metrics,
            "drop_plan.json": PLAN.to_json(),
            "speed.json": json.dumps(SPEED_FILE),
            "report.html": "",
        }
        for file, content in {**contents, **{key.replace("__", "."): value for key, value in files.items()}}.items():
            if content is not None:
                (folder / file).write_text(content)
        return folder

    return make


def test_finished_run_shows_losses_tasks_speed_and_sdr(make_run):
    run = read_run(make_run("run"))
    assert (run.kind, run.notes, run.drops) == ("fit", [], (5,))
    assert run.sections["Quality"] == {
        "Validation loss before the drop": "4.4000",
        "Validation loss right after the drop": "4.6000",
        "Validation loss at the end": "4.2000",
        "Last train_loss": "4.1000",
        "Last val_loss": "4.2500",
    }
    assert run.sections["Metrics and tasks"] == {"my_task": "0.5000"}
    assert run.sections["Speed"] == {
        "Training (median)": "100 tokens/s",
        "A step (median)": "0.5 s",
        "Decode speedup": "x1.25 [1.10, 1.40]",
        "Decode speed": "120 tokens/s",
    }
    assert run.sections["SDR"] == {"SDR right after the drop": "undefined"}
    assert run.sections["Size"] == {"Parameters": "1,000"}


def test_curves_and_drops_count_the_steps_alike(make_run):
    """Lightning's rows begin at 0 and have the epoch; those of a drop at step 5 are of step 5, as its plan says."""
    run = read_run(make_run("run", metrics="step,epoch,val_loss,drop/loss_after\n4,0,4.5,\n5,,,4.6\n9,0,4.25,\n"))
    assert run.curves == {"val_loss": ((5, 4.5), (10, 4.25)), "drop/loss_after": ((5, 4.6),)}
    assert run.drops == (5,)


UNFINISHED = {
    "interrupted": (
        {"metrics": ROWS + "0,5,,,,,,,,\n", "report__html": None},
        ["has no report.html", "was interrupted: its last row is of step 1 of 10"],
    ),
    "stopped after its last step": ({"report__html": None}, ["has no report.html"]),
    "stopped early": ({"metrics": ROWS + "3,5,,,,,,,,\n"}, ["ended early: its last row is of step 4 of 10"]),
    "without speed": ({"speed__json": None}, ["has no speed.json"]),
    "damaged speed": ({"speed__json": "{"}, ["speed.json cannot be read (JSONDecodeError"]),
    "speed of something else": ({"speed__json": "[1]"}, ["speed.json cannot be read (TypeError"]),
    "damaged rows": ({"metrics": "step,train_loss\n1,abc\n"}, ["metrics.csv cannot be read (ValueError"]),
    "damaged plan": ({"drop_plan__json": "{}"}, ["drop_plan.json cannot be read (ValueError"]),
    "damaged configuration": ({"config__yaml": "a: ["}, ["config.yaml cannot be read (ParserError"]),
    "no configuration": ({"config__yaml": None}, ["has no config.yaml"]),
}


@pytest.mark.parametrize("case", UNFINISHED)
def test_unfinished_or_damaged_run_is_shown_with_what_it_has(case, make_run):
    changes, notes = UNFINISHED[case]
    run = read_run(make_run("run", **changes))
    assert run.kind == "fit"
    assert len([note for note in run.notes if note.startswith(notes[0])]) == 1
    assert all(any(note.startswith(each) for note in run.notes) for each in notes)
    assert not any("of step 10 of 10" in note for note in run.notes)
    table = compare_runs([run, read_run(make_run("other"))])
    assert table.notes[table.names[0]] == tuple(run.notes)
    assert table.without_config == ((table.names[0],) if "config" in case else ())


def test_config_of_billions_of_values_is_not_expanded(make_run):
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
    run = read_run(make_run("run", config__yaml=bomb))
    assert any("config.yaml cannot be read (ConfigError" in note for note in run.notes)
    assert not compare_runs([run, run]).sections.get("Configuration")


KINDS = {
    "fit": {"metrics.csv": "step,train_loss\n1,2\n"},
    "evaluation": {"metrics.csv": "step,test_loss\n0,2\n"},
    "prune": {"quality.json": '{"before": {"loss": 1, "accuracy": 0.5}, "after": {"loss": 2, "accuracy": 0.25}}'},
    "benchmark": {"benchmark.json": '{"dense": {"loss": 1}, "measurements": []}', "importance.csv": ""},
    "plan": {"prediction.json": '{"decode_speedup": 1.5}'},
    "score": {"importance.csv": "step,block,kind,metric,value\n"},
    "unknown": {"config.yaml": "seed_everything: 1\n"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_other_kinds_stand_beside_a_fit(kind, make_run, tmp_path, capsys):
    folder = tmp_path / "runs" / "version_1"
    folder.mkdir(parents=True)
    for name, content in KINDS[kind].items():
        (folder / name).write_text(content)
    make_run("runs/version_0")
    found = compare([str(tmp_path / "runs" / f"version_{number}") for number in range(2)])
    assert (found.names, found.kinds) == (("version_0", "version_1"), ("fit", kind))
    told = capsys.readouterr().out
    assert kind in told
    assert told.splitlines()[-1].endswith("runs/comparison.html")


def test_control_of_a_run_is_finished_and_differs_in_the_drop(make_run):
    """Its config is without what it left out; older ones still list it."""
    result = {"start": 4, "end": 10, "quality": {"loss": 4.1, "accuracy": 0.2}, "without": ["SublayerDrop"]}
    files = {"drop_plan__json": None, "speed__json": None, "report__html": None, "control__json": json.dumps(result)}
    run = read_run(make_run("run"))
    for name, own, differing in (("run/control", config(), 3), ("run/older", config(DROP, SPEED, REPORT), 0)):
        control = read_run(make_run(name, own=own, metrics="step,train_loss\n9,4\n", **files))
        assert (control.kind, control.notes) == ("control", [])
        assert control.sections["Drop"] == {"Control": "steps 5 to 10 without SublayerDrop"}
        assert control.sections["Quality"]["Validation loss at the end"] == "4.1000"
        rows = compare_runs([run, control]).sections.get("Configuration", ())
        assert sum(row.values == ("listed", "-") for row in rows) == differing


@pytest.mark.parametrize("kind", ["evaluation", "unknown", "prune"])
def test_folder_of_runs_is_compared_without_those_that_only_evaluate(kind, make_run, tmp_path, capsys):
    for number in (0, 2):
        make_run(f"runs/version_{number}")
    (tmp_path / "runs" / "version_1").mkdir()
    for name, content in KINDS[kind].items():
        (tmp_path / "runs" / "version_1" / name).write_text(content)
    found = compare([str(tmp_path / "runs")])
    assert found.kinds == (("fit", "prune", "fit") if kind == "prune" else ("fit", "fit"))
    assert ("version_1 is left out" in capsys.readouterr().out) == (kind != "prune")
    shutil.rmtree(tmp_path / "runs" / "version_2")
    if kind != "prune":
        with pytest.raises(ResultError, match="is one run"):
            compare([str(tmp_path / "runs")])


@pytest.mark.parametrize(
    ("ratio", "shown"), [(-0.0004, "0.00"), (-0.014, "-0.01"), (0.126, "0.13"), (None, "undefined")]
)
def test_sdr_has_the_digits_of_the_report_and_no_negative_zero(make_run, ratio, shown):
    content = {"before": {"loss": 1, "accuracy": 0.5}, "after": {"loss": 2, "accuracy": 0.25}, "sdr": {"value": ratio}}
    run = read_run(make_run("run", quality__json=json.dumps(content)))
    assert run.sections["SDR"]["SDR right after the drop"] == shown


def test_hyperparameters_of_other_projects_are_compared(make_run):
    runs = [read_run(make_run(name, config__yaml=None, hparams__yaml=f"lr: {lr}")) for name, lr in (("a", 1), ("b", 2))]
    assert [(row.label, row.values) for row in compare_runs(runs).sections["Configuration"]] == [("lr", ("1", "2"))]
    assert not runs[0].notes


def test_compare_answers_without_importing_torch(make_run, tmp_path):
    runs = [str(make_run(name)) for name in ("runs/a", "runs/b")]
    code = "import sys; from layershed.cli.main import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    words = [sys.executable, "-W", "ignore", "-c", code, "compare", *runs]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"


# ---- the page ----


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def test_page_shows_the_table_escapes_names_and_runs_nothing(make_run, tmp_path):
    evil = "<script>alert(1)</script>"
    make_run("runs/a", own={**config(DROP), "model": {"pretrained": evil}})
    make_run("runs/b", own=config(DROP), metrics=WHOLE.replace("my_task", evil))
    found = compare([str(tmp_path / "runs/a"), str(tmp_path / "runs/b")], page=str(tmp_path / "out.html"))
    text = (tmp_path / "out.html").read_text()
    page = Page(text)
    assert evil not in text
    words = "".join(page.words)
    for rows in found.sections.values():
        for row in rows:
            assert row.label in words
            assert all(value in words for value in row.values)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?://|url\(", text)
    assert "default-src 'none'" in text


def test_curves_of_all_runs_lie_on_one_axis_at_their_values():
    curves = [((0, 5.0), (10, 4.0), (20, 3.5)), ((0, 6.0), (30, 2.0)), ()]
    chart = chart_of(["a", "b", "c"], curves, [(10,), (), ()], (940, 330))
    assert [line.name for line in chart.lines] == ["a", "b"]
    (low, high), (left, right) = ((ticks[0], ticks[-1]) for ticks in (chart.y_ticks, chart.x_ticks))

    def value(y):
        share = (y - low.at) / (high.at - low.at)
        return float(low.text) + share * (float(high.text) - float(low.text))

    def step(x):
        share = (x - left.at) / (right.at - left.at)
        return float(left.text) + share * (float(right.text) - float(left.text))

    for line, curve in zip(chart.lines, curves, strict=False):
        points = [tuple(map(float, pair.split(","))) for pair in line.points.split()]
        for (x, y), (at, loss) in zip(points, curve, strict=True):
            assert step(x) == pytest.approx(at, abs=0.1)
            assert value(y) == pytest.approx(loss, abs=0.02)
            assert chart.left <= x <= chart.right
            assert chart.top <= y <= chart.bottom
    assert step(chart.lines[0].drops[0][0]) == pytest.approx(10, abs=0.1)
    assert chart.lines[0].marks[1][2] == "a, step 10: 4.0000"


@pytest.mark.parametrize("curve", [((3, 1.0),), ((0, 2.0), (1, 2.0)), tuple((n, 1 / (n + 1)) for n in range(5000))])
def test_chart_of_a_point_a_flat_line_and_a_long_run_is_finite_and_small(curve):
    chart = chart_of(["a"], [curve], [()], (360, 280))
    points = chart.lines[0].points.split()
    assert len(points) <= 401
    assert all(0 <= float(x) <= 360 and 0 <= float(y) <= 280 for x, y in (pair.split(",") for pair in points))


def test_page_replaces_a_comparison_and_no_other_file(make_run, tmp_path):
    runs = [str(make_run("runs/a")), str(make_run("runs/b"))]
    page = tmp_path / "page.html"
    for _ in range(2):
        compare(runs, page=str(page))
    page.write_text("my own")
    with pytest.raises(ResultError, match="is no comparison"):
        compare(runs, page=str(page))
    assert page.read_text() == "my own"
    with pytest.raises(ResultError, match="is a folder"):
        compare(runs, page=str(tmp_path))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["runs/a"], "is one run. Give two or more"),
        (["runs/a", "runs/a"], "is one run"),
        (["runs/a", "nope"], "there is no folder 'nope'"),
        (["runs/a", "empty"], "'empty' is no folder of a run"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused_by_name(given, message, make_run, tmp_path, monkeypatch):
    make_run("runs/a")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ResultError, match=message):
        compare(given)
    assert not list(tmp_path.rglob("*.html")) or [path.name for path in tmp_path.rglob("*.html")] == ["report.html"]
