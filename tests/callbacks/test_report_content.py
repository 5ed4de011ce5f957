"""What Report gathers for its page beside losses and the drop: its course, samples of text, how it ran, a control."""

import csv
import json
import re
import time
from importlib import metadata
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor

from layershed.callbacks import ExactResume, Export, RedundancyMonitor, Report, SublayerDrop
from layershed.errors import ControlError, ScheduleError
from layershed.integration import course
from layershed.reporting import html_report
from layershed.training.causal_lm import CausalLM
from layershed.training.chat import prompt_ids
from layershed.training.conversations import Conversation
from layershed.training.text_data import TextData
from tests.support.chats import chat_of
from tests.support.runs import Foreign, Save, causal_lm, fit_foreign, same
from tests.support.small_world import TINY


@pytest.fixture(autouse=True)
def records(monkeypatch, unpainted):
    """What the pages are made of, in order."""
    made, write = [], html_report.write_report

    def keep(record, path):
        made.append(record)
        return write(record, path)

    monkeypatch.setattr("layershed.callbacks.report.write_report", keep)
    return made


def column(folder, name):
    with open(Path(folder) / "metrics.csv", encoding="utf-8", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def slowly(parameters):
    """So slowly that it writes more than white space."""
    return torch.optim.AdamW(parameters, lr=1e-4)


class Dense(pl.Callback):
    """Continues the samples' prompts before the first drop, token by token and without a cache; no samples are used."""

    def __init__(self, at, prompts):
        self.at, self.prompts, self.written = at, prompts, None

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.at:
            self.written = greedily(pl_module, self.prompts)


def greedily(module, prompts):
    ids = torch.tensor(prompts)
    module.eval()
    with torch.no_grad():
        for _ in range(ids.shape[1]):
            ids = torch.cat([ids, module.model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    module.train()
    return ids[:, ids.shape[1] // 2 :].tolist()


@pytest.fixture
def sampled(make_trainer, text_data, records, monkeypatch):
    """Runs a causal language model that drops all attention at step 3 and gives report, record and module."""

    def fit(*more, samples=2, name="run", ckpt_path=None, **settings):
        report, module, data = Report(every_n_steps=1, samples=samples), causal_lm(optimizer=slowly), text_data()
        drop = SublayerDrop(3, "attention", ratio=0.9, quality_batches=1)
        # saved last, as by ModelCheckpoint
        trainer = make_trainer(RedundancyMonitor(1), drop, report, *more, name=name, **{"max_steps": 6, **settings})
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return report, records[-1], module, data

    return fit


def test_samples_are_the_greedy_text_before_the_drop_and_at_the_end(sampled):
    report, record, module, data = sampled()
    prompts = report._samples.prompts
    first = next(iter(data.val_dataloader()))["input_ids"]
    assert prompts == first[:2, : first.shape[1] // 2].tolist()
    witness = Dense(2, prompts)
    _, again, other, _ = sampled(witness, samples=0, name="again")
    assert again.samples == ()
    assert same(module.state_dict(), other.state_dict()), "writing changes nothing of the training"
    texts = [
        [data.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        for rows in (prompts, witness.written, greedily(module, prompts))
    ]
    assert [(s.prompt, s.dense, s.dropped) for s in record.samples] == list(zip(*texts, strict=True))
    assert len({sample.dropped for sample in record.samples}) == 2
    assert all(sample.dense != sample.dropped for sample in record.samples)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("packing", [True, False])
def test_samples_of_conversations_go_on_from_one_conversation_each(packing, make_trainer, records, tmp_path):
    """Each prompt is what the template writes before an answer: nothing of another conversation precedes it."""
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat_of(number)}) + "\n" for number in range(12)))
    data = TextData(str(path), block_size=160, batch_size=2, val_fraction=0.5, packing=packing)
    report, module = Report(samples=3), CausalLM(config={**TINY, "max_position_embeddings": 160})
    trainer = make_trainer(SublayerDrop(2, count=1, quality_batches=1), report, max_steps=3, max_epochs=-1)
    trainer.fit(module, datamodule=data)
    chats = (Conversation(chat_of(number)[:-1]) for number in range(12))
    asked = {data.tokenizer.decode(prompt_ids(data.tokenizer, chat), skip_special_tokens=True) for chat in chats}
    prompts = [sample.prompt for sample in records[-1].samples]
    assert len(prompts) == (3 if packing else 2), "of the first batch"
    assert set(prompts) <= asked


def test_importances_and_samples_of_a_resumed_run_are_those_of_the_uninterrupted_one(sampled, tmp_path):
    cuts = [Save(tmp_path / f"{at}.ckpt", at) for at in (2, 4)]
    _, whole, *_ = sampled(ExactResume(), *cuts, name="whole")
    assert whole.samples
    assert {(p.kind, p.block) for p in whole.scores} >= {(s.kind, s.block) for s in whole.plan}
    for at in (2, 4):
        _, record, *_ = sampled(ExactResume(), name=f"resumed-{at}", ckpt_path=tmp_path / f"{at}.ckpt")
        for part in ("samples", "scores", "events", "plan"):
            assert getattr(record, part) == getattr(whole, part), part
        assert [step for step, _ in record.curves["learning rate"]] == [
            step for step, _ in whole.curves["learning rate"]
        ]


def test_scores_beside_the_dropped_ones_are_those_that_the_plan_was_chosen_by(sampled):
    _, record, *_ = sampled()
    scores = {(p.kind, p.block): p.value for p in record.scores}
    dropped = {(d.sublayer.kind, d.sublayer.block): d.score for d in record.plan.drops}
    assert dropped.items() <= scores.items()
    kept = [value for key, value in scores.items() if key[0] == "attention" and key not in dropped]
    assert kept
    assert min(kept) >= max(dropped.values())


def test_module_without_a_tokenizer_has_no_samples_and_no_warning(make_trainer, records):
    fit_foreign(make_trainer(SublayerDrop(2, count=1), Report(), max_steps=3))
    assert records[-1].samples == ()


def test_learning_rate_is_that_of_each_step(make_trainer, records, text_data):
    """Against Lightning's own monitor, which logs what the coming step takes."""
    trainer = make_trainer(LearningRateMonitor("step"), Report(every_n_steps=2), csv=True, name="rates", max_steps=8)
    trainer.fit(causal_lm(), datamodule=text_data())
    rates = dict(enumerate(column(trainer.log_dir, "lr-AdamW"), start=1))
    points = records[-1].curves["learning rate"]
    assert [step for step, _ in points] == [2, 4, 6, 8]
    assert points == tuple((step, pytest.approx(rates[step])) for step, _ in points)


def test_throughput_counts_tokens_without_validations_and_drops(make_trainer, records, text_data, monkeypatch):
    """A clock that moves by a second a batch, a hundred a validation, and a thousand at the drop."""
    now = [0.0]
    monkeypatch.setattr(course.time, "monotonic", lambda: now[0])

    class Slow(pl.Callback):
        def on_train_batch_start(self, *_):
            now[0] += 1.0

        def on_validation_batch_start(self, *_):
            now[0] += 100.0

        def on_train_batch_end(self, trainer, *_):
            now[0] += 1000.0 * (trainer.global_step == 5)

    settings = {"max_steps": 8, "val_check_interval": 3, "limit_val_batches": 1}
    report = Report(every_n_steps=2)
    trainer = make_trainer(SublayerDrop(5, count=1, quality_batches=0), report, Slow(), **settings)
    trainer.fit(causal_lm(), datamodule=text_data())
    tokens = text_data().batch_size * text_data().block_size
    (points,) = (own for name, own in records[-1].curves.items() if name == "throughput (tokens/s)")
    assert points == tuple((step, tokens) for step in (2, 4, 6, 8))
    assert report._course.elapsed == 8 + 200 + 1000


def test_page_tells_how_it_ran(make_trainer, records, monkeypatch, tmp_path):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    monkeypatch.setattr("sys.argv", ["train_it.py", "--name", "two words"])

    class Configured(Foreign):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"width": 32, "names": ["a", "b"]})

    fit_foreign(make_trainer(SublayerDrop(2, count=1), Export(), Report(), max_steps=3), Configured())
    facts = dict(records[-1].facts)
    assert facts["Command"] == "python train_it.py --name 'two words'"
    assert facts["Seed"] == "7"
    assert f"torch {metadata.version('torch')}" in facts["Versions"]
    assert "cpu" in facts["Processor"]
    assert facts["Ended"][:10] == time.strftime("%Y-%m-%d", time.gmtime())
    assert re.fullmatch(r"\d+ s for 3 optimizer steps", facts["Duration"])
    assert records[-1].config == "width: 32\nnames: ['a', 'b']"
    usage = records[-1].usage[0][1]
    assert f"ls.load_pretrained('{tmp_path / 'run' / 'pruned'}')" in usage
    namespace = {}
    exec(usage, namespace)  # what the page says runs
    assert len(namespace["model"].config.per_layer_config) >= 1
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for text in ("width: 32", "train_it.py", "Load and serve"):
        assert text in page


def test_report_takes_the_control_of_another_run(make_trainer, records, tmp_path, capsys):
    settings = {"csv": True, "max_steps": 6, "val_check_interval": 3}
    fit_foreign(make_trainer(name="dense", **settings))
    report = Report(control=tmp_path / "dense")
    fit_foreign(make_trainer(SublayerDrop(3, count=2, quality_batches=2), report, **settings))
    own, theirs = (column(tmp_path / name, "val_loss")[-1] for name in ("run", "dense"))
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Cost of the drop {own - theirs:+.4f} loss after the same 6 steps" in shown


def test_report_without_a_control_says_what_the_end_cannot_tell(make_trainer, capsys):
    fit_foreign(make_trainer(SublayerDrop(2, count=1, quality_batches=1), Report(), max_steps=4))
    assert "the figures at the end include the training since the drop" in " ".join(capsys.readouterr().out.split())


def test_unfit_control_and_numbers_are_refused_before_training(make_trainer, tmp_path):
    with pytest.raises(ControlError, match=r"there is no metrics\.csv"):
        fit_foreign(make_trainer(Report(control=tmp_path / "nowhere"), max_steps=1))
    with pytest.raises(ScheduleError, match="samples=-1"):
        Report(samples=-1)
