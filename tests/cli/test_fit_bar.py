"""What fit prints while it runs: a bar that counts to max_steps, plain lines without a terminal, a line of the drop."""

import re
from pathlib import Path

import lightning.pytorch as pl
import pytest

from layershed.cli import fit_bar
from layershed.cli.fit_bar import last_step
from layershed.integration.telling import drop_line
from layershed.planning.plan import Drop, DropPlan, Sublayer
from layershed.quality import OwnQuality, Quality
from tests.support.command_line import DROPPING, FIT, callbacks, run
from tests.support.runs import Foreign, loader, val_loader

pytestmark = pytest.mark.usefixtures("own_world", "one_parser")

STEPS = ["--trainer.max_steps=6", "--trainer.accumulate_grad_batches=2", "--trainer.limit_train_batches=8"]
LINE = r"step 3: dropped 1 (attention|mlp) \(\1\.\d\); validation loss (\d\.\d{4}) -> (\d\.\d{4})"


def fit(*words):
    Path("fit.yaml").write_text(callbacks(DROPPING))
    assert run(["fit", "--config=fit.yaml", *FIT[1:], *STEPS, *words]) == 0


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_bar_counts_the_steps_of_all_epochs_and_the_drop_has_one_line_under_it(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    fit()
    told = plain(capsys.readouterr().out)
    names = {name.strip() for name in re.findall(r"[\r\n]([A-Z][\w… ]*?) [━╸╺]", told)}
    assert {"Training", "Epoch 2", "Quality"} <= names
    assert max(map(len, names - {"Sanity Checking"})) <= len("Validation"), "wider would break a row with metrics"
    counts = re.findall(r"(\d+)/(\d+) +(?:in|\d:)[^\r\n]*train_loss", told)
    assert {total for _, total in counts} == {"6"}, "the steps, not the batches of an epoch"
    assert counts[-1][0] == "6"
    assert "Epoch 2 " in told
    assert "v_num" not in told
    lines = [line for line in told.splitlines() if line.startswith("step ")]
    assert len(lines) == 1
    assert re.fullmatch(LINE, lines[0].strip())


def test_run_without_a_terminal_prints_plain_lines_and_no_bar(monkeypatch, capsys):
    monkeypatch.setattr(fit_bar, "_SILENCE", 0.0)
    fit("--trainer.enable_model_summary=true")
    told = capsys.readouterr().out.splitlines()
    assert "━" not in "".join(told)
    assert re.fullmatch(r"model: LlamaForCausalLM, [\d,]+ parameters, [\d,]+ of them trained", told[0])
    lines = [line for line in told if re.match(r"step \d/6, train_loss \d", line)]
    # two batches a step
    assert [line[5] for line in lines] == [*"0112233", "4", "4", "5", "5", "6"][: len(lines)]
    assert lines[-1].endswith("0:00:00 left")
    assert sum(bool(re.fullmatch(LINE, line)) for line in told) == 1


def test_run_that_is_short_prints_no_line_of_progress_without_a_terminal(capsys):
    fit()
    told = capsys.readouterr().out
    assert "left" not in told
    assert re.fullmatch(LINE, told.strip().splitlines()[0])


def test_line_of_the_drop_appears_under_other_bars(capsys):
    fit("--trainer.callbacks+=TQDMProgressBar")
    told = capsys.readouterr()
    assert any(re.fullmatch(LINE, line.strip()) for line in told.out.splitlines())


@pytest.mark.parametrize(
    ("before", "after", "ending"),
    [
        (None, None, "(mlp.0, attention.2)"),
        (Quality(1.5, 0.1, 9), Quality(2, 0.2, 9), "(mlp.0, attention.2); validation loss 1.5000 -> 2.0000"),
        (OwnQuality({"val_f1": 1.0}), OwnQuality({"val_f1": 0.5}), "; validation val_f1 1.0000 -> 0.5000"),
        (Quality(1.5, 0.1, 9), None, "(mlp.0, attention.2)"),
    ],
    ids=["not measured", "language model", "own validation", "only before"],
)
def test_line_of_the_drop_says_what_and_the_quality_around_it(before, after, ending):
    plan = DropPlan((Drop(Sublayer(0, "mlp", "a")), Drop(Sublayer(2, "attention", "b"))), "joint")
    told = drop_line(7, plan, before, after)
    assert told.startswith("step 7: dropped 1 attention, 1 mlp")
    assert told.endswith(ending)


def test_line_of_a_large_drop_gives_numbers_only():
    plan = DropPlan(tuple(Drop(Sublayer(block, "mlp", f"{block}")) for block in range(9)), "mlp")
    assert drop_line(7, plan, None, None) == "step 7: dropped 9 mlp"
    assert drop_line(7, DropPlan((), "mlp"), None, None) == "step 7: nothing left to drop"


def test_last_step_of_a_run_without_an_end_is_unknown():
    trainer = pl.Trainer(max_steps=-1, max_epochs=-1, logger=False, enable_checkpointing=False, accelerator="cpu")
    assert last_step(trainer) == float("inf")


class Clock:
    """Time that passes only when it is said."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


class Works(pl.Callback):
    """A step takes a second, a validation four, and the work of a callback after the given steps 500 seconds."""

    def __init__(self, clock, steps):
        self.clock, self.steps = clock, steps

    def on_train_batch_start(self, *_):
        self.clock.now += 1

    def on_validation_batch_end(self, *_):
        self.clock.now += 4

    def on_train_batch_end(self, trainer, *_):
        self.clock.now += 500 * (trainer.global_step in self.steps)


class Look(pl.Callback):
    """Keeps what the bar's column shows after each step; the terminal is drawn only now and then."""

    def __init__(self):
        self.shown = {}

    def on_train_batch_end(self, trainer, *_):
        bar = trainer.progress_bar_callback
        for task in bar.progress.tasks if bar.progress else ():
            if task.id == bar.train_progress_bar_id:
                self.shown[trainer.global_step] = fit_bar._Left().render(task).plain


@pytest.mark.parametrize(("where", "order"), [("terminal", "before the bar"), ("file", "after the bar")])
def test_time_left_counts_steps_and_validations_and_no_single_work_of_a_callback(where, order, monkeypatch, capsys):
    if where == "terminal":
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "100")
    clock = Clock()
    monkeypatch.setattr(fit_bar, "time", clock)
    monkeypatch.setattr(fit_bar, "_SILENCE", 0.0)
    listed, look = [Works(clock, {4}), fit_bar.FitBar()], Look()
    if order == "after the bar":
        listed.reverse()
    # validations of one batch after steps 5, 10 and 15
    limits = {"max_steps": 20, "val_check_interval": 5, "limit_val_batches": 1, "num_sanity_val_steps": 1}
    without = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", callbacks=[*listed, look], log_every_n_steps=1, **limits, **without)
    trainer.fit(Foreign(), loader(20), val_loader())
    left = look.shown
    if where == "file":
        told = capsys.readouterr().out
        left = {int(step): line for step, line in re.findall(r"step (\d+)/20.*, (\d:\d\d:\d\d left)", told)}
    steps = {3: 17, 4: 16, 6: 14 * (1 + 4 / 6), 11: 9 * (1 + 8 / 11), 19: 1 + 12 / 19}
    assert {step: left.get(step) for step in steps} == {s: f"0:00:{round(took):02d} left" for s, took in steps.items()}
