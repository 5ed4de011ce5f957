"""What a run of ``fit`` leaves: its whole configuration, its rows with rate and time, its best checkpoint."""

import csv
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.loggers.logger import Logger
from transformers import get_scheduler

from layershed.callbacks import BestCheckpoint, ExactResume, SublayerDrop
from layershed.cli import step_clock
from layershed.cli.step_clock import StepClock
from layershed.devices import WallClock
from tests.support.command_line import FILES, FIT, callbacks, run
from tests.support.runs import Foreign, loader, val_loader
from tests.support.thinned import one_of, some_of

LOGGER = {"class_path": f"{__name__}.Remembering"}
DROP = {"start": 5, "count": 1, "calibration_batches": 1, "quality_batches": 1}
ENTRIES = [
    {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 4, "save_top_k": -1, "save_last": True}},
    {"class_path": "BestCheckpoint"},
    {"class_path": "SublayerDrop", "init_args": DROP},
]
WORDS = [
    *FIT,
    "--config=run.yaml",
    "--trainer.max_steps=12",
    "--trainer.val_check_interval=3",
    "--model.warmup_steps=2",
]
pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # each run has a directory of its own
    pytest.mark.filterwarnings("ignore:BestCheckpoint. 'runs/version_0/checkpoints/best.ckpt' is gone or no longer"),
]
TIMES = ("step_seconds", "tokens_per_second")


class Remembering(Logger):
    """A logger of another kind, such as that of a service."""

    told = []  # noqa: RUF012

    name = version = save_dir = "somewhere"

    def log_hyperparams(self, params, *_, **__):
        self.told.append(params)

    def log_metrics(self, metrics, step=None):
        pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with an uninterrupted run, and one that was resumed at step 8."""
    folder = tmp_path_factory.mktemp("runs")
    with chdir(folder), pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            patch.setenv(name, "0")
        Path("text.txt").write_text(FILES["text.txt"])
        Path("run.yaml").write_text(callbacks(*ENTRIES))
        assert run(WORDS) == 0
        at = next(Path("runs/version_0/checkpoints").glob("*step=8.ckpt"))
        assert run([*WORDS, "--ckpt_path", str(at)]) == 0
    return folder / "runs"


def rows_of(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(folder, name):
    return {int(row["step"]): float(row[name]) for row in rows_of(folder) if row.get(name)}


def test_hparams_hold_the_whole_configuration(runs):
    saved = yaml.safe_load((runs / "version_0" / "config.yaml").read_text())
    noted = yaml.safe_load((runs / "version_0" / "hparams.yaml").read_text())
    assert noted.items() >= saved.items()
    assert noted["model"]["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert noted["trainer"]["callbacks"][2]["init_args"].items() >= DROP.items()


def test_every_logger_gets_the_whole_configuration(own_world, one_parser):
    Remembering.told.clear()
    Path("logged.yaml").write_text(yaml.safe_dump({"trainer": {"logger": LOGGER, "callbacks": ENTRIES[2:]}}))
    assert run([*FIT, "--config=logged.yaml", "--trainer.max_steps=6"]) == 0
    told = {name: value for params in Remembering.told for name, value in params.items()}
    assert told["trainer"]["callbacks"][0]["init_args"]["start"] == 5
    assert told["model"]["optimizer"]["init_args"]["weight_decay"] == 0.01


def test_metrics_hold_the_learning_rate_of_every_step(runs):
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=1e-3)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=12)
    expected = []
    for _ in range(12):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    found = column(runs / "version_0", "lr-AdamW")
    assert [found[step] for step in range(12)] == pytest.approx(expected, rel=1e-6)


def test_metrics_hold_step_time_and_tokens_per_second(runs):
    seconds, tokens = (column(runs / "version_0", name) for name in TIMES)
    assert seconds.keys() == tokens.keys() == set(range(12))
    for step, time in seconds.items():
        assert time > 0
        assert time * tokens[step] == pytest.approx(2 * 16, rel=1e-5), "batch_size x block_size tokens a step"


def test_resumed_run_has_the_rows_of_the_whole_run(runs):
    whole, resumed = (
        [{name: value for name, value in row.items() if value and name not in TIMES} for row in rows_of(runs / name)]
        for name in ("version_0", "version_1")
    )
    assert resumed == whole


class Sleeper(pl.Callback):
    """Other work between two steps, which is no part of a step: it moves the hands by 100 seconds."""

    def __init__(self, hands):
        self.hands = hands

    def on_train_batch_end(self, *_):
        self.hands.time += 100

    on_train_batch_start = on_validation_end = on_train_batch_end


class Timed(Foreign):
    """Its forward and backward take a second by the same hands."""

    hands = None

    def training_step(self, batch, batch_idx):
        self.hands.time += 1.0
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_step_time_counts_all_batches_of_a_step_and_nothing_between_steps(accumulated, make_trainer, monkeypatch):
    hands = SimpleNamespace(time=0.0)
    monkeypatch.setattr(step_clock, "clock_for", lambda device: WallClock(device, now=lambda: hands.time))
    # after it in the list, the work of a callback at the start of a batch would count
    listed = [StepClock(), Sleeper(hands)]
    seen = {}

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            found = {name: trainer.callback_metrics.get(name) for name in TIMES}
            if found[TIMES[0]] is not None:
                seen[trainer.global_step] = [value.item() for value in found.values()]

    module = Timed()
    module.hands = hands
    trainer = make_trainer(
        *listed, Look(), max_steps=6, accumulate_grad_batches=accumulated, log_every_n_steps=2, val_check_interval=2
    )
    trainer.fit(module, loader(), val_loader())
    size = next(iter(loader()))["input_ids"].numel()
    # the last callback at the start of a batch is listed after the clock, so its 100 seconds count
    assert seen[4] == pytest.approx([101.0 * accumulated, size / 101.0])


# ---- the best checkpoint ----


class Scripted(Foreign):
    """Its validation loss is given: one for each validation."""

    def __init__(self, losses):
        super().__init__()
        self.losses = iter(losses)

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.now = next(self.losses)
        self.log("val_loss", self.now, batch_size=1)


# validations at steps 2, 4, ..., 12
BEST = {
    "the lowest loss is before the drop": ([1.0, 0.5, 3.0, 2.5, 2.7, 2.6], [5], 8),
    "the last is the best": ([1.0, 0.5, 3.0, 2.5, 2.4, 2.3], [5], 12),
    "the loss is NaN at first": ([1.0, 0.5, float("nan"), 2.5, 2.7, 2.6], [5], 8),
    "a second round costs more": ([1.0, 0.5, 1.5, 1.6, 3.0, 3.1], [5, 9], 10),
    "the drop is at a validation": ([0.1, 2.0, 3.0, 2.5, 2.7, 2.6], [4], 4),
    "nothing is dropped": ([1.0, 0.5, 3.0, 2.5, 2.7, 2.6], [], 4),
}


@pytest.mark.parametrize("case", some_of(BEST, 3))
def test_best_checkpoint_is_the_best_of_the_model_as_dropped_in_the_end(case, make_trainer, tmp_path):
    losses, steps, expected = BEST[case]
    rounds = {"rounds": len(steps), "every_n_steps": steps[1] - steps[0]} if len(steps) > 1 else {}
    drop = [SublayerDrop(steps[0], count=1, calibration_batches=1, quality_batches=0, **rounds)] if steps else []
    best = BestCheckpoint()
    trainer = make_trainer(*drop, best, val_check_interval=2, enable_checkpointing=True)
    trainer.fit(Scripted(losses), loader(12), val_loader())
    path = Path(best.best_model_path)
    assert (path.name, [file.name for file in path.parent.iterdir()]) == ("best.ckpt", ["best.ckpt"])
    content = torch.load(path, weights_only=True)
    assert content["global_step"] == expected
    assert len((content.get("layershed") or {"dropped": {"drops": []}})["dropped"]["drops"]) == len(steps)


@pytest.mark.parametrize("missing", one_of(["validation after the drop", "metric"]))
def test_run_without_a_best_checkpoint_ends_with_a_warning(missing, make_trainer, tmp_path):
    drop = SublayerDrop(4, count=1, calibration_batches=1, quality_batches=0)
    best = BestCheckpoint(monitor="bleu") if missing == "metric" else BestCheckpoint()
    interval = 5 if missing == "metric" else 3
    trainer = make_trainer(drop, best, max_steps=5, val_check_interval=interval, enable_checkpointing=True)
    reason = "logged 'bleu'" if missing == "metric" else "there was no validation after the drop"
    with pytest.warns(UserWarning, match=f"BestCheckpoint saved nothing: .*{reason}"):
        trainer.fit(Foreign(), loader(12), val_loader())
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(("stop", "stale"), [(8, True), (9, False)])
def test_best_of_a_less_dropped_model_is_said_at_the_end(stop, stale, make_trainer, recwarn):
    drop = SublayerDrop(4, count=1, calibration_batches=1, quality_batches=0, rounds=2, every_n_steps=3)
    best = BestCheckpoint()
    trainer = make_trainer(drop, best, max_steps=stop, val_check_interval=3, enable_checkpointing=True)
    trainer.fit(Scripted([0.5, 1.5, 3.0]), loader(12), val_loader())
    told = [str(warning.message) for warning in recwarn if "BestCheckpoint" in str(warning.message)]
    path = Path(trainer.checkpoint_callbacks[0].dirpath) / "best.ckpt"
    kept = torch.load(path, weights_only=True)
    assert (kept["global_step"], len(kept["layershed"]["dropped"]["drops"])) == ((6, 1) if stale else (9, 2))
    assert len(told) == stale
    assert best.best_model_path == ("" if stale else str(path))
    if stale:
        assert f"{str(path)!r} is not of the model at the end, as there was no validation after the last" in told[0]
        assert "1 in the file, 2 at the end" in told[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_resumed_run_keeps_the_best_of_before_in_the_same_folder(make_trainer, tmp_path):
    losses = [1.0, 0.5, 2.0, 2.5, 2.7, 2.6]
    seen = {}
    for name, stops in (("whole", [12]), ("cut", [8, 12])):
        for number, stop in enumerate(stops):
            drop = SublayerDrop(5, count=1, calibration_batches=1, quality_batches=0)
            best = BestCheckpoint()
            trainer = make_trainer(
                ExactResume(), drop, best, name=name, max_steps=stop, val_check_interval=2, enable_checkpointing=True
            )
            path = tmp_path / f"{name}.ckpt"
            trainer.fit(
                Scripted(losses[4:] if number else losses), loader(12), val_loader(), ckpt_path=path if number else None
            )
            trainer.save_checkpoint(path)
        seen[name] = torch.load(best.best_model_path, weights_only=True)["global_step"]
    assert seen == {"whole": 6, "cut": 6}


def test_run_resumed_in_a_new_folder_takes_the_best_along_unless_the_former_run_went_on(make_trainer, tmp_path):
    losses, path = [1.0, 0.5, 2.0, 2.5, 2.7, 2.6], tmp_path / "at.ckpt"

    def fit(name, stop, seen, ckpt_path=None):
        drop, best = SublayerDrop(5, count=1, calibration_batches=1, quality_batches=0), BestCheckpoint()
        listed = [ExactResume(), drop, best]
        options = {"name": name, "max_steps": stop, "val_check_interval": 2, "enable_checkpointing": True}
        trainer = make_trainer(*listed, **options)
        trainer.fit(Scripted(seen), loader(12), val_loader(), ckpt_path=ckpt_path)
        return trainer, torch.load(best.best_model_path, weights_only=True)["global_step"], best.best_model_path

    trainer, step, _ = fit("first", 8, losses)
    trainer.save_checkpoint(path)
    assert step == 6
    _, step, file = fit("second", 12, losses[4:], path)
    assert (step, Path(file).parent) == (6, tmp_path / "second" / "checkpoints")
    assert [each.name for each in Path(file).parent.iterdir()] == ["best.ckpt"]
    # the former run has gone on, and its best is of a step that the resumed run has not taken
    best = tmp_path / "first" / "checkpoints" / "best.ckpt"
    content = torch.load(best, weights_only=True)
    next(state for name, state in content["callbacks"].items() if "Best" in name)["best_model_score"] = torch.tensor(
        1.5
    )
    torch.save(content, best)
    with pytest.warns(UserWarning, match="no longer the best"):
        assert fit("third", 12, losses[4:], path)[1] == 12


def test_ckpt_path_best_evaluates_the_best_checkpoint_of_the_newest_run(runs, capsys, one_parser, own_seed):
    best = torch.load(runs / "version_1" / "checkpoints" / "best.ckpt", weights_only=True)
    losses = column(runs / "version_1", "val_loss")
    after = {step + 1: loss for step, loss in losses.items() if step + 1 > 5}
    assert best["global_step"] == min(after, key=after.get)
    with chdir(runs.parent):
        words = ["validate", *[word for word in WORDS[1:] if "max_steps" not in word], "--ckpt_path=best"]
        assert run(words) == 0
        told = capsys.readouterr().out
        assert f"{min(after.values()):.4f}"[:5] in told
        assert run([*words, "--trainer.default_root_dir=nowhere"]) == 1
        assert "no run under 'nowhere' holds a best.ckpt" in capsys.readouterr().err


# ---- side by side ----


def test_compare_command_shows_what_differs_between_real_runs(runs, capsys, tmp_path):
    page = tmp_path / "page.html"
    assert run(["compare", str(runs / "version_0"), str(runs / "version_1"), f"--page={page}"]) == 0
    told = capsys.readouterr().out
    section = told.split("differs in the configuration")[1].split("Drop")[0].split("\n")[1:]
    assert [line.split()[0] for line in section if line.strip()] == ["ckpt_path"]
    last = column(runs / "version_1", "val_loss")[11]
    assert told.count(f"{last:.4f}") >= 2, "the resumed run ends like the whole one"
    assert page.read_text().count("<polyline") >= 4
    assert run(["compare", str(runs / "version_0")]) == 1
    assert "is one run" in capsys.readouterr().err
    assert run(["compare"]) == 2
