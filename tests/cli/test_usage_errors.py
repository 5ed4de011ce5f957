"""The command line: one-sentence errors, bugs that keep their traceback, and the process that it leaves."""

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
from transformers.utils import logging as transformers_logging

from layershed.cli import quiet
from layershed.cli import run_folder as running
from layershed.cli.messages import causes
from layershed.errors import LayershedError
from layershed.performance import benchmark as benchmarking
from tests.support.command_line import (
    BENCHMARK,
    DATA,
    FIT,
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
from tests.support.thinned import some_of

TRAIN = Path(__file__).parents[2] / "train.py"

pytestmark = pytest.mark.usefixtures("own_world", "one_parser")


class Broken(pl.Callback):
    """A callback with a bug."""

    def __init__(self):
        raise RuntimeError("a bug of ours")


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
    names = "fit,validate,test,predict,score,prune,benchmark,evaluate,generate,plan,compare,recommend"
    assert usage == f"usage: train.py [-c CONFIG] {{{names}}} ..."
    assert told[-1].startswith("error: ")


def test_bug_in_a_command_keeps_its_traceback(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(running, "estimate_importance", fail)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        run(SCORE)


def test_bug_in_a_callback_keeps_its_traceback():
    Path("bug.yaml").write_text(callbacks({"class_path": "tests.cli.test_usage_errors.Broken"}))
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


@pytest.mark.slow  # test_eight_bit_optimizer runs train.py by default
def test_train_py_process_ends_with_a_one_sentence_error():
    """With the quickstart's config, as none is named."""
    words = [sys.executable, TRAIN, "fit", "--model.pretrained", "HuggingFaceTB/SmolLM2-135M"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 1
    (told,) = done.stderr.strip().splitlines()
    assert told.startswith("error: ")
    assert "'HuggingFaceTB/SmolLM2-135M' is neither a folder" in told
