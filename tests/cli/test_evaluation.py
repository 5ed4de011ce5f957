"""validate, test and predict after fit: they say which model, on which text, and give fit's own figure."""

import json
import re
import shutil
import warnings
from contextlib import chdir
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import layershed as ls
from layershed.cli.evaluation import evaluated, reported_batches
from layershed.cli.quiet import quiet
from layershed.training.causal_lm import CausalLM
from layershed.training.text_data import TextData
from tests.support.command_line import DATA, TRAINER, model_of, run
from tests.support.small_world import TEXT, TINY

pytestmark = pytest.mark.usefixtures("own_seed", "one_parser")

BATCHES = 2
CALLBACKS = {
    "checkpoint": {"class_path": "ModelCheckpoint", "init_args": {"save_last": True}},
    "drop": {
        "class_path": "layershed.callbacks.SublayerDrop",
        "init_args": {"start": 2, "count": 1, "calibration_batches": 2, "quality_batches": BATCHES},
    },
    "monitor": {"class_path": "layershed.callbacks.RedundancyMonitor", "init_args": {"every_n_steps": 1}},
}
LAST = Path("runs", "small", "version_0", "checkpoints", "last.ckpt")
SHOWN = {"limit": f"--trainer.limit_val_batches={BATCHES}"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which fit has run with a config, and the loss that SublayerDrop measured at the end."""
    folder = tmp_path_factory.mktemp("trained")
    patch = pytest.MonkeyPatch()
    patch.setenv("PL_GLOBAL_SEED", "0")
    patch.setenv("PL_SEED_WORKERS", "0")
    with chdir(folder), torch.random.fork_rng(devices=[]), patch.context():
        Path("text.txt").write_text(TEXT)
        Path("fit.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": CALLBACKS}}, sort_keys=False))
        words = ["--config=fit.yaml", model_of(**TINY), *DATA, *TRAINER, "--trainer.enable_progress_bar=false"]
        assert run(["fit", *words, SHOWN["limit"], "--trainer.default_root_dir=runs/small"]) == 0
        logged = (LAST.parents[1] / "metrics.csv").read_text().splitlines()
    patch.undo()
    rows = [dict(zip(logged[0].split(","), row.split(","), strict=True)) for row in logged[1:]]
    return folder, float(next(row["drop/loss_end"] for row in rows if row["drop/loss_end"]))


@pytest.fixture
def after_fit(trained, tmp_path, monkeypatch):
    """A copy of that folder as the working folder; the loss at the end."""
    shutil.copytree(trained[0], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return trained[1]


def told_by(capsys, *words):
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert run(list(words)) == 0
    return capsys.readouterr().out, [str(warning.message) for warning in caught]


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("command", ["validate", "test"])
def test_last_without_a_config_gives_the_figure_of_the_report(command, after_fit, capsys):
    told, warned = told_by(capsys, command, "--ckpt_path", "last")
    first, second, metrics = told.splitlines()
    assert re.match(r"evaluating the dropped model: 1 of 4 sublayers, plan of step 2 \(1 \w+ dropped\)", first)
    assert first.endswith(f"({LAST})")
    assert second.startswith(f"on {BATCHES} batches")
    assert second.endswith("the same as the losses in the report of the run")
    found = re.fullmatch(rf"{command[:4].removesuffix('i')}_loss ([\d.]+), \w+_perplexity [\d.]+", metrics)
    assert float(found[1]) == pytest.approx(after_fit, abs=1e-4)
    assert not [line for line in warned if "callbacks" in line or "dirpath" in line]
    assert "│" not in told, "no table of Lightning's"


def test_other_number_of_batches_than_in_the_report_is_said(after_fit, capsys):
    told, _ = told_by(capsys, "validate", "--ckpt_path=last", "--trainer.limit_val_batches=1")
    assert "on 1 batch of the held-out text (trainer.limit_val_batches=1); the losses in the report" in told
    assert f"over the first {BATCHES}, so they differ" in told


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    ("word", "other"),
    [
        ("--data.source=other.txt", "data.source"),
        ("--data.batch_size=1", "data.batch_size"),
        ("--trainer.precision=bf16-true", "trainer.precision"),
    ],
)
def test_losses_of_other_text_than_in_the_report_are_never_said_to_be_the_same(word, other, after_fit, capsys):
    """Also on as many batches as the report has."""
    Path("other.txt").write_text(TEXT.replace("is not", "is"))
    told, _ = told_by(capsys, "validate", "--ckpt_path=last", word)
    assert f"on {BATCHES} batches of the held-out text" in told
    assert f"the losses in the report of the run have another {other}, so they differ" in told
    assert "the same" not in told


def test_options_of_training_alone_leave_the_losses_those_of_the_report(after_fit, capsys):
    told, _ = told_by(capsys, "validate", "--ckpt_path=last", "--data.max_tokens=256", "--data.shuffle_rows=5")
    assert "the same as the losses in the report of the run" in told
    loss = float(re.search(r"val_loss ([\d.]+)", told)[1])
    assert loss == pytest.approx(after_fit, abs=1e-4)


def test_checkpoint_before_the_end_of_its_run_is_said_to_be_one(after_fit, capsys):
    checkpoint = torch.load(LAST, weights_only=True)
    torch.save({**checkpoint, "global_step": 2}, LAST)
    told, _ = told_by(capsys, "validate", "--ckpt_path=last")
    assert "; this checkpoint is of step 2 of 3, so its losses are not those at the end" in told


def test_run_that_asks_for_more_batches_than_there_are_has_measured_all_of_them(after_fit, capsys):
    number = len(TextData("text.txt", block_size=16, batch_size=2, max_tokens=512).val_dataloader())
    path = LAST.parents[1] / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["trainer"]["callbacks"]["drop"]["init_args"]["quality_batches"] = 2 * number
    config["trainer"]["limit_val_batches"] = 3 * number
    path.write_text(yaml.safe_dump(config))
    told, _ = told_by(capsys, "validate", "--ckpt_path=last")
    assert f"on {number} batches" in told
    assert "the same as the losses in the report of the run" in told


def test_config_on_the_command_line_decides_the_text(after_fit, capsys):
    words = ["--config=fit.yaml", model_of(**TINY), *DATA, f"--ckpt_path={LAST}"]
    told, _ = told_by(capsys, "validate", *words)
    number = int(re.search(r"on (\d+) batches", told)[1])
    data = TextData("text.txt", block_size=16, batch_size=2, max_tokens=512)
    assert number == len(data.val_dataloader()) > BATCHES


def test_newest_run_below_the_root_is_the_last(after_fit, capsys):
    newer = Path("runs", "other", "version_4", "checkpoints", "last.ckpt")
    newer.parent.mkdir(parents=True)
    shutil.copy(LAST, newer)
    told, _ = told_by(capsys, "validate", "--ckpt_path=last", *DATA)
    assert f"({newer})" in told.splitlines()[0]
    assert "report" not in told, "that run left no config"


def test_missing_callback_that_is_not_restored_is_still_named():
    asks = "Please add the following callbacks: [{}]."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet(evaluating=True):
            for listed in (
                "'SublayerDrop'",
                "'EarlyStopping', 'FitBar'",
                "'Report', \"ModelCheckpoint{'monitor': None}\"",
                "'StochasticWeightAveraging'",
                "'Report', 'EMA'",
                "'EMA'",
            ):
                warnings.warn(asks.format(listed), stacklevel=1)
        assert [str(warning.message)[-7:] for warning in caught] == ["ging'].", "'EMA'].", "'EMA']."]
        with quiet():
            warnings.warn(asks.format("'SublayerDrop'"), stacklevel=1)
    assert len(caught) == 4, "fit resumes their state"


def test_predict_writes_the_greedy_continuation_of_the_dropped_model(after_fit, capsys):
    told, _ = told_by(capsys, "predict", "--ckpt_path=last", "--prompt_tokens=5", "--new_tokens=3")
    path = Path(re.search(r"Predictions: (.+)", told)[1])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 2 * BATCHES
    module = CausalLM(config=TINY)
    ls.load_checkpoint(module, LAST)
    data = TextData("text.txt", block_size=16, batch_size=2, max_tokens=512)
    ids = next(iter(data.val_dataloader()))["input_ids"]
    made = ids[:, :5]
    for _ in range(3):  # without a cache
        following = module.eval().model(input_ids=made, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        made = torch.cat([made, following], dim=1)
    for row, tokens, true in zip(rows, made.tolist(), ids.tolist(), strict=False):
        decoded = [
            data.tokenizer.decode(part, skip_special_tokens=True) for part in (tokens[:5], tokens[5:], true[5:8])
        ]
        assert [row["prompt"], row["generated"], row["true"]] == decoded
    assert f"generated: {' '.join(rows[0]['generated'].split())}" in told


def test_predict_writes_logits_on_request(after_fit, capsys):
    told, _ = told_by(capsys, "predict", "--ckpt_path=last", "--what=logits", "--trainer.limit_predict_batches=1")
    (path,) = Path(re.search(r"Predictions: (.+)", told)[1]).iterdir()
    written = load_file(path)
    module = CausalLM(config=TINY)
    ls.load_checkpoint(module, LAST)
    with torch.no_grad():
        expected = module.eval().model(input_ids=written["input_ids"], use_cache=False).logits
    assert torch.equal(written["logits"], expected)


@pytest.mark.parametrize(
    ("words", "said"), [(["--new_tokens=0"], "new_tokens=0"), (["--prompt_tokens=16"], "16 tokens")]
)
def test_predict_refuses_numbers_out_of_range(words, said, after_fit, capsys):
    assert run(["predict", "--ckpt_path=last", *words]) == 1
    assert said in capsys.readouterr().err


def test_folder_given_as_a_checkpoint_is_answered_with_what_to_give(after_fit, capsys):
    ls.save_pretrained(CausalLM(config=TINY).model, "saved")
    for folder in (LAST.parents[1], LAST.parent):
        assert run(["validate", f"--ckpt_path={folder}"]) == 1
        assert f"Give one in it, such as {LAST}." in capsys.readouterr().err
    assert run(["validate", "--ckpt_path=saved"]) == 1
    assert "give --model.pretrained saved." in capsys.readouterr().err


def test_random_weights_are_named_as_such():
    module = CausalLM(config=TINY)
    assert evaluated(module, {}).startswith("a model with random weights")
    assert evaluated(module, {"state_dict": {}}) == "the dense model"
    ls.bypass(module, ls.find_sublayers(module)[:2])
    assert evaluated(module, {}) == "the dropped model: 2 of 4 sublayers (1 attention, 1 mlp dropped)"


def test_number_of_reported_batches_is_read_from_either_form_of_a_config():
    drop, other = CALLBACKS["drop"], CALLBACKS["checkpoint"]
    for callbacks in (CALLBACKS, [other, drop], drop):
        assert reported_batches({"trainer": {"callbacks": callbacks}}) == BATCHES
        assert reported_batches({"trainer": {"callbacks": callbacks, "limit_val_batches": 1}}) == 1
    for callbacks in (None, other, [other], {"a": other, "b": None}):
        assert reported_batches({"trainer": {"callbacks": callbacks}}) is None
    assert reported_batches(None) is None
