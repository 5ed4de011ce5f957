"""Callbacks of a config by name: from the command line, from a second config, from a saved config."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import yaml
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, ProgressBar

from layershed.callbacks import Export, LoRARecovery, Quantization, SublayerDrop
from layershed.cli.lightning_cli import LayershedCLI
from layershed.cli.main import main
from layershed.cli.named_callbacks import as_list
from layershed.cli.stop_on_signal import StopOnSignal
from layershed.cli.trainer import Trainer

pytestmark = pytest.mark.usefixtures("own_world", "one_parser")

QUICKSTART = f"--config={Path(__file__).parents[2] / 'configs' / 'quickstart.yaml'}"
ORDER = ["resume", "best", "checkpoint", "monitor", "drop", "speed", "export", "report"]
DROP = {"class_path": "layershed.callbacks.SublayerDrop", "init_args": {"start": 2, "count": 1}}


@pytest.fixture
def config_of(monkeypatch):
    """Parse a command line of fit and return the callbacks of its config. Nothing is built."""
    seen = []
    monkeypatch.setattr(LayershedCLI, "instantiate_classes", lambda self: seen.append(self.config.fit))
    monkeypatch.setattr(LayershedCLI, "after_instantiate_classes", lambda self: None)
    monkeypatch.setattr(LayershedCLI, "_run_subcommand", lambda self, subcommand: None)

    def parse(*words):
        assert main(["fit", *words]) == 0
        return seen[-1].trainer.callbacks

    return parse


def written(name, callbacks):
    Path(name).write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}, sort_keys=False))
    return f"--config={name}"


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        (["--trainer.callbacks.drop.start", "4"], "drop", {"start": 4, "ratio": 0.25}),
        (["--trainer.callbacks.drop.start=4"], "drop", {"start": 4}),
        (["--trainer.callbacks.drop.init_args.start", "4"], "drop", {"start": 4}),
        (
            ["--trainer.callbacks.drop.ratio=null", "--trainer.callbacks.drop.count=5"],
            "drop",
            {"ratio": None, "count": 5},
        ),
        (["--trainer.callbacks.drop.protect", "[0,-1]"], "drop", {"protect": [0, -1]}),
        (["--trainer.callbacks.speed.runs", "3"], "speed", {"runs": 3, "new_tokens": 32}),
        (
            ["--trainer.callbacks.checkpoint.monitor", "val_loss"],
            "checkpoint",
            {"monitor": "val_loss", "save_last": True},
        ),
    ],
)
def test_word_of_the_command_line_changes_one_option_of_a_named_callback(words, name, expected, config_of):
    callbacks = config_of(QUICKSTART, *words)
    assert list(callbacks) == ORDER
    assert expected.items() <= vars(callbacks[name].init_args).items()
    assert callbacks["export"].init_args.folder == "pruned"


def test_nested_option_of_a_named_callback_keeps_its_neighbours(config_of):
    speed = config_of(QUICKSTART, "--trainer.callbacks.drop.speed.runs", "3")["drop"].init_args.speed
    assert (speed.runs, speed.prompt_tokens) == (3, 128)


def test_second_config_changes_only_the_callbacks_that_it_names(config_of):
    second = written(
        "second.yaml",
        {
            "drop": {"init_args": {"start": 7}},
            "report": None,
            "stop": {"class_path": "EarlyStopping", "init_args": {"monitor": "val_loss"}},
        },
    )
    callbacks = config_of(QUICKSTART, second)
    assert list(callbacks) == [*ORDER, "stop"]
    assert (callbacks["drop"].init_args.start, callbacks["drop"].init_args.ratio) == (7, 0.25)
    assert callbacks["report"] is None
    assert callbacks["stop"].class_path == "lightning.pytorch.callbacks.EarlyStopping"
    assert callbacks["speed"].init_args.runs == 9


@pytest.mark.parametrize("first", [(), (QUICKSTART,)], ids=["alone", "after named callbacks"])
def test_list_of_callbacks_is_taken_as_it_stands(first, config_of):
    entries = [DROP, {"class_path": "ModelCheckpoint"}]
    callbacks = config_of(*first, written("list.yaml", entries), "--trainer.callbacks.save_last=true")
    assert [callback.class_path.rpartition(".")[2] for callback in callbacks] == ["SublayerDrop", "ModelCheckpoint"]
    assert callbacks[0].init_args.count == 1
    assert callbacks[1].init_args.save_last is True


def test_list_of_callbacks_still_takes_one_more(config_of):
    callbacks = config_of(written("list.yaml", [DROP]), "--trainer.callbacks+=ModelCheckpoint")
    assert [callback.class_path.rpartition(".")[2] for callback in callbacks] == ["SublayerDrop", "ModelCheckpoint"]


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ([QUICKSTART, "--trainer.callbacks.dorp.start=4"], ["no callback", "'dorp'", "did you mean drop?"]),
        ([QUICKSTART, "--trainer.callbacks.dorp=null"], ["no callback", "'dorp'", "did you mean drop?"]),
        ([QUICKSTART, "--trainer.callbacks.start=4"], ["'start'", "it names resume, best, checkpoint, monitor, drop"]),
        ([QUICKSTART, "--trainer.callbacks.drop.strat=4"], ["SublayerDrop", "'strat'", "did you mean start?"]),
        (
            [QUICKSTART, "--trainer.callbacks.best.every_n_train_steps=50"],
            ["BestCheckpoint", "'every_n_train_steps' is not accepted; it takes monitor, mode, filename\n"],
        ),
        ([QUICKSTART, "--trainer.callbacks.drop.start=x"], ["SublayerDrop", "start", "x"]),
        ([QUICKSTART, "--trainer.callbacks.more=SublayerDorp"], ["SublayerDorp", "did you mean SublayerDrop?"]),
        ([QUICKSTART, "--trainer.callbacks+=EarlyStopping"], ["have names", "--trainer.callbacks.NAME EarlyStopping"]),
        (["--trainer.callbacks.drop.start=4"], ["'drop'", "--trainer.callbacks.drop CLASS"]),
        (
            ["--config=list.yaml", "--trainer.callbacks.drop.start=4"],
            ["drop.start", "without names", "drop: {class_path"],
        ),
    ],
)
def test_wrong_name_or_option_of_a_callback_is_refused_in_one_sentence(words, fragments, capsys):
    written("list.yaml", [DROP])
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *words])
    told = capsys.readouterr().err
    assert stopped.value.code == 2
    assert told.startswith("error: trainer.callbacks: ")
    assert len(told.splitlines()) == 1
    for fragment in fragments:
        assert fragment in told


def test_saved_config_of_a_run_gives_the_same_callbacks(monkeypatch, capsys):
    built = []
    monkeypatch.setattr(LayershedCLI, "fit", lambda self, **_: built.append(self.trainer.callbacks), False)
    words = [QUICKSTART, "--trainer.callbacks.drop.start=4", "--trainer.callbacks.report=null"]
    with pytest.raises(SystemExit):
        main(["fit", *words, "--print_config"])
    Path("saved.yaml").write_text(capsys.readouterr().out)
    for given in (words, ["--config=saved.yaml"]):
        assert main(["fit", *given]) == 0
    kinds = [[type(callback).__name__ for callback in callbacks] for callbacks in built]
    assert kinds[0] == kinds[1]
    assert "Report" not in kinds[0]
    first, again = (next(one for one in listed if isinstance(one, SublayerDrop)) for listed in built)
    assert first.schedule == again.schedule
    assert first.schedule.start == 4


@pytest.mark.parametrize(
    ("words", "bars"),
    [([], 1), (["--trainer.enable_progress_bar=false"], 0), (["--trainer.callbacks=TQDMProgressBar"], 1)],
)
def test_fit_has_one_progress_bar_unless_it_is_off(words, bars, monkeypatch):
    built = []
    monkeypatch.setattr(LayershedCLI, "fit", lambda self, **_: built.extend(self.trainer.callbacks), False)
    assert main(["fit", *words]) == 0
    found = [callback for callback in built if isinstance(callback, ProgressBar)]
    assert len(found) == bars
    assert not words or bars == 0 or type(found[0]).__name__ == "TQDMProgressBar"
    assert sum(isinstance(callback, StopOnSignal) for callback in built) == 1


def test_named_callbacks_of_layershed_act_in_the_order_of_a_drop():
    drop, quantization, recovery, export = SublayerDrop(1, count=1), Quantization(), LoRARecovery(), Export()
    watching, stopping = pl.Callback(), EarlyStopping("val_loss")
    named = {"out": None, "e": export, "w": watching, "r": recovery, "d": drop, "s": stopping, "q": quantization}
    assert as_list(named) == [drop, watching, quantization, recovery, stopping, export]
    assert as_list([export, drop]) == [export, drop], "a list keeps its order"
    assert as_list(drop) == [drop]
    assert as_list(None) == []


def test_trainer_takes_callbacks_by_name():
    checkpoint = ModelCheckpoint()
    trainer = Trainer(logger=False, callbacks={"keep": checkpoint, "gone": None}, enable_progress_bar=False)
    assert [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)] == [checkpoint]
