"""Report: the page and the table show the logged figures, with any set of callbacks."""

import csv
import re
from html.parser import HTMLParser

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from layershed.callbacks import ExactResume, RedundancyMonitor, Report, SpeedMonitor, SublayerDrop
from layershed.errors import ScheduleError
from layershed.integration import course
from layershed.reporting.downsampling import ThinnedCurve
from tests.support.runs import Foreign, Save, causal_lm, fit_foreign, loader, val_loader
from tests.support.thinned import one_of


class Page(HTMLParser):
    """The rows of a page's tables, the alternative texts of its pictures, and all its text; ``facts``: how it ran."""

    def __init__(self, folder):
        super().__init__()
        self.rows, self.pictures, self.text, self.inside, self.results = [], [], "", False, []
        self.feed((folder / "report.html").read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        if ("id", "facts") in attributes:
            self.results, self.rows = self.rows, []
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
            self.inside = True
        if tag == "figure":
            self.pictures.append(dict(attributes)["aria-label"])

    def handle_endtag(self, tag):
        if tag in ("th", "td"):
            self.inside = False

    def handle_data(self, data):
        self.text += data
        if self.inside:
            self.rows[-1][-1] += data

    @property
    def table(self):
        return {row[0]: row[1:] if len(row) > 2 else row[1] for row in self.results if len(row) > 1}

    @property
    def facts(self):
        return dict(self.rows)


def quality(trainer, when):
    loss, accuracy = (trainer.callback_metrics[f"drop/{what}_{when}"].item() for what in ("loss", "accuracy"))
    return f"{loss:.4f} (next-token accuracy {100 * accuracy:.1f} %)"


def column(folder, name):
    with open(folder / "metrics.csv", encoding="utf-8", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.mark.parametrize("order", one_of([1, -1]))
def test_report_page_and_table_hold_the_runs_figures(make_trainer, tmp_path, capsys, order):
    speed = SpeedMonitor(prompt_tokens=6, new_tokens=2, runs=2)
    drop = SublayerDrop(4, count=3, quality_batches=2)
    callbacks = [RedundancyMonitor(2), RedundancyMonitor(3, metric="angular"), drop, speed, Report(every_n_steps=2)]
    trainer = make_trainer(*callbacks[::order], csv=True, max_steps=8, val_check_interval=3)
    fit_foreign(trainer)
    printed = " ".join(capsys.readouterr().out.split())
    page = Page(tmp_path / "run")
    wanted = {
        "Validation loss before the drop": quality(trainer, "before"),
        "Validation loss right after the drop": quality(trainer, "after"),
        "Validation loss at the end": quality(trainer, "end"),
    }
    for label, value in wanted.items():
        assert page.table[label] == value
        assert f"{label} {value}" in printed
    assert f"Report: {tmp_path / 'run' / 'report.html'}" in printed
    counts = {kind: sum(s.kind == kind for s in drop.plan) for kind in ("attention", "mlp")}
    assert page.table["Sublayers dropped"] == ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)
    for phase, row in (("prefill", "Prefill"), ("decode", "Decode")):
        speedup = trainer.callback_metrics[f"speed/{phase}_speedup"].item()
        assert page.table[row][2].startswith(f"\N{MULTIPLICATION SIGN}{speedup:.2f}")
    names = {"attention": "Attention", "mlp": "MLP"}
    for index, entry in enumerate(drop.plan.drops, start=1):
        block, kind, score, step = page.table[str(index)]
        assert (block, kind.lower(), step) == (str(entry.sublayer.block), names[entry.sublayer.kind].lower(), "4")
        assert float(score) == pytest.approx(entry.score, rel=6e-3)
    heatmaps = [alt for alt in page.pictures if alt.startswith("Heat map")]
    assert any("(cosine)" in alt and "4 times from step 2 to step 8" in alt for alt in heatmaps)
    assert any("(angular)" in alt and "2 times from step 3 to step 6" in alt for alt in heatmaps)
    (curve,) = [alt for alt in page.pictures if alt.startswith("Training loss")]
    train, val = column(tmp_path / "run", "train_loss"), column(tmp_path / "run", "val_loss")
    assert f"Training loss: {train[1]:.4f} at step 2, {train[7]:.4f} at step 8." in curve
    end = trainer.callback_metrics["drop/loss_end"].item()
    assert f"Validation loss: {val[0]:.4f} at step 3, {end:.4f} at step 8." in curve
    assert "Not in this report" not in page.text


def points(report):
    return [(point.step, point.split, point.loss) for point in report._course.losses()]


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("order", [1, -1])
def test_report_puts_losses_around_a_drop_at_its_step(make_trainer, unpainted, order):
    report = Report(every_n_steps=100)
    drop = SublayerDrop(3, count=3, quality_batches=2)
    trainer = make_trainer(*[drop, report][::order], max_steps=5, limit_val_batches=2)
    fit_foreign(trainer)
    values = [trainer.callback_metrics[f"drop/loss_{when}"].item() for when in ("before", "after", "end")]
    assert points(report) == [(step, "val", value) for step, value in zip((3, 3, 5), values, strict=True)]


def test_report_alone_writes_a_page_for_a_foreign_module(make_trainer, unpainted, tmp_path, capsys):
    report = Report(every_n_steps=3)
    trainer = make_trainer(report, csv=True, max_steps=12)
    fit_foreign(trainer)
    page = Page(tmp_path / "run")
    assert page.table == {"Sublayers dropped": "nothing was dropped"}
    assert "LlamaForCausalLM" in page.text
    assert "LlamaForCausalLM" in capsys.readouterr().out
    train, val = column(tmp_path / "run", "train_loss"), column(tmp_path / "run", "val_loss")
    assert points(report) == [
        (3, "train", pytest.approx(train[2])),
        (6, "train", pytest.approx(train[5])),
        (6, "val", pytest.approx(val[0])),
        (9, "train", pytest.approx(train[8])),
        (12, "train", pytest.approx(train[11])),
        (12, "val", pytest.approx(val[1])),
    ]
    for missing in ("RedundancyMonitor", "SpeedMonitor", "SublayerDrop"):
        assert missing in page.text


class NoTransformer(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        loss = self.line(batch).square().mean()
        self.log("mine", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_report_takes_a_module_without_a_transformer_and_other_loss_names(make_trainer, unpainted, tmp_path):
    reports = []
    for name, arguments in (("default", {}), ("named", {"train_loss": "mine", "title": "A <line>"})):
        report = Report(every_n_steps=1, **arguments)
        make_trainer(report, name=name, max_steps=2).fit(NoTransformer(), DataLoader(torch.ones(4, 2), batch_size=2))
        reports.append(report)
    assert points(reports[0]) == []
    assert [step for step, _, _ in points(reports[1])] == [1, 2]
    assert "NoTransformer" in Page(tmp_path / "default").text
    assert "A <line>" in Page(tmp_path / "named").text


@pytest.mark.parametrize(("order", "cuts"), one_of([(1, (3, 4, 9)), (-1, (4,))]))
def test_report_curve_of_a_resumed_run_equals_the_uninterrupted_one(
    make_trainer, tmp_path, text_data, unpainted, order, cuts
):
    """Cut before the drop, at it, and after it and a validation; Report sees later figures in the resumed run."""

    def run(name, ckpt_path=None):
        report = Report(every_n_steps=2)
        callbacks = [SublayerDrop(4, count=2, quality_batches=2), RedundancyMonitor(2), report][::order]
        saves = [Save(tmp_path / f"{at}.ckpt", at) for at in cuts]
        make_trainer(ExactResume(), *callbacks, *saves, name=name, max_steps=12).fit(
            causal_lm(), datamodule=text_data(), ckpt_path=ckpt_path
        )
        page = Page(tmp_path / name)
        return sorted(points(report)), page.table, page.pictures

    whole = run("whole")
    assert len(whole[0]) == 6 + 1 + 3
    for at in cuts:
        assert run(f"resumed-{at}", tmp_path / f"{at}.ckpt") == whole
        state = torch.load(tmp_path / f"{at}.ckpt", weights_only=True)["callbacks"]["Report"]
        assert sum(len(state["losses"][split]["points"]) for split in ("train", "val")) < len(whole[0])


def test_report_leaves_out_files_of_an_earlier_run(make_trainer, unpainted, tmp_path):
    speed = SpeedMonitor(prompt_tokens=6, new_tokens=2, runs=1)
    fit_foreign(make_trainer(RedundancyMonitor(1), SublayerDrop(2, count=2), speed, max_steps=3))
    assert {"importance.csv", "drop_plan.json", "speed.json"} <= {path.name for path in (tmp_path / "run").iterdir()}
    fit_foreign(make_trainer(Report(), max_steps=3))
    page = Page(tmp_path / "run")
    assert page.table == {"Sublayers dropped": "nothing was dropped"}
    assert not any(alt.startswith("Heat map") for alt in page.pictures)


def test_report_curve_has_no_extra_points_from_accumulation_or_evaluation(make_trainer, unpainted):
    report = Report(every_n_steps=1)
    trainer = make_trainer(report, max_steps=3, accumulate_grad_batches=2, num_sanity_val_steps=1, limit_val_batches=1)
    module = fit_foreign(trainer, train=loader(6))
    before = points(report)
    trainer.validate(module, val_loader(), verbose=False)
    assert [(step, split) for step, split, _ in before] == [(1, "train"), (2, "train"), (3, "train"), (3, "val")]
    assert points(report) == before


def test_report_names_the_model_after_its_source(make_trainer, unpainted, tmp_path):
    module = Foreign()
    module.net.config.name_or_path = "somebody/llama"
    fit_foreign(make_trainer(Report(), max_steps=1), module)
    assert "somebody/llama" in Page(tmp_path / "run").text


def test_report_names_a_gguf_model_after_its_file(make_trainer, unpainted, tmp_path):
    module = Foreign()
    module.net.config.name_or_path = "/models/small.Q4_1.gguf"
    fit_foreign(make_trainer(Report(), max_steps=1), module)
    assert "<h1>small.Q4_1</h1>" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


class Graded(Foreign):
    """Logs two scores in validation, which fall by a hundredth a step, beside the loss and a metric of training."""

    def training_step(self, batch, batch_idx):
        self.log("train_score", 1.0)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        for name, top in (("val_score", 1), ("val_other", 2)):
            self.log(name, top - 0.01 * self.global_step, batch_size=len(batch["input_ids"]))


@pytest.mark.parametrize("order", one_of([1, -1]))
def test_report_shows_every_round_and_the_sdr_that_speed_monitor_logged(make_trainer, unpainted, tmp_path, order):
    """Six pairs: some speedup is measurable or not, and the page says the same as the log."""
    drop = SublayerDrop(3, count=1, every_n_steps=3, rounds=2, quality="val_score", quality_batches=2)
    speed = SpeedMonitor(prompt_tokens=6, new_tokens=2, runs=6, quality="val_score", quality_mode="max")
    settings = {"max_steps": 8, "val_check_interval": 2, "csv": True}
    trainer = make_trainer(*[drop, speed, Report()][::order], **settings)
    fit_foreign(trainer, Graded())
    table = Page(tmp_path / "run").table
    sdrs = [sdr for moment, sdr in speed.degradations.items() if moment != "end"]
    assert [sdr.quality for sdr in sdrs] == ["val_score"] * 2
    assert column(tmp_path / "run", "speed/sdr") == pytest.approx([sdr.ratio for sdr in sdrs], nan_ok=True)
    losses = {when: column(tmp_path / "run", f"drop/loss_{when}") for when in ("before", "after")}
    for number, (sdr, before, after) in enumerate(zip(sdrs, losses["before"], losses["after"], strict=True), start=1):
        step, dropped, loss, score, shown = table[f"Round {number}"]
        assert (step, dropped) == (str(3 * number), f"1 {list(drop.plan)[number - 1].kind}")
        assert loss == f"{before:.4f} → {after:.4f}"
        assert score == f"{1 - 0.03 * number:.4f} → {1 - 0.03 * number:.4f}"
        assert shown == re.sub("^-", "\N{MINUS SIGN}", str(sdr))
    assert "val_score before the drop" not in table
    assert table["val_score before the first round"] == "0.9700"
    assert table["val_other in validation"] == "1.9800 before the drop (step 2), 1.9200 at the end"
    assert not any("train_score" in label or "val_score in" in label for label in table)
    if order == 1:  # else the callbacks end in the other order
        end = trainer.callback_metrics["speed/sdr_end"].item()
        assert speed.degradations["end"].ratio == pytest.approx(end, nan_ok=True)
        assert table["SDR at the end"] == re.sub("^-", "\N{MINUS SIGN}", str(speed.degradations["end"]))


@pytest.mark.slow
def test_report_and_rounds_of_an_earlier_versions_checkpoint(make_trainer, tmp_path, text_data, unpainted):
    """Without the fields that this version added: the run goes on, with fewer rows."""

    def run(name, *more, ckpt_path=None):
        drop = SublayerDrop(3, count=1, every_n_steps=3, rounds=2, quality_batches=2)
        speed = SpeedMonitor(prompt_tokens=6, new_tokens=2, runs=1)
        trainer = make_trainer(ExactResume(), drop, speed, Report(), *more, name=name, max_steps=8)
        trainer.fit(causal_lm(), datamodule=text_data(), ckpt_path=ckpt_path)
        return drop, speed

    whole, _ = run("whole", Save(tmp_path / "cut.ckpt", 4))
    resumed, _ = run("resumed", ckpt_path=tmp_path / "cut.ckpt")
    assert resumed.rounds == whole.rounds
    assert len(whole.rounds) == 2
    content = torch.load(tmp_path / "cut.ckpt", weights_only=True)
    for callback, fields in {
        "SublayerDrop": ["rounds"],
        "SpeedMonitor": ["before", "degradations"],
        "Report": ["metrics"],
    }.items():
        for field in fields:
            del content["callbacks"][callback][field]
    torch.save(content, tmp_path / "old.ckpt")
    old, speed = run("old", ckpt_path=tmp_path / "old.ckpt")
    assert old.rounds == whole.rounds[1:]
    assert list(speed.degradations) == ["6", "end"]
    assert Page(tmp_path / "old").table["Round 1"][:3] == ["3", f"1 {next(iter(old.plan)).kind}", "-"]


def test_report_refuses_every_n_steps_below_one():
    with pytest.raises(ScheduleError, match="every_n_steps=0"):
        Report(every_n_steps=0)


@pytest.mark.slow
def test_report_curve_of_a_long_run_stays_short_and_resumes_the_same(
    make_trainer, tmp_path, text_data, unpainted, monkeypatch
):
    """Every third batch a validation, and a drop; against the values that the loggers wrote."""
    monkeypatch.setattr(course, "ThinnedCurve", lambda: ThinnedCurve(8))

    def run(name, ckpt_path=None):
        report = Report(every_n_steps=1)
        drop = SublayerDrop(11, count=2, quality_batches=2)
        saves = [Save(tmp_path / f"{at}.ckpt", at) for at in (5, 11, 21)]
        settings = {"max_steps": 40, "val_check_interval": 2, "limit_val_batches": 1}
        make_trainer(ExactResume(), drop, report, *saves, name=name, csv=True, **settings).fit(
            causal_lm(), datamodule=text_data(), ckpt_path=ckpt_path
        )
        return points(report)

    whole = run("whole")
    train = [(step, loss) for step, split, loss in whole if split == "train"]
    losses = column(tmp_path / "whole", "train_loss")
    assert train == [(step, pytest.approx(losses[step - 1])) for step, _ in train]
    assert {1, 11, 12, 40} <= {step for step, _ in train}
    assert 4 <= len(train) <= 8 + 4
    val = [step for step, split, _ in whole if split == "val"]
    assert val.count(11) == 2
    assert {2, 10, 12, 40} <= set(val)
    assert 6 <= len(val) <= 8 + 8
    for at in (5, 11, 21):
        assert run(f"resumed-{at}", tmp_path / f"{at}.ckpt") == whole, at
