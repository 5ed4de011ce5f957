"""A run that --trainer.max_steps shortens says which option to move, before the model is built."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from layershed.cli import lightning_cli
from layershed.cli.lightning_cli import LayershedCLI
from layershed.cli.main import main
from tests.support.command_line import callbacks

pytestmark = pytest.mark.usefixtures("own_world", "one_parser")

FOLDER = Path(__file__).parents[2] / "configs"
DROPPING = [path for path in sorted(FOLDER.glob("*.yaml")) if "SublayerDrop" in path.read_text()]
SHORT = ["--trainer.max_steps", "100"]


@pytest.fixture
def run(monkeypatch):
    """Run fit up to the point at which it would build the model; False if it does not come so far."""
    built = []
    monkeypatch.setattr(LayershedCLI, "instantiate_classes", lambda self: built.append(self.before()))
    monkeypatch.setattr(LayershedCLI, "before", LayershedCLI.before_instantiate_classes, raising=False)
    monkeypatch.setattr(LayershedCLI, "before_instantiate_classes", lambda self: None)
    monkeypatch.setattr(LayershedCLI, "after_instantiate_classes", lambda self: None)
    monkeypatch.setattr(LayershedCLI, "_run_subcommand", lambda self, subcommand: None)

    def fit(*words):
        built.clear()
        return main(["fit", *words]) == 0 and bool(built)

    return fit


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("path", DROPPING, ids=lambda path: path.stem)
def test_advice_for_a_shortened_config_makes_it_run(path, run, capsys):
    start = yaml.safe_load(path.read_text())["trainer"]["callbacks"]["drop"]["init_args"]["start"]
    assert run(f"--config={path}", *SHORT) == (start < 100)
    told = capsys.readouterr().err
    if start < 100:
        return
    assert re.match(r"error: SublayerDrop\(start=\d+.*\) never acts in max_steps=100: add --trainer.call", told)
    advised = shlex.split(told.strip().removesuffix(".").partition(": add ")[2])
    assert run(f"--config={path}", *SHORT, *advised)


def test_advice_moves_all_callbacks_in_their_order(run, capsys):
    config = [f"--config={FOLDER / 'qlora.yaml'}", "--trainer.callbacks.recovery.start=400", *SHORT]
    assert not run(*config)
    assert "--trainer.callbacks.drop.start 45 --trainer.callbacks.recovery.start 60" in capsys.readouterr().err


def test_iterative_drop_that_is_cut_off_is_refused(run, capsys):
    words = [f"--config={FOLDER / 'iterative.yaml'}", "--trainer.max_steps"]
    assert not run(*words, "160")
    assert "does not finish in max_steps=160: add --trainer.callbacks.drop.start 48" in capsys.readouterr().err
    assert not run(*words, "3")
    assert "train longer, at least 201 steps" in capsys.readouterr().err
    assert run(*words, "201")


def test_listed_callback_is_moved_in_its_config(run, capsys):
    drop = {"class_path": "layershed.callbacks.SublayerDrop", "init_args": {"start": 200, "count": 1}}
    Path("list.yaml").write_text(callbacks(drop))
    assert not run("--config=list.yaml", *SHORT)
    assert (
        "SublayerDrop(start=200) never acts in max_steps=100: set start: 60 in the config." in capsys.readouterr().err
    )


def test_monitor_that_never_measures_is_noted(run, capsys):
    words = [f"--config={FOLDER / 'quickstart.yaml'}", "--trainer.callbacks.drop.start=6", "--trainer.max_steps=12"]
    assert run(*words)
    told = capsys.readouterr().out
    assert "note: RedundancyMonitor(every_n_steps=25) never acts in max_steps=12" in told
    advised = shlex.split(told.strip().partition(": add ")[2])
    assert run(*words, *advised)
    assert "note:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [["--trainer.fast_dev_run=true"], ["--trainer.callbacks.drop=null"], ["--trainer.max_steps=-1"]],
    ids=["trial", "without the drop", "without an end"],
)
def test_run_in_which_nothing_comes_too_late_is_not_refused(words, run):
    assert run(f"--config={FOLDER / 'quickstart.yaml'}", *SHORT, *words)


def test_commands_other_than_fit_take_a_shortened_config(run, monkeypatch):
    monkeypatch.setattr(lightning_cli, "check_steps", lambda _: pytest.fail("it checked"))
    assert main(["validate", f"--config={FOLDER / 'quickstart.yaml'}", *SHORT]) == 0
