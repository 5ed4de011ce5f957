"""The command line: help, one-sentence errors, and the files that each command writes."""

import inspect
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import warnings
from itertools import islice
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import AutoModelForCausalLM, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

import layershed as ls
from layershed.callbacks import SpeedMonitor
from layershed.cli import benchmark as benchmark_command
from layershed.cli import commands, lightning_cli, parsers, prune, quiet
from layershed.cli import plan as plan_command
from layershed.cli import run_folder as running
from layershed.cli.lightning_cli import LayershedCLI
from layershed.cli.messages import causes
from layershed.cli.trainer import Trainer
from layershed.errors import LayershedError
from layershed.performance import benchmark as benchmarking
from layershed.performance.intervals import ENOUGH
from layershed.performance.latency import Latency
from layershed.performance.roofline import ACCELERATORS
from layershed.performance.stopwatch import SpeedSettings
from layershed.planning.plan import Drop, DropPlan, Sublayer, count_by_kind
from layershed.training.text_data import TextData
from tests.support.command_line import (
    BENCHMARK,
    DATA,
    DROPPING,
    FIT,
    KEEP,
    MAMBA,
    PLAN,
    PRUNE,
    SCORE,
    SMALL,
    SPEED,
    TINY,
    TRAINER,
    callbacks,
    model_of,
    run,
)
from tests.support.models import build_model
from tests.support.runs import unmarked
from tests.support.thinned import one_of, some_of
from tests.support.ticking import MADE_UP

TRAIN = Path(__file__).parents[2] / "train.py"
QUICKSTART = TRAIN.parent / "configs" / "quickstart.yaml"

pytestmark = pytest.mark.usefixtures("own_world", "one_parser")


class Broken(pl.Callback):
    """A callback with a bug."""

    def __init__(self):
        raise RuntimeError("a bug of ours")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a small model whose branches matter, and its tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "small"
    fields = {name: value for name, value in TINY.items() if name != "model_type"}
    build_model("llama", **{**fields, "head_dim": 8, "num_hidden_layers": 4}).save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def without_two(saved, tmp_path_factory):
    """The same folder without two of its sublayers."""
    model = AutoModelForCausalLM.from_pretrained(saved)
    ls.bypass(model, [s for s in ls.find_sublayers(model) if s.name in ("attention.1", "mlp.2")])
    folder = tmp_path_factory.mktemp("model") / "dropped"
    return ls.save_pretrained(model, folder, tokenizer=ByT5Tokenizer.from_pretrained(saved))


@pytest.fixture
def parsed(monkeypatch):
    """The parsed configs; nothing is built from them."""
    seen = []
    monkeypatch.setattr(LayershedCLI, "instantiate_classes", lambda self: seen.append(self.config[self.subcommand]))
    monkeypatch.setattr(LayershedCLI, "after_instantiate_classes", lambda self: None)
    monkeypatch.setattr(LayershedCLI, "_run_subcommand", lambda self, subcommand: None)
    return seen


# ---- errors ----

ERRORS = {
    "typo in a config": (["fit", "--config=typo.yaml"], 2, ["model.pretraind", "did you mean model.pretrained?"]),
    "typo in a section": (["fit", "--config=section.yaml"], 2, ["modle.pretrained", "did you mean model.pretrained?"]),
    "typo in a word": (["fit", "--trainer.max_stps=3"], 2, ["trainer.max_stps", "did you mean trainer.max_steps?"]),
    "option of another command": ([*SCORE, "--count=1"], 2, ["--count=1"]),
    "config without --config": (["fit", "a.yaml"], 2, ["did you mean --config a.yaml?"]),
    "typo in an argument": (
        [*FIT, "--config=argument.yaml"],
        2,
        ["trainer.callbacks: layershed.callbacks.SublayerDrop", "'calib_on'", "did you mean calibrate_on?"],
    ),
    "typo in an argument that prune has, too": ([*PRUNE, "--config=ratoi.yaml"], 2, ["'ratoi'", "did you mean ratio?"]),
    "argument forgotten": ([*FIT, "--config=forgotten.yaml"], 2, ["layershed.callbacks.SublayerDrop", "start"]),
    "unknown metric": ([*FIT, "--config=metric.yaml"], 1, ["'cosin'", "Did you mean 'cosine'?"]),
    "ratio above 1": ([*FIT, "--config=ratio.yaml"], 1, ["ratio=1.2", "(0, 1)"]),
    "count and ratio": ([*FIT, "--config=both.yaml"], 1, ["exactly one of count and ratio"]),
    "neither count nor ratio": ([*FIT, "--config=neither.yaml"], 1, ["exactly one of count and ratio"]),
    "count above the number of sublayers": ([*FIT, "--config=many.yaml"], 1, ["99", "only 4"]),
    "drop after the end": ([*FIT, "--config=late.yaml"], 1, ["SublayerDrop(start=5) never acts in max_steps=3"]),
    "no attention": (["fit", model_of(**MAMBA), *DATA, *TRAINER, "--config=drop.yaml"], 1, ["Mamba", "attention"]),
    "unknown model type": (["fit", model_of(model_type="lama"), *DATA], 1, ["lama"]),
    "empty data": ([*FIT, "--data.source=empty.txt"], 1, ["empty.txt", "empty"]),
    "missing data": ([*FIT, "--data.source=nope.txt"], 1, ["nope.txt", "no such file"]),
    "missing folder": (["fit", "--model.pretrained=./nope"], 1, ["./nope", "no such folder"]),
    "missing gguf": (["fit", "--model.pretrained=nope.gguf"], 1, ["nope.gguf", "no such GGUF file"]),
    "folder without a model": (["fit", "--model.pretrained=./afolder"], 1, ["afolder", "config.json"]),
    "missing config": (["fit", "--config=nope.yaml"], 2, ["nope.yaml", "does not exist"]),
    "config that is a folder": (["fit", "--config=afolder"], 2, ["afolder", "not a file"]),
    "broken YAML": (["fit", "--config=broken.yaml"], 2, ["parsing config", "line 4, column 1"]),
    "no YAML mapping": (["fit", "--config=scalar.yaml"], 2, ["config: hello"]),
    "wrong type in a config": (
        ["fit", "--config=steps.yaml"],
        2,
        ["trainer.max_steps: Expected", "int", "Got value: many"],
    ),
    "wrong type in a word": (
        ["fit", "--trainer.max_steps=many"],
        2,
        ["trainer.max_steps: Expected", "int", "Got value: many", "--help"],
    ),
    "wrong literal": (
        ["fit", "--model.schedule=x"],
        2,
        ["model.schedule: Expected", "'constant', ", "Got value: x", "--help"],
    ),
    "none of several types": (
        ["fit", "--trainer.precision=8"],
        2,
        ["trainer.precision: Expected one of: ", "[64, 32, 16]", "'bf16'", "NoneType", "Given value: 8"],
    ),
    "wrong type of an argument": (
        ["fit", "--model.optimizer.lr=x"],
        2,
        ["model.optimizer: lr: Expected one of: ", "'float'", "Given value: x", "--help"],
    ),
    "unknown class": ([*FIT, "--config=class.yaml"], 2, ["SublayerDorp", "did you mean SublayerDrop?"]),
    "unknown short class": (
        [*FIT, "--config=short.yaml"],
        2,
        ["trainer.callbacks: ", "SublayerDorp", "did you mean SublayerDrop?"],
    ),
    "unknown module": ([*FIT, "--config=module.yaml"], 2, ["nopackage.Nope", "No module named 'nopackage'"]),
    "no callback": ([*FIT, "--config=nocallback.yaml"], 2, ["collections.OrderedDict", "Callback"]),
    "unknown optimizer": (
        [*FIT, "--model.optimizer=AdamX"],
        2,
        ["model.optimizer: ", "AdamX", "give the full path of a class"],
    ),
    "unknown accelerator": ([*FIT, "--trainer.accelerator=abacus"], 1, ["trainer: ", "abacus"]),
    "block too long for the model": ([*FIT, "--data.block_size=65"], 1, ["block_size=65", "64 positions"]),
    "block too long for the text": (
        [*FIT, "--data.batch_size=10000", "--data.max_tokens=null"],
        1,
        ["text.txt", "one batch"],
    ),
    "vocabulary too small": (
        ["fit", model_of(**{**TINY, "vocab_size": 100}), *DATA, *TRAINER],
        1,
        ["259 ids", "only 100", "data.tokenizer"],
    ),
    "missing tokenizer": ([*FIT, "--data.tokenizer=./nope"], 1, ["./nope", "tokenizer"]),
    "missing checkpoint": ([*FIT, "--ckpt_path=nope.ckpt"], 1, ["'nope.ckpt'", "no such file"]),
    "checkpoint called last.ckpt": ([*FIT, "--ckpt_path=last.ckpt"], 1, ["'last.ckpt'", "no such file"]),
    "damaged checkpoint": ([*FIT, "--ckpt_path=damaged.ckpt"], 1, ["damaged.ckpt", "is corrupt"]),
    "checkpoint that is a folder": ([*FIT, "--ckpt_path=afolder"], 1, ["'afolder'", "it is a folder"]),
    "output that is a file": ([*FIT, "--trainer.default_root_dir=afile"], 1, ["default_root_dir='afile'", "is a file"]),
    "output in a file": ([*FIT, "--trainer.default_root_dir=afile/runs"], 1, ["'afile/runs'", "is a file"]),
    "score: unknown metric": ([*SCORE, "--metric=cosin"], 1, ["'cosin'", "Did you mean 'cosine'?"]),
    "score: no batches": ([*SCORE, "--batches=-1"], 1, ["batches=-1", "at least 1"]),
    "score: no attention": (["score", model_of(**MAMBA), *DATA], 1, ["Mamba", "attention"]),
    "prune: neither": (PRUNE, 1, ["exactly one of count and ratio"]),
    "prune: both": ([*PRUNE, "--count=1", "--ratio=0.5"], 1, ["exactly one of count and ratio"]),
    "prune: ratio": ([*PRUNE, "--ratio=1.2"], 1, ["ratio=1.2", "(0, 1)"]),
    "prune: count": ([*PRUNE, "--count=5"], 1, ["drop 5", "only 4"]),
    "prune: protected": ([*PRUNE, "--count=1", "--protect=[0, -1]"], 1, ["drop 1", "only 0", "4 more are protected"]),
    "prune: block": ([*PRUNE, "--count=3", "--scope=block"], 1, ["drop 3", "only 2"]),
    "prune: scope": ([*PRUNE, "--count=1", "--scope=all"], 2, ["scope: Expected", "'attention', ", "Got value: all"]),
    "prune: speed": (["prune", *SMALL, "--count=1", "--prompt_tokens=80"], 1, ["prompt_tokens=80", "64 positions"]),
    "prune: no held-out batches": (
        [*PRUNE, "--count=1", "--quality_batches=0"],
        1,
        ["quality_batches=0", "at least 1"],
    ),
    "prune: output": ([*PRUNE, "--count=1", f"--output={TRAIN}"], 1, ["train.py", "holds no saved model"]),
    "prune: output of something else": ([*PRUNE, "--count=1", f"--output={TRAIN.parent}"], 1, ["holds no saved model"]),
    "prune: objective": (
        [*PRUNE, "--count=1", "--objective=fast"],
        2,
        ["objective: Expected", "'importance', 'speed'", "Got value: fast"],
    ),
    "benchmark: nothing to compare": (
        BENCHMARK,
        1,
        ["nothing to compare", "--base DENSE", "--ckpt_path", "--counts '["],
    ),
    "benchmark: base not dense": ([*BENCHMARK, "--base=DROPPED"], 1, ["lacks attention.1, mlp.2", "not dense"]),
    "benchmark: dropped without a base": (
        ["benchmark", "--model.pretrained=DROPPED", *DATA, *SPEED],
        1,
        ["weights of attention.1, mlp.2 were removed", "with --base"],
    ),
    "benchmark: sweep of a dropped model": (
        ["benchmark", "--model.pretrained=DROPPED", *DATA, *SPEED, "--counts=[1]"],
        1,
        ["begins with the dense model", "already lacks attention.1, mlp.2"],
    ),
    "benchmark: sweep with a base": ([*BENCHMARK, "--counts=[1]", "--base=SAVED"], 1, ["Leave out base"]),
    "benchmark: no such base": ([*BENCHMARK, "--base=./nope"], 1, ["base: ", "./nope", "no such folder"]),
    "benchmark: no such GGUF base": ([*BENCHMARK, "--base=nope.gguf"], 1, ["base: ", "no such GGUF file"]),
    "benchmark: base without a model": ([*BENCHMARK, "--base=afolder"], 1, ["'afolder'", "config.json"]),
    "benchmark: count": ([*BENCHMARK, "--counts=[1, 3]"], 1, ["drop 3", "only 2"]),
    "benchmark: block": ([*BENCHMARK, "--counts=[3]", "--scopes=[block]"], 1, ["drop 3", "only 2"]),
    "benchmark: count of none": ([*BENCHMARK, "--counts=[0]"], 1, ["count=0", "at least 1"]),
    "benchmark: count without brackets": (
        [*BENCHMARK, "--counts=2"],
        2,
        ["counts: Expected", "Sequence", "Got value: 2", "see train.py COMMAND --help"],
    ),
    "benchmark: count of something": ([*BENCHMARK, "--counts=[x]"], 2, ["counts: Expected", "int", "Got value: x"]),
    "benchmark: scope": (
        [*BENCHMARK, "--counts=[1]", "--scopes=[all]"],
        2,
        ["scopes: Expected", "'attention', ", "Got value: all"],
    ),
    "benchmark: no scope": ([*BENCHMARK, "--counts=[1]", "--scopes=[]"], 1, ["scopes is empty"]),
    "benchmark: scope that is not there": (
        [*BENCHMARK, "--counts=[1]", "--scopes=[cross_attention]"],
        1,
        ["cross_attention", "none of the 4"],
    ),
    "benchmark: metric": ([*BENCHMARK, "--counts=[1]", "--metric=cosin"], 1, ["Did you mean 'cosine'?"]),
    "benchmark: quality": (
        [*BENCHMARK, "--counts=[1]", "--quality=bleu"],
        2,
        ["quality: Expected", "'accuracy', ", "Got value: bleu"],
    ),
    "benchmark: no held-out batches": ([*BENCHMARK, "--counts=[1]", "--quality_batches=0"], 1, ["quality_batches=0"]),
    "benchmark: no runs": ([*BENCHMARK, "--counts=[1]", "--runs=0"], 1, ["runs=0", "at least 1"]),
    "benchmark: too many tokens": ([*BENCHMARK, "--counts=[1]", "--prompt_tokens=80"], 1, ["80", "64 positions"]),
    "benchmark: missing checkpoint": ([*BENCHMARK, "--ckpt_path=nope.ckpt"], 1, ["'nope.ckpt'", "no such file"]),
    "benchmark: damaged checkpoint": ([*BENCHMARK, "--ckpt_path=damaged.ckpt"], 1, ["damaged.ckpt", "is corrupt"]),
    "benchmark: no attention": (["benchmark", model_of(**MAMBA), *DATA, *SPEED, "--counts=[1]"], 1, ["Mamba"]),
    "plan: unknown device": ([*PLAN, "--device=a1000"], 1, ["'a1000'", "Did you mean 'a100'?", "this"]),
    "plan: joint": ([*PLAN, "--scope=joint", "--count=1"], 1, ["decided by importances", "drop_plan.json", "--plan"]),
    "plan: count and ratio": ([*PLAN, "--count=1", "--ratio=0.5"], 1, ["exactly one of count and ratio"]),
    "plan: plan and count": (
        [*PLAN, "--plan=other_plan.json", "--count=1"],
        1,
        ["give only one of plan, count and ratio"],
    ),
    "plan: count": ([*PLAN, "--count=3"], 1, ["drop 3", "only 2"]),
    "plan: ratio": ([*PLAN, "--ratio=1.2"], 1, ["ratio=1.2", "(0, 1)"]),
    "plan: missing plan": ([*PLAN, "--plan=nope.json"], 1, ["'nope.json'", "no file"]),
    "plan: damaged plan": ([*PLAN, "--plan=damaged_plan.json"], 1, ["damaged_plan.json", "not JSON"]),
    "plan: plan of another model": ([*PLAN, "--plan=other_plan.json"], 1, ["no sublayer mlp.9", "another model"]),
    "plan: of a dropped model": (
        ["plan", "--model.pretrained=DROPPED", "--count=1", *PLAN[2:]],
        1,
        ["already lacks attention.1, mlp.2", "leave out count and ratio"],
    ),
    "plan: too many tokens": (PLAN[:2], 1, ["prompt_tokens=256", "64 positions"]),
    "plan: no sequences": ([*PLAN, "--batch_size=0"], 1, ["batch_size=0", "at least 1"]),
    "plan: no attention": (["plan", model_of(**MAMBA)], 1, ["Mamba", "attention"]),
    "plan: no cache": (
        ["plan", model_of(model_type="openai-gpt", n_embd=32, n_layer=2, n_head=4, vocab_size=259)],
        1,
        ["attention.0", "no keys and values in the cache"],
    ),
    "plan: checkpoint": ([*PLAN, "--ckpt_path=damaged.ckpt"], 2, ["--ckpt_path", "no such option"]),
    "score: checkpoint": ([*SCORE, "--ckpt_path=damaged.ckpt"], 2, ["--ckpt_path", "no such option"]),
}


@pytest.mark.parametrize("case", some_of(ERRORS, 4))
def test_wrong_usage_gives_a_one_sentence_error_before_training(case, saved, without_two, capsys, monkeypatch):
    monkeypatch.setattr(pl.LightningModule, "optimizer_step", lambda *_, **__: pytest.fail("it trained"))
    monkeypatch.setattr(running, "estimate_importance", lambda *_, **__: pytest.fail("it scored"))
    monkeypatch.setattr(benchmarking, "measure_speed", lambda *_, **__: pytest.fail("it measured"))
    words, code, fragments = ERRORS[case]
    words = [word.replace("SAVED", str(saved)).replace("DROPPED", str(without_two)) for word in words]
    assert run(words) == code
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert told[0].startswith("error: ")
    for fragment in fragments:
        assert fragment in told[0]
    assert told[0].lower().count("did you mean") <= 1
    assert len(told[0]) <= 520
    assert not list(Path().rglob("metrics.csv"))
    assert not list(Path().rglob("importance.csv"))
    if words[:1] == ["plan"]:
        assert not Path("runs").exists()


def test_option_of_another_command_is_not_suggested(capsys):
    Path("other.yaml").write_text("counts: [1]\n")
    assert run([*SCORE, "--config=other.yaml"]) == 2
    assert capsys.readouterr().err == (
        "error: Subcommand 'score' does not accept option 'counts'; see train.py COMMAND --help\n"
    )


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root can write everywhere")
def test_folder_without_write_permission_is_an_error(capsys):
    Path("afolder").chmod(0o500)
    assert run([*FIT, "--trainer.default_root_dir=afolder/runs"]) == 1
    assert "nothing can be written to" in capsys.readouterr().err


def test_folder_that_os_access_refuses_is_an_error(capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert run(FIT) == 1
    assert "error: trainer.default_root_dir='runs': nothing can be written to" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [[], ["fti"], ["--model.pretrained", "x"]], ids=["no command", "unknown command", "option first"]
)
def test_missing_or_unknown_command_prints_the_commands(words, capsys):
    assert run(words) == 2
    told = capsys.readouterr().err.strip().splitlines()
    usage = " ".join(" ".join(told[:-1]).split())
    names = "fit,validate,test,predict,score,prune,benchmark,generate,plan,compare,recommend"
    assert usage == f"usage: train.py [-c CONFIG] {{{names}}} ..."
    assert told[-1].startswith("error: ")


def test_bug_in_a_command_keeps_its_traceback(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(running, "estimate_importance", fail)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        run(SCORE)


def test_bug_in_a_callback_keeps_its_traceback():
    Path("bug.yaml").write_text(callbacks({"class_path": "tests.cli.test_commands.Broken"}))
    with pytest.raises(Exception, match="a bug of ours") as caught:
        run([*FIT, "--config=bug.yaml"])
    assert any(isinstance(error, RuntimeError) for error in causes(caught.value))


def test_bug_while_handling_an_error_keeps_its_traceback(monkeypatch):
    def fail(*_, **__):
        try:
            raise LayershedError("what was wrong at first")
        except LayershedError:
            raise RuntimeError("a bug of ours")  # noqa: B904  the chaining is implicit on purpose

    monkeypatch.setattr(running, "estimate_importance", fail)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        run(SCORE)


def test_interrupt_prints_one_word_and_exits_with_130(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "estimate_importance", interrupt)
    assert run(SCORE) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


# ---- the process that it runs in ----


@pytest.mark.parametrize(
    "words",
    [[*SCORE, "--batches=1"], ["score", "--metric=1", "--x"], [*SCORE, "--metric=x"]],
    ids=["success", "wrong usage", "error"],
)
def test_main_leaves_the_process_as_it_was(words, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["somebody.py", "--else"])
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_info()
    transformers_logging.enable_progress_bar()
    filters = list(warnings.filters)
    of_logs = [list(logging.getLogger(name).filters) for name in quiet.LOGS]
    run(words)
    left = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(verbosity)
    (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()
    assert left == (logging.INFO, True)
    assert sys.argv == ["somebody.py", "--else"], "a DDP run starts its other processes with it"
    assert warnings.filters == filters
    assert [logging.getLogger(name).filters for name in quiet.LOGS] == of_logs


def test_main_without_arguments_reads_sys_argv(monkeypatch, parsed):
    monkeypatch.setattr(sys, "argv", ["train.py", "score", "--metric", "angular"])
    assert run(None) == 0
    assert parsed[0].metric == "angular"


# ---- help ----


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


# ---- what is run ----


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


# ---- runs ----


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # it has: each run has a directory of its own
def test_fit_repeats_and_resumes_from_its_saved_config(capsys):
    Path("run.yaml").write_text(
        callbacks({"class_path": "RedundancyMonitor", "init_args": {"every_n_steps": 1}}, DROPPING, KEEP)
    )
    assert run([*FIT, "--trainer.max_steps=6", "--config=run.yaml"]) == 0
    first = Path("runs/version_0")
    assert run(["fit", f"--config={first}/config.yaml"]) == 0
    assert run(["fit", f"--config={first}/config.yaml", f"--ckpt_path={first}/checkpoints/epoch=0-step=2.ckpt"]) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["version_0", "version_1", "version_2"]
    for name in ("importance.csv", "drop_plan.json"):
        contents = [(Path("runs") / f"version_{number}" / name).read_text() for number in range(3)]
        assert contents[0] == contents[1], f"{name}: repeated from its config.yaml"
        assert contents[0] == contents[2], f"{name}: resumed before the drop"
    assert DropPlan.load(first / "drop_plan.json").drops[0].step == 3

    capsys.readouterr()
    last = first / "checkpoints" / "last.ckpt"
    assert run(["validate", *DATA, *TRAINER, f"--config={first}/config.yaml", f"--ckpt_path={last}"]) == 0
    assert "val_loss" in capsys.readouterr().out
    weights = torch.load(last, weights_only=True)
    torch.save(weights["state_dict"], "weights.ckpt")
    assert run([*FIT, "--ckpt_path=weights.ckpt"]) == 1
    assert "not a checkpoint that Lightning wrote" in capsys.readouterr().err


def batches_of(folder, split, count, **kwargs):
    """The batches that a command reads."""
    data = TextData("text.txt", tokenizer=str(folder), block_size=16, batch_size=2, max_tokens=512, **kwargs)
    data.setup()
    return list(islice(getattr(data, f"{split}_dataloader")(), count))


@torch.no_grad()
def plain_importance(model, batches):
    """The paper's formula on stored hidden states, in float64."""
    stored = {}

    def note(name, of_input=False):
        def hook(_, args, kwargs, output):
            value = (args[0] if args else kwargs["hidden_states"]) if of_input else output
            stored.setdefault(name, []).append((value[0] if isinstance(value, tuple) else value).double().flatten(0, 1))

        return hook

    handles = []
    for index, layer in enumerate(model.model.layers):
        for name, module, of_input in (
            ("x", layer, True),
            ("y", layer, False),
            ("attention", layer.self_attn, False),
        ):
            handles.append(module.register_forward_hook(note((name, index), of_input), with_kwargs=True))
    for batch in batches:
        model(input_ids=batch["input_ids"])
    for handle in handles:
        handle.remove()
    values = {key: torch.cat(tensors) for key, tensors in stored.items()}
    importance = {}
    for index in range(len(model.model.layers)):
        x, y, middle = values["x", index], values["y", index], values["x", index] + values["attention", index]
        for kind, before, after in (("attention", x, middle), ("mlp", middle, y), ("block", x, y)):
            importance[index, kind] = 1 - cosine_similarity(before, after, dim=-1).mean().item()
    return importance


def read_importance(path):
    rows = [line.split(",") for line in path.read_text().splitlines()]
    assert rows[0] == ["step", "block", "kind", "metric", "value"]
    assert {(row[0], row[3]) for row in rows[1:]} == {("0", "cosine")}
    return {(int(block), kind): float(value) for _, block, kind, _, value in rows[1:]}


def test_score_prints_and_writes_the_importances_of_the_formula(saved, capsys):
    assert run(["score", f"--model.pretrained={saved}", *DATA, "--batches=3"]) == 0
    told = capsys.readouterr().out
    folder = Path("runs/version_0")
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "importance.csv", "importance.png"}
    assert (folder / "importance.png").read_bytes().startswith(b"\x89PNG")
    importance = read_importance(folder / "importance.csv")

    batches = batches_of(saved, "train", 3)
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert importance == pytest.approx(plain_importance(model, batches), rel=1e-4)
    scores = ls.estimate_importance(model, batches)
    assert importance == {(block, kind): value for block, kind, value in scores.rows()}

    least = min((value, block, kind) for (block, kind), value in importance.items() if kind != "block")
    rows = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in told.splitlines() if "\u2502" in line]
    column = {"attention": 1, "mlp": 2}[least[2]]
    assert rows[least[1]][column] == f"{least[0]:#.3g}  #1"
    assert sorted(int(cell.split("#")[1]) for row in rows for cell in row[1:3]) == list(range(1, 9))
    assert f"{3 * 2 * 16} tokens" in told


def test_score_of_random_weights_prints_a_note(saved, capsys):
    assert run([*SCORE, "--batches=1"]) == 0
    assert capsys.readouterr().out.startswith("note: without --model.pretrained the weights are random")
    assert run(["score", f"--model.pretrained={saved}", *DATA, "--batches=1"]) == 0
    assert "note" not in capsys.readouterr().out


def test_score_can_be_repeated_from_its_config(saved):
    assert run(["score", f"--model.pretrained={saved}", *DATA, "--batches=2", "--metric=angular"]) == 0
    assert run(["score", "--config=runs/version_0/config.yaml"]) == 0
    first, second = (Path("runs", f"version_{number}", "importance.csv").read_text() for number in (0, 1))
    assert first == second
    assert ",angular," in first


def test_prune_writes_the_results_of_the_functions(saved, capsys):
    words = ["--ratio=0.25", "--batches=3", "--quality_batches=2", "--standalone", *SPEED]
    assert run(["prune", f"--model.pretrained={saved}", *DATA, *words]) == 0
    told = " ".join(capsys.readouterr().out.split())
    folder = Path("runs/version_0")
    names = {"config.yaml", "importance.csv", "drop_plan.json", "speed.json", "quality.json", "pruned", "report.html"}
    assert {path.name for path in folder.iterdir()} == names

    model = AutoModelForCausalLM.from_pretrained(saved)
    importance = plain_importance(model, batches_of(saved, "train", 3))
    ranked = sorted((value, *key) for key, value in importance.items() if key[1] != "block")[:2]
    plan = DropPlan.load(folder / "drop_plan.json")
    assert [(drop.sublayer.block, drop.sublayer.kind) for drop in plan.drops] == [
        (block, kind) for _, block, kind in ranked
    ]
    assert [drop.score for drop in plan.drops] == pytest.approx([value for value, _, _ in ranked], rel=1e-4)
    assert read_importance(folder / "importance.csv") == pytest.approx(importance, rel=1e-4)

    held_out = batches_of(saved, "val", 2)
    before = plain_quality(model, held_out)
    pruned = ls.load_pretrained(folder / "pruned")
    after = plain_quality(pruned, held_out)
    for moment, (loss, accuracy) in (("before", before), ("right after", after)):
        assert f"Validation loss {moment} the drop {loss:.4f} (next-token accuracy {accuracy:.1%}".replace("%", "") in (
            told.replace(" %)", "").replace("%", "")
        )
    noted = json.loads((folder / "quality.json").read_text())
    for moment, quality in (("before", before), ("after", after)):
        assert [noted[moment]["loss"], noted[moment]["accuracy"]] == pytest.approx(quality, rel=1e-4)
    assert (folder / "pruned" / "modeling_dropped.py").is_file(), "standalone"
    assert f"{before[0]:.4f}" in (folder / "pruned" / "README.md").read_text()
    ls.bypass(model, plan)
    tokens = held_out[0]["input_ids"]
    assert torch.equal(pruned(input_ids=tokens).logits, model(input_ids=tokens).logits)
    assert set(ls.dropped_sublayers(pruned)) == set(plan)
    assert DropPlan.load(folder / "pruned" / "drop_plan.json") == plan
    assert len(ByT5Tokenizer.from_pretrained(folder / "pruned")) == 259

    speed = json.loads((folder / "speed.json").read_text())
    assert speed["parameters_dense"] == model.num_parameters()
    assert speed["parameters_dropped"] == pruned.num_parameters()
    attentions = 4 - count_by_kind(plan)["attention"]
    assert (speed["kv_bytes_dense"], speed["kv_bytes_dropped"]) == (4 * 2 * 8 * 4, attentions * 2 * 8 * 4)
    assert (speed["prompt_tokens"], speed["new_tokens"], speed["runs"]) == (4, 2, 2)
    page = (folder / "report.html").read_text()
    assert f"{before[0]:.4f}" in page
    assert f"{after[0]:.4f}" in page


def test_default_number_of_pairs_is_enough_for_an_interval():
    measuring = [Trainer.prune, Trainer.benchmark, SpeedMonitor, ls.measure_speed, ls.measure_forward, SpeedSettings]
    defaults = [inspect.signature(each).parameters["runs"].default for each in measuring]
    assert min(defaults) >= ENOUGH
    assert len(set(defaults)) == 1


@torch.no_grad()
def plain_quality(model, batches):
    """Mean loss and accuracy over all next tokens."""
    logits = torch.cat([model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1) for batch in batches])
    targets = torch.cat([batch["input_ids"][:, 1:].flatten() for batch in batches])
    return cross_entropy(logits, targets).item(), (logits.argmax(-1) == targets).double().mean().item()


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    ("words", "kinds", "free"),
    [
        (["--scope=attention", "--count=2"], {"attention": 2, "mlp": 0}, range(4)),
        (["--scope=mlp", "--ratio=0.5"], {"attention": 0, "mlp": 2}, range(4)),
        (["--scope=block", "--count=1", "--protect=[0, -1]"], {"attention": 1, "mlp": 1}, (1, 2)),
        # without protection it would be these two that go
        (["--scope=mlp", "--count=2", "--protect=[1, -1]"], {"attention": 0, "mlp": 2}, (0, 2)),
    ],
    ids=["attention by count", "mlp by ratio", "block with protection", "mlp with protection"],
)
def test_prune_applies_scope_count_ratio_and_protection(words, kinds, free, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(prune, "write_report", lambda record, path: path)  # half of the time, and not the question
    output = tmp_path / "elsewhere" / "small"
    words = [*words, "--batches=1", "--quality_batches=1", f"--output={output}", *SPEED]
    assert run(["prune", f"--model.pretrained={saved}", *DATA, *words]) == 0
    dropped = ls.dropped_sublayers(ls.load_pretrained(output))
    assert count_by_kind(dropped) == kinds
    assert {sublayer.block for sublayer in dropped} <= set(free)


def test_pruned_folder_works_as_model_and_tokenizer_source(saved, capsys):
    prune = ["prune", f"--model.pretrained={saved}", *DATA, "--count=2", "--batches=1", "--quality_batches=1", *SPEED]
    assert run(prune) == 0
    pruned = Path("runs/version_0/pruned")
    gone = {(sublayer.block, sublayer.kind) for sublayer in ls.dropped_sublayers(ls.load_pretrained(pruned))}
    assert run(["score", f"--model.pretrained={pruned}", *DATA, "--batches=1"]) == 0
    kept = {key for key in read_importance(Path("runs/version_1/importance.csv")) if key[1] != "block"}
    assert kept == {(block, kind) for block in range(4) for kind in ("attention", "mlp")} - gone
    assert run(["fit", f"--model.pretrained={pruned}", *DATA, *TRAINER, "--trainer.enable_checkpointing=false"]) == 0
    capsys.readouterr()
    assert run(["prune", f"--model.pretrained={pruned}", *DATA, "--count=1", *SPEED]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: prune: the model already lacks ")
    assert all(f"{kind}.{block}" in told for block, kind in gone)


def test_score_uses_the_precision_of_the_trainer(saved):
    words = [f"--model.pretrained={saved}", *DATA, "--batches=1"]
    assert run(["score", *words]) == 0
    assert run(["score", *words, "--trainer.precision=bf16-mixed"]) == 0
    exact, rounded = (read_importance(Path("runs", f"version_{number}", "importance.csv")) for number in (0, 1))
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=0.1)


def test_prune_by_speed_drops_least_importance_per_millisecond(saved, monkeypatch):
    asked = []

    def latency(model, **settings):
        asked.append(settings)
        return Latency({s: 0.1 if s.kind == "attention" else 0.001 for s in ls.find_sublayers(model)}, 1.0)

    monkeypatch.setattr(prune, "measure_latency", latency)
    monkeypatch.setattr(prune, "write_report", lambda record, path: path)
    words = ["--count=3", "--batches=2", "--quality_batches=1", "--objective=speed", *SPEED]
    assert run(["prune", f"--model.pretrained={saved}", *DATA, *words]) == 0
    assert asked == [{"prompt_tokens": 4, "new_tokens": 2, "runs": 2}]
    importance = plain_importance(AutoModelForCausalLM.from_pretrained(saved), batches_of(saved, "train", 2))
    price = {key: value / (100 if key[1] == "attention" else 1) for key, value in importance.items()}
    ranked = sorted((key for key in price if key[1] != "block"), key=price.__getitem__)[:3]
    plan = DropPlan.load("runs/version_0/drop_plan.json")
    assert [(s.block, s.kind) for s in plan] == ranked
    assert [drop.score for drop in plan.drops] == pytest.approx([importance[key] for key in ranked], rel=1e-4)
    plain = sorted((key for key in price if key[1] != "block"), key=importance.__getitem__)[:3]
    assert set(ranked) != set(plain), "by importance alone others would have gone"


# ---- benchmark ----


@pytest.fixture
def made_up(monkeypatch):
    """Made-up ceilings: measuring them takes a third of a second."""
    monkeypatch.setattr(benchmarking, "measure_ceilings", lambda *_: MADE_UP)


def read_benchmark(number=0, *, extra=()):
    """Read the file that a benchmark wrote."""
    folder = Path(f"runs/version_{number}")
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "benchmark.json", *extra}
    return json.loads((folder / "benchmark.json").read_text())


def check_measurement(told, dense, after, sizes, caches, runs=2, comparable=True):
    """Check the known values of a measurement and the consistency of the others."""
    assert (told["quality"]["loss"], told["quality"]["accuracy"]) == pytest.approx(after, rel=1e-5)
    assert told["quality"]["perplexity"] == pytest.approx(math.exp(after[0]), rel=1e-5)
    speed = told["speed"]
    assert (speed["parameters_dense"], speed["parameters_dropped"]) == sizes
    assert (speed["file_bytes_dense"], speed["file_bytes_dropped"]) == tuple(4 * size for size in sizes)
    held = [attentions * 2 * 8 * 4 for attentions in caches]  # keys and values of 8 numbers of 4 bytes
    assert speed["kv_bytes_dense"] == held[0]
    assert held[1] <= speed["kv_bytes_dropped"] < held[1] + 4, "of a dropped one a number is left for all tokens"
    assert (speed["prompt_tokens"], speed["new_tokens"], speed["batch_size"], speed["runs"]) == (4, 2, 1, runs)
    phases = speed["phases"]
    speedup = phases["decode"]["speedup"]
    gained = 100 * (speedup["median"] - 1)
    assert phases["decode"]["measurable"] == (runs > 5 and not speedup["low"] <= 1 <= speedup["high"])
    if comparable and phases["decode"]["measurable"] and gained > 0:
        assert told["sdr"] == pytest.approx(100 * (dense[1] - after[1]) / gained, rel=1e-4, abs=1e-9)
    else:
        assert told["sdr"] is None
    for phase, tokens in (("prefill", 4), ("decode", 1)):
        assert phases[phase]["dense_ms"] == pytest.approx(1000 * tokens / phases[phase]["dense"])
        assert phases[phase]["predicted"] > 1


def cells(told, name):
    """The cells of the rows that begin with a name, one row for each of the three tables."""
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in told.splitlines()]
    return [row[1:] for row in rows if row[:1] == [name]]


def test_benchmark_measures_a_dropped_folder_against_its_base(saved, without_two, capsys):
    words = [f"--base={saved}", *DATA, *SPEED, "--quality_batches=2", "--runs=7"]
    assert run(["benchmark", f"--model.pretrained={without_two}", *words]) == 0
    told, content = capsys.readouterr().out, read_benchmark()
    held_out = batches_of(saved, "val", 2)
    models = AutoModelForCausalLM.from_pretrained(saved), ls.load_pretrained(without_two)
    before, after = (plain_quality(model, held_out) for model in models)
    assert before != after
    assert (content["model"], content["base"]) == (str(without_two), str(saved))
    assert (content["dense"]["loss"], content["dense"]["accuracy"]) == pytest.approx(before, rel=1e-5)
    assert content["settings"]["quality_batches"] == 2
    assert content["ceilings"]["name"] == "cpu (float32, 1 threads)"
    assert content["ceilings"]["flops"] > content["ceilings"]["bandwidth"] > 0
    (measured,) = content["measurements"]
    sizes = tuple(model.num_parameters() for model in models)
    assert sizes[0] - sizes[1] == 2 * 16 * 16 + 2 * 16 * 8 + 16 + 3 * 16 * 16 + 16
    check_measurement(measured, before, after, sizes, (4, 3), runs=7)
    assert (measured["scope"], measured["count"]) == (None, None)
    assert [s.name for s in DropPlan.from_dict(measured["plan"])] == ["attention.1", "mlp.2"]

    first, *phases = cells(told, "dense")
    loss, accuracy = f"{before[0]:.4f}", f"{100 * before[1]:.1f} %"
    assert first[:2] + first[3:6] == [f"{sizes[0]:,}", f"{4 * sizes[0] / 1000:.1f} kB", "256 B", loss, accuracy]
    assert [len(row) for row in phases] == [2, 2]
    first, prefill, decode = cells(told, "1 attention, 1 mlp")
    assert first[4:6] == [f"{after[0]:.4f}", f"{100 * after[1]:.1f} %"]
    for row, phase in ((prefill, "prefill"), (decode, "decode")):
        speedup = measured["speed"]["phases"][phase]["speedup"]
        assert row[2] == "x{median:.2f} [{low:.2f}, {high:.2f}]".format(**speedup)
        assert row[3].startswith(f"x{measured['speed']['phases'][phase]['predicted']:.2f} (")
    assert f"Dense: {saved}." in told
    assert "Measurements: runs/version_0/benchmark.json" in told


def test_benchmark_uses_the_precision_for_both_models(saved, without_two, made_up):
    words = [f"--base={saved}", *DATA, *SPEED, "--quality_batches=1", "--trainer.precision=bf16-true"]
    assert run(["benchmark", f"--model.pretrained={without_two}", *words]) == 0
    content = read_benchmark()
    assert content["machine"]["dtype"] == "bfloat16"
    speed = content["measurements"][0]["speed"]
    for side in ("dense", "dropped"):
        assert speed[f"file_bytes_{side}"] == 2 * speed[f"parameters_{side}"]
    assert speed["kv_bytes_dense"] == 4 * 2 * 8 * 2


def trained(path, *, scale=0):
    """The dense model of a checkpoint, with scale * B A added to the weights that have an adapter."""
    state = torch.load(path, weights_only=True)["state_dict"]
    weights = {}
    for name, weight in state.items():
        if name.startswith("model.") and "lora_" not in name:
            adapter = {key.rsplit(".", 3)[1]: state[key] for key in state if key.startswith(adapters_of(name))}
            if adapter:
                weight = weight + scale * adapter["lora_B"] @ adapter["lora_A"]
            weights[name.removeprefix("model.").replace(".base_layer.", ".")] = weight
    model = LlamaForCausalLM(LlamaConfig(**{name: value for name, value in TINY.items() if name != "model_type"}))
    model.load_state_dict(unmarked(weights))
    return model.eval()


def adapters_of(name):
    """Prefix of the names of a weight's adapters; matches nothing if it cannot have any."""
    return name.replace("base_layer.weight", "lora_") if name.endswith("base_layer.weight") else "nothing"


@pytest.mark.parametrize("adapted", one_of([True, False]))
def test_benchmark_compares_a_checkpoint_with_its_bypass_lifted(adapted, capsys, made_up):
    recovery = [{"class_path": "LoRARecovery", "init_args": {"rank": 2, "alpha": 16}}] if adapted else []
    dropping = {"class_path": "SublayerDrop", "init_args": {**DROPPING["init_args"], "start": 2, "scope": "attention"}}
    Path("run.yaml").write_text(callbacks(dropping, *recovery, KEEP))
    assert run([*FIT, "--trainer.max_steps=6", "--model.optimizer.lr=0.01", "--config=run.yaml"]) == 0
    capsys.readouterr()
    last = "runs/version_0/checkpoints/last.ckpt"
    words = [f"--ckpt_path={last}", *SPEED, "--quality_batches=2"]
    assert run(["benchmark", "--config=runs/version_0/config.yaml", *words]) == 0
    told, content = capsys.readouterr().out, read_benchmark(1)
    assert "note:" not in told, "what was trained is not random"
    lifted = "the same weights with the bypass lifted" + (" and the adapters off" if adapted else "")
    assert (content["model"], content["base"]) == (last, lifted)

    held_out = batches_of("bytes", "val", 2)
    model, plan = trained(last), DropPlan.load("runs/version_0/drop_plan.json")
    before = plain_quality(model, held_out)
    recovered = trained(last, scale=16 / 2)
    ls.bypass(recovered, plan)
    after = plain_quality(recovered, held_out)
    ls.bypass(model, plan)
    assert (plain_quality(model, held_out) != after) == adapted, (
        "adapters are trained for what is left, and count there"
    )
    assert (content["dense"]["loss"], content["dense"]["accuracy"]) == pytest.approx(before, rel=1e-5)
    (measured,) = content["measurements"]
    assert tuple(DropPlan.from_dict(measured["plan"])) == tuple(plan)
    size = model.num_parameters()
    sizes = size, size - (2 * 16 * 16 + 2 * 16 * 8 + 16)
    check_measurement(measured, before, after, sizes, (2, 1), comparable=adapted)


@pytest.mark.slow
def test_benchmark_takes_the_model_from_the_checkpoint_and_compares_with_another_base(saved, made_up):
    Path("run.yaml").write_text(callbacks(DROPPING, KEEP))
    fit = ["fit", f"--model.pretrained={saved}", *DATA, *TRAINER, "--trainer.max_steps=4", "--config=run.yaml"]
    assert run(fit) == 0
    last = "--ckpt_path=runs/version_0/checkpoints/last.ckpt"
    words = [*DATA, *SPEED, "--quality_batches=2", last]
    assert run(["benchmark", *words]) == 0
    assert run(["benchmark", *words, f"--base={saved}"]) == 0
    own, other = read_benchmark(1), read_benchmark(2)
    assert own["measurements"][0]["quality"] == other["measurements"][0]["quality"]
    assert own["dense"]["loss"] != other["dense"]["loss"], "it was trained since"
    before = plain_quality(AutoModelForCausalLM.from_pretrained(saved), batches_of(saved, "val", 2))
    assert (other["dense"]["loss"], other["dense"]["accuracy"]) == pytest.approx(before, rel=1e-5)


def test_benchmark_refuses_unfit_checkpoint_and_base_with_too_few_embeddings(capsys):
    Path("run.yaml").write_text(callbacks(DROPPING, KEEP))
    assert run([*FIT, "--trainer.max_steps=4", "--config=run.yaml"]) == 0
    last = Path("runs/version_0/checkpoints/last.ckpt")
    checkpoint = torch.load(last, weights_only=True)
    name = next(name for name in checkpoint["state_dict"] if name.endswith("q_proj.weight"))
    checkpoint["state_dict"][name] = torch.zeros(3, 3)
    torch.save(checkpoint, "other.ckpt")
    fields = {**TINY, "vocab_size": 100}
    LlamaForCausalLM(LlamaConfig(**{key: fields[key] for key in fields if key != "model_type"})).save_pretrained("few")
    for words, fragments in (
        (["--ckpt_path=other.ckpt"], ["weights do not fit"]),
        ([f"--ckpt_path={last}", "--base=./few"], ["./few", "259 ids", "only 100"]),
    ):
        capsys.readouterr()
        assert run(["benchmark", *words, *DATA, *SPEED]) == 1
        told = capsys.readouterr().err
        assert told.startswith("error: ")
        assert all(fragment in told for fragment in fragments), told


def test_benchmark_sweep_measures_and_draws_the_frontier(saved, capsys, monkeypatch, made_up):
    drawn = []

    def draw(points, dense, label, **options):
        drawn.append((points, dense, label, options))
        return frontier_figure(points, dense, label, **options)

    frontier_figure = benchmark_command.frontier_figure
    monkeypatch.setattr(benchmark_command, "frontier_figure", draw)
    words = ["--counts=[1, 3]", "--scopes=[attention, joint, block]", "--batches=3", "--quality_batches=2"]
    assert run(["benchmark", f"--model.pretrained={saved}", *DATA, *SPEED, *words]) == 0
    told, content = capsys.readouterr().out, read_benchmark(extra=("importance.csv", "frontier.png"))
    assert (content["model"], content["base"]) == (str(saved), str(saved))
    model, held_out = AutoModelForCausalLM.from_pretrained(saved), batches_of(saved, "val", 2)
    importance = plain_importance(model, batches_of(saved, "train", 3))
    assert read_importance(Path("runs/version_0/importance.csv")) == pytest.approx(importance, rel=1e-4)
    dense, size = plain_quality(model, held_out), model.num_parameters()
    assert (content["dense"]["loss"], content["dense"]["accuracy"]) == pytest.approx(dense, rel=1e-5)
    asked = [(scope, count) for scope in ("attention", "joint", "block") for count in (1, 3)]
    assert [(one["scope"], one["count"]) for one in content["measurements"]] == asked
    weights = {"attention": 2 * 16 * 16 + 2 * 16 * 8 + 16, "mlp": 3 * 16 * 16 + 16}
    for one, (scope, count) in zip(content["measurements"], asked, strict=True):
        kinds = {"joint": ("attention", "mlp")}.get(scope, (scope,))
        ranked = sorted((value, *key) for key, value in importance.items() if key[1] in kinds)[:count]
        plan = DropPlan.from_dict(one["plan"])
        gone = [(s.block, s.kind) for s in plan]
        if scope == "block":
            assert gone == [(block, kind) for _, block, _ in ranked for kind in ("attention", "mlp")]
        else:
            assert gone == [(block, kind) for _, block, kind in ranked]
        ls.bypass(model, plan)
        after = plain_quality(model, held_out)
        ls.restore(model)
        caches = 4, 4 - count_by_kind(plan)["attention"]
        check_measurement(one, dense, after, (size, size - sum(weights[kind] for _, kind in gone)), caches)
        assert cells(told, f"{scope} {count}")[0][4:6] == [f"{after[0]:.4f}", f"{100 * after[1]:.1f} %"]

    ((points, height, label, options),) = drawn
    assert (height, label) == (pytest.approx(100 * dense[1]), "next-token accuracy (%)")
    assert options == {"title": f"{saved} on cpu (1 threads)", "log_scale": False}
    for point, one in zip(points, content["measurements"], strict=True):
        assert (point.scope, point.count) == (one["scope"], one["count"])
        assert point.quality == 100 * one["quality"]["accuracy"]
        for phase in ("prefill", "decode"):
            speedup = getattr(point, phase)
            told_of_it = one["speed"]["phases"][phase]["speedup"]
            assert [speedup.median, speedup.low, speedup.high] == [told_of_it[key] for key in ("median", "low", "high")]
    assert Path("runs/version_0/frontier.png").read_bytes().startswith(b"\x89PNG")
    assert (
        content["settings"].items() >= {"metric": "cosine", "objective": "importance", "batches": 3, "runs": 2}.items()
    )


# ---- plan ----


def read_prediction(number=0):
    """Read the file that a plan wrote."""
    folder = Path(f"runs/version_{number}")
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "prediction.json"}
    return json.loads((folder / "prediction.json").read_text())


@pytest.fixture
def planned(monkeypatch):
    """The models passed to ``predict``. Fails if one has weights or if text is read."""
    seen = []
    predict = plan_command.predict

    def watched(model, *args):
        assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        seen.append(model)
        return predict(model, *args)

    monkeypatch.setattr(plan_command, "predict", watched)
    for name in ("setup", "prepare_data"):
        monkeypatch.setattr(TextData, name, lambda *_: pytest.fail("it looked for a text"))
    return seen


def test_plan_needs_only_the_config_of_the_model(saved, capsys, planned):
    Path("bare").mkdir()
    shutil.copy(saved / "config.json", "bare")
    words = [
        "--scope=attention",
        "--count=3",
        "--device=A100",
        "--batch_size=5",
        "--prompt_tokens=20",
        "--new_tokens=4",
    ]
    assert run(["plan", "--model.pretrained=./bare", *words]) == 0
    told, content = capsys.readouterr().out, read_prediction()
    assert len(planned) == 1
    size, attention = AutoModelForCausalLM.from_pretrained(saved).num_parameters(), 2 * 16 * 16 + 2 * 16 * 8 + 16
    for side, attentions in (("dense", 4), ("dropped", 1)):
        assert content[side]["parameters"] == size - (4 - attentions) * attention
        assert content[side]["weight_bytes"] == 2 * content[side]["parameters"]
        assert content[side]["kv_bytes"] == attentions * 2 * 8 * 2 * 5 * 24
        assert content[side]["devices"] == 1
    assert [s.name for s in DropPlan.from_dict(content["plan"])] == ["attention.3", "attention.2", "attention.1"]
    assert (content["dtype"], content["ceilings"]["name"]) == ("bfloat16", "NVIDIA A100 SXM 80 GB")
    assert (content["batch_size"], content["prompt_tokens"], content["new_tokens"]) == (5, 20, 4)
    assert "./bare: 3 attention dropped" in told
    assert "The deepest sublayers go first" in told
    assert "Prediction: runs/version_0/prediction.json" in told
    assert run(["plan", "--config=runs/version_0/config.yaml"]) == 0
    assert read_prediction(1) == content


def test_plan_defaults_to_half_of_the_attention_on_this_machine(monkeypatch):
    monkeypatch.setattr("layershed.performance.prediction.measure_ceilings", lambda *asked: ACCELERATORS["l4"])
    assert run([*PLAN, "--model.dtype=float32"]) == 0
    content = read_prediction()
    assert [s.name for s in DropPlan.from_dict(content["plan"])] == ["attention.1"]
    assert content["dtype"] == "float32"
    assert content["ceilings"]["memory"] == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_plan_of_a_dropped_model_predicts_its_missing_sublayers(saved, without_two, capsys, planned):
    assert run(["plan", f"--model.pretrained={without_two}", "--device=h100", *PLAN[2:]]) == 0
    told, lacking = capsys.readouterr().out, read_prediction()
    assert [s.name for s in DropPlan.from_dict(lacking["plan"])] == ["attention.1", "mlp.2"]
    assert "The deepest sublayers go first" not in told, "it is known which are gone"
    assert lacking["dense"]["parameters"] == AutoModelForCausalLM.from_pretrained(saved).num_parameters()
    assert lacking["dropped"]["parameters"] == ls.load_pretrained(without_two).num_parameters()

    # the same of the dense model, by a plan that a run wrote
    model = ls.load_pretrained(saved)
    DropPlan(tuple(Drop(s) for s in ls.find_sublayers(model) if s.name in ("attention.1", "mlp.2"))).save("plan.json")
    assert run(["plan", f"--model.pretrained={saved}", "--device=h100", "--plan=plan.json", *PLAN[2:]]) == 0
    assert "The deepest sublayers go first" not in capsys.readouterr().out
    assert read_prediction(1) == lacking


# ---- as a process of its own ----


@pytest.mark.slow  # test_eight_bit_optimizer runs train.py by default
def test_train_py_process_ends_with_a_one_sentence_error():
    """With the quickstart's config, as none is named."""
    words = [sys.executable, TRAIN, "fit", "--model.pretrained", "HuggingFaceTB/SmolLM2-135M"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 1
    (told,) = done.stderr.strip().splitlines()
    assert told.startswith("error: ")
    assert "'HuggingFaceTB/SmolLM2-135M' is neither a folder" in told


# ---- a real model ----


@pytest.mark.pretrained
def test_score_and_prune_run_on_a_real_model_without_a_config(tmp_path):
    model = os.environ["LAYERSHED_SMOLLM2"]
    few = ["--batches=1", "--data.batch_size=2", "--data.block_size=64"]
    assert run(["score", "--model.pretrained", model, *few]) == 0
    importance = read_importance(tmp_path / "runs/version_0/importance.csv")
    assert len(importance) == 90
    assert importance[0, "mlp"] > 10 * importance[26, "attention"], "the first block matters, late attention hardly"
    assert run(["prune", "--model.pretrained", model, "--ratio", "0.25", *few, "--quality_batches=1", *SPEED]) == 0
    plan = DropPlan.load(tmp_path / "runs/version_1/drop_plan.json")
    assert len(plan) == 15
    assert Sublayer(0, "mlp", "model.layers.0.mlp") not in plan
    pruned = ls.load_pretrained(tmp_path / "runs/version_1/pruned")
    assert set(ls.dropped_sublayers(pruned)) == set(plan)
