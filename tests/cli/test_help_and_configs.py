"""The command line: help, and what it runs by its words, configs and defaults."""

from pathlib import Path

import pytest
import yaml

from layershed.cli import commands, lightning_cli, parsers
from layershed.cli.lightning_cli import LayershedCLI
from layershed.cli.trainer import Trainer
from layershed.performance.roofline import ACCELERATORS
from layershed.training.text_data import TextData
from tests.support.command_line import (
    FIT,
    run,
)

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"

pytestmark = pytest.mark.usefixtures("own_world", "one_parser")


def test_overview_help_explains_every_command(capsys):
    assert run(["--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert set(commands.PURPOSES) == {*LayershedCLI.subcommands(), *commands.FILE_COMMANDS}
    for name, what in commands.PURPOSES.items():
        assert f"{name} {what}" in told


@pytest.mark.parametrize("command", ["fit", "validate", "score", "prune", "benchmark", "generate", "plan"])
def test_command_help_is_short_and_without_markup(command, capsys):
    assert run([command, "--help"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: train.py {command} ")
    assert " ".join(commands.PURPOSES[command].split()) in " ".join(told.split())
    assert len(told.split("\n\n")[0].splitlines()) <= 3, "a short usage"
    for markup in ("``", ":class:", ":param", "known subclasses"):
        assert markup not in told
    listed = "--trainer.callbacks CALLBACKS" in told
    assert listed == (command in ("fit", "validate")), "the others list only what they use"
    assert ("--model.schedule" in told) == listed
    assert ("--data.source" in told) == (command not in ("plan", "generate")), "to plan takes no text"
    if listed:
        assert "SublayerDrop" in told
    if command == "plan":
        assert all(name in told for name in ACCELERATORS)
        assert "default: bfloat16" in " ".join(told.split())


def test_every_layershed_option_has_help_text():
    built = []

    class Look(LayershedCLI):
        def parse_arguments(self, parser, args):
            built.append(self._subcommand_parsers)
            raise SystemExit

    with pytest.raises(SystemExit):
        Look(
            lightning_cli.CausalLM,
            TextData,
            trainer_class=Trainer,
            parser_class=parsers.CommandParser,
            auto_configure_optimizers=False,
        )
    for name, parser in built[0].items():
        for action in parser._actions:
            ours = action.dest.startswith(("model.", "data.")) or name in commands.USAGE
            if ours and not action.dest.endswith(".help"):
                assert action.help, f"{name} --{action.dest}"


def test_callback_help_lists_its_options(capsys):
    assert run(["fit", "--trainer.callbacks.help", "SublayerDrop"]) == 0
    assert "Optimizer steps before the first drop." in capsys.readouterr().out


def test_fit_without_options_runs_the_quickstart(parsed):
    assert run(["fit"], quickstart=QUICKSTART) == 0
    content = yaml.safe_load(QUICKSTART.read_text())
    assert parsed[0].trainer.max_steps == content["trainer"]["max_steps"]
    assert [c.class_path for c in parsed[0].trainer.callbacks.values()][-1] == "layershed.callbacks.Report"


def test_options_override_the_quickstart(parsed):
    assert run(["fit", "--trainer.max_steps", "777", "--model.optimizer.lr=1"], quickstart=QUICKSTART) == 0
    assert parsed[0].trainer.max_steps == 777
    assert parsed[0].model.optimizer.init_args.lr == 1
    assert len(parsed[0].trainer.callbacks) > 3


@pytest.mark.parametrize(
    "words",
    [["--config", "drop.yaml"], ["--config=drop.yaml"], ["-c", "drop.yaml"], ["-cdrop.yaml"]],
    ids=["--config FILE", "--config=FILE", "-c FILE", "-cFILE"],
)
def test_given_config_replaces_the_quickstart(words, parsed):
    assert run(["fit", *words], quickstart=QUICKSTART) == 0
    assert [c.class_path for c in parsed[0].trainer.callbacks] == ["layershed.callbacks.SublayerDrop"]


@pytest.mark.parametrize("command", ["validate", "score"])
def test_commands_other_than_fit_do_not_load_the_quickstart(command, parsed):
    assert run([command], quickstart=QUICKSTART) == 0
    assert parsed[0].trainer.callbacks is None


def test_print_config_prints_the_quickstart(capsys):
    assert run(["fit", "--print_config"], quickstart=QUICKSTART) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["max_steps"] == yaml.safe_load(QUICKSTART.read_text())["trainer"]["max_steps"]


@pytest.mark.parametrize(
    ("words", "tokenizer"),
    [
        ([], None),
        (["--model.pretrained=a/b"], "a/b"),
        (["--model.pretrained=model.gguf"], "model.gguf"),
        (["--model.pretrained=a/b", "--data.tokenizer=bytes"], "bytes"),
    ],
    ids=["no model", "hub model", "gguf model", "explicit tokenizer"],
)
@pytest.mark.parametrize("command", ["fit", "score", "prune", "benchmark"])
def test_tokenizer_defaults_to_that_of_the_model(command, words, tokenizer, parsed):
    assert run([command, *words]) == 0
    assert parsed[0].data.tokenizer == tokenizer


@pytest.mark.parametrize("command", ["validate", "score", "prune", "benchmark", "plan"])
def test_commands_accept_the_config_saved_by_fit(command, parsed, capsys):
    assert run(["fit", "--model.pretrained=a/b", "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert {"ckpt_path", "weights_only"} <= set(yaml.safe_load(printed)), "it says more than its sections"
    Path("left.yaml").write_text(printed)
    assert run([command, "--config=left.yaml"]) == 0
    assert parsed[0].model.pretrained == "a/b"


@pytest.mark.parametrize(
    "there", [[], ["version_0", "version_3", "version_x", "version_12.bak"]], ids=["no runs", "former runs"]
)
def test_csv_and_tensorboard_logs_share_one_numbered_folder(there):
    for name in there:
        Path("runs", name).mkdir(parents=True)
    trainer = Trainer(accelerator="cpu")
    number = 4 if there else 0
    assert [Path(logger.log_dir) for logger in trainer.loggers] == 2 * [Path(f"runs/version_{number}")]
    assert Trainer(accelerator="cpu", logger=False).loggers == []


def test_config_can_set_another_logger(monkeypatch):
    seen = []
    monkeypatch.setattr(LayershedCLI, "fit", lambda self, **_: seen.extend(self.trainer.loggers), False)
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "else", "name": "where"}}
    Path("logger.yaml").write_text(yaml.safe_dump({"trainer": {"logger": logger}}))
    assert run([*FIT, "--config=logger.yaml"]) == 0
    assert [Path(logger.log_dir) for logger in seen] == [Path("else/where/version_0")]
