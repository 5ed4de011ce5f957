"""``fit --control``: the same steps without the drop, and what the drop cost against them."""

import csv
import io
import json
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import chdir, redirect_stdout
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml

from layershed.cli.control import without_left_out
from layershed.reporting.drop_cost import FAILED
from tests.support.command_line import FIT, callbacks, run
from tests.support.runs import same
from tests.support.small_world import TEXT
from tests.support.thinned import one_of

pytestmark = [
    pytest.mark.usefixtures("one_parser"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]
STEPS = ["--trainer.max_steps=8", "--trainer.val_check_interval=2"]


def of(name, package="layershed", **settings):
    return {"class_path": f"{package}.callbacks.{name}", "init_args": settings}


KEEP = of("ModelCheckpoint", "lightning.pytorch", every_n_train_steps=1, save_top_k=-1, save_last=True)
REPORT, SPEED = of("Report", every_n_steps=1), of("SpeedMonitor", prompt_tokens=4, new_tokens=2, runs=6)
ENDS = {}


class Weights(pl.Callback):
    """Notes the weights of every run at its end."""

    def on_train_end(self, trainer, pl_module):
        ENDS.setdefault(str(trainer.default_root_dir), []).append(
            {name: value.clone() for name, value in pl_module.state_dict().items()}
        )


class StopsTheControl(pl.Callback):
    """Ctrl-C, or the given signal, in the control's sixth step."""

    def __init__(self, signum: int = 0):
        self.signum = signum

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if Path(trainer.default_root_dir).name == "control" and batch_idx == 5:
            if not self.signum:
                raise KeyboardInterrupt
            signal.raise_signal(self.signum)


WEIGHTS = {"class_path": f"{__name__}.Weights"}


def drop(**settings):
    return of("SublayerDrop", **{"start": 5, "count": 2, "calibration_batches": 2, "quality_batches": 1, **settings})


def words(*entries, root="runs", control=None):
    Path(f"{root}.yaml").write_text(callbacks(*entries, KEEP, WEIGHTS, REPORT))
    more = [] if control is None else [f"--control={control}"]
    return ["fit", "--config", f"{root}.yaml", *FIT[1:], *STEPS, f"--trainer.default_root_dir={root}", *more]


def rows(folder, name):
    with open(Path(folder) / "metrics.csv", encoding="utf-8", newline="") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


def flat(text):
    return " ".join(text.split())


ONE_SHOT, ROUNDS, AT_ONCE = drop(scope="attention"), drop(start=2, count=1, every_n_steps=2, rounds=3), drop(start=1)


@pytest.mark.parametrize("given", ["listed", "named", "one"])
def test_saved_config_of_a_control_is_without_what_it_left_out(given):
    entries = {"listed": [ONE_SHOT, WEIGHTS, None], "named": {"drop": ONE_SHOT, "w": WEIGHTS}, "one": WEIGHTS}
    kept = {"named": {"w": WEIGHTS}}.get(given, [WEIGHTS])
    assert without_left_out(entries[given]) == kept


RUNS = {"dense": [], "one_shot": [ONE_SHOT], "rounds": [ROUNDS, SPEED], "at_once": [AT_ONCE]}


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A folder; called with the name of a run, it makes the run once, and gives what it printed."""
    folder, out = tmp_path_factory.mktemp("control"), {}
    ENDS.clear()

    def printed_by(root):
        if root not in out:
            with redirect_stdout(io.StringIO()) as printed:
                assert run(words(*RUNS[root], root=root, control="true" if RUNS[root] else None)) == 0
            out[root] = printed.getvalue()
        return out[root]

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]), chdir(folder):
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            patch.setenv(name, "0")
        Path("text.txt").write_text(TEXT)
        printed_by("dense")
        printed_by("one_shot")
        yield printed_by


@pytest.mark.parametrize(("root", "start"), one_of([("one_shot", 4), ("rounds", 1), ("at_once", 0)]))
def test_control_equals_the_run_without_a_drop_bit_for_bit(there, root, start):
    printed, control = there(root), Path(root) / "version_0" / "control"
    (dense,), (dropped,), (own,) = ENDS["dense"], ENDS[root], ENDS[str(control)]
    assert same(own, dense)
    assert not same(own, dropped)
    for name in ("train_loss", "val_loss"):
        assert rows(control, name) == rows("dense/version_0", name)
    assert f"Control: steps {start + 1} to 8 again without SublayerDrop" in printed
    assert f"({8 - start} of 8, about {100 * (8 - start) / 8:.0f} % more time)" in printed
    assert not list(control.rglob("*.ckpt"))
    saved = yaml.safe_load((control / "config.yaml").read_text())
    assert [entry["class_path"] for entry in saved["trainer"]["callbacks"]] == [WEIGHTS["class_path"]]
    assert saved["control"] is False


def test_report_tells_the_cost_against_the_control(there):
    folder, out = Path("one_shot/version_0"), flat(there("one_shot"))
    result = json.loads((folder / "control" / "control.json").read_text())
    losses = rows("dense/version_0", "val_loss")
    assert result["quality"]["loss"] == pytest.approx(losses[7], rel=1e-5)  # one batch, and its own formula
    end = {name: rows(folder, f"drop/{name}_end")[8] for name in ("loss", "accuracy")}
    loss, accuracy = (end[name] - result["quality"][name] for name in ("loss", "accuracy"))
    cost = f"{loss:+.4f} loss, {100 * accuracy:+.1f} points of next-token accuracy after the same 4 steps"
    assert cost in out
    assert out.count("Cost of the drop") == 2, "first that the control has not ended, then what it tells"
    assert "not known yet: the control has not ended" in out
    page = (folder / "report.html").read_text()
    assert cost.replace(" -", " \N{MINUS SIGN}") in page
    assert "has not ended" not in page


@pytest.mark.slow
def test_report_tells_the_sdr_against_the_control(there):
    assert "SDR against the control" in there("rounds")
    assert "SDR against the control" in Path("rounds/version_0/report.html").read_text()


@pytest.mark.slow
def test_finished_run_serves_as_control(there, capsys):
    """The dense run by the loss of the last common validation, or the control that another run has."""
    for control, known in (("dense/version_0", "val"), ("one_shot/version_0", "quality")):
        assert run(words(ONE_SHOT, root="again", control=control)) == 0
        folder = max(Path("again").glob("version_*"))
        own, theirs = rows(folder, "val_loss")[7], rows("dense/version_0", "val_loss")[7]
        if known == "quality":
            own, theirs = rows(folder, "drop/loss_end")[8], 0
            theirs = json.loads(Path("one_shot/version_0/control/control.json").read_text())["quality"]["loss"]
        assert f"{own - theirs:+.4f} loss" in flat(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("change", "control", "message"),
    [
        (["--seed_everything=1"], "dense/version_0", "seed_everything: 1, control 0"),
        (["--data.batch_size=1"], "dense/version_0", "data.batch_size: 1, control 2"),
        (["--trainer.max_steps=9"], "dense/version_0", "trainer.max_steps: 9, control 8"),
        ([], "nowhere", "there is no metrics.csv in it"),
        ([], "one_shot/version_0/checkpoints", "there is no metrics.csv in it"),
    ],
)
def test_unfit_control_is_refused_before_training(there, change, control, message, capsys):
    given = words(ONE_SHOT, root="refused")
    given = [word for word in given if word.split("=")[0] != change[0].split("=")[0]] if change else given
    assert run([*given, *change, f"--control={control}"]) == 1
    assert message in flat(capsys.readouterr().err)
    assert not list(Path("refused").rglob("metrics.csv"))


def test_control_of_a_run_without_a_drop_is_refused(there, capsys):
    assert run(words(root="refused", control="true")) == 1
    assert "no SublayerDrop is among trainer.callbacks" in flat(capsys.readouterr().err)


def test_run_with_a_drop_is_no_control(there, capsys):
    shutil.copytree("one_shot/version_0", "bare")
    shutil.rmtree("bare/control")
    assert run(words(ONE_SHOT, root="refused", control="bare")) == 1
    assert "this run drops sublayers itself" in flat(capsys.readouterr().err)


@pytest.mark.slow
def test_other_differences_of_a_control_are_said(there, capsys):
    with pytest.warns(UserWarning, match=r"trainer.gradient_clip_val: 1.0, control None"):
        assert run([*words(ONE_SHOT, root="said", control="dense/version_0"), "--trainer.gradient_clip_val=1.0"]) == 0
    assert "but trainer.gradient_clip_val: 1.0, control None" in flat(capsys.readouterr().out)


@pytest.mark.parametrize("at", one_of([8, 3, 6, 4]))
def test_resumed_run_has_the_same_control(there, at, capsys):
    """Cut before the checkpoint of the control, at it, after the drop, and at the end."""
    path = next(Path("one_shot/version_0/checkpoints").glob(f"*step={at}.ckpt"))
    ENDS.clear()
    assert run([*words(ONE_SHOT, root="resumed", control="true"), f"--ckpt_path={path}"]) == 0
    folder = max(Path("resumed").glob("version_*"))
    first, again = (json.loads((each / "control/control.json").read_text()) for each in (path.parents[1], folder))
    assert again == first
    assert "Cost of the drop" in capsys.readouterr().out


def test_run_resumed_after_the_drop_without_its_checkpoint_is_refused(there, capsys):
    Path("moved").mkdir()
    path = next(Path("one_shot/version_0/checkpoints").glob("*step=6.ckpt"))
    content = torch.load(path, weights_only=True)
    content["layershed_control"]["path"] = str(Path("gone.ckpt").absolute())
    torch.save(content, "moved/last.ckpt")
    assert run([*words(ONE_SHOT, root="late", control="true"), "--ckpt_path=moved/last.ckpt"]) == 1
    assert "there is no before_drop.ckpt beside the checkpoint" in flat(capsys.readouterr().err)


@pytest.mark.slow
def test_control_of_a_run_that_stopped_early_ends_at_its_last_step(there):
    stop = of("EarlyStopping", "lightning.pytorch", monitor="val_loss", stopping_threshold=100.0)
    assert run(words(drop(start=1), stop, root="early", control="true")) == 0
    assert json.loads(Path("early/version_0/control/control.json").read_text())["end"] == 2


@pytest.mark.parametrize(
    ("signum", "name"),
    [(signal.SIGINT, "Ctrl-C"), pytest.param(signal.SIGTERM, "SIGTERM", marks=pytest.mark.slow)],
)
def test_stopped_control_leaves_the_run_and_names_the_command(there, signum, name, capsys):
    before, root = signal.getsignal(signal.SIGINT), f"stopped {name}"
    options = {"signum": int(signum)} if signum == signal.SIGTERM else {}
    stops = {"class_path": f"{__name__}.StopsTheControl", "init_args": options}
    last = Path(root, "version_0/checkpoints/last.ckpt")
    saves = [of("BestCheckpoint")] if signum == signal.SIGINT else []  # after last.ckpt
    try:
        assert run(words(ONE_SHOT, stops, *saves, root=root, control="true")) == 128 + signum
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning ignores Ctrl-C from then on
    assert last.with_name("best.ckpt").is_file() == bool(saves)
    told, again = capsys.readouterr().err.strip().splitlines()[-2:]
    assert told == f"The control was stopped by {name}. Its run is complete. To run only the control:"
    assert shlex.split(again)[-2:] == ["--ckpt_path", str(last)]
    assert FAILED in (last.parents[1] / "report.html").read_text()
    if signum == signal.SIGINT:
        return
    Path(f"{root}.yaml").write_text(callbacks(ONE_SHOT, KEEP, REPORT))
    assert run(shlex.split(again)[2:]) == 0
    assert "Cost of the drop +" in flat(capsys.readouterr().out).replace("-", "+")
    assert FAILED not in Path(root, "version_1/report.html").read_text()


@pytest.mark.parametrize("command", one_of(["validate", "score"]))
def test_config_with_a_control_serves_other_commands(there, command):
    config = Path("one_shot/version_0/config.yaml")
    assert "control: true" in config.read_text()
    more = [] if command == "score" else ["--ckpt_path=one_shot/version_0/checkpoints/last.ckpt"]
    assert run([command, "--config", str(config), *more, "--trainer.default_root_dir=others"]) == 0


@pytest.mark.slow
def test_control_of_two_ranks_equals_their_run_without_a_drop(there):
    """In processes of their own, as DDP starts them: the last losses are equal to the last bit."""
    program = Path(__file__).parents[2] / "train.py"
    for root, entries in (("ranks_dense", []), ("ranks", [ONE_SHOT])):
        given = words(*entries, root=root, control="true" if entries else None)
        Path(f"{root}.yaml").write_text(callbacks(*entries, REPORT))
        given += ["--trainer.devices=2", "--trainer.strategy=ddp"]
        subprocess.run([sys.executable, str(program), *given], check=True, timeout=300)
    control, whole = (rows(place, "val_loss") for place in ("ranks/version_0/control", "ranks_dense/version_0"))
    assert control
    assert control.items() <= whole.items()
    assert control[7] == whole[7]
    assert "Cost of the drop" in Path("ranks/version_0/report.html").read_text()
