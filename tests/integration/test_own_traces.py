"""A validation of its own weighs, names and shows values as Lightning does, and leaves no trace in the module."""

import copy
import warnings
from collections import Counter, defaultdict, deque
from dataclasses import dataclass

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BatchEncoding

import layershed as ls
from layershed.callbacks import SublayerDrop
from tests.support.classifier import Ask, Classifier, by_hand, fit, sentences
from tests.support.runs import Foreign, loader, same, val_loader


class Plain(Classifier):
    def on_validation_epoch_end(self):
        pass


@dataclass
class Pair:
    note: str
    input_ids: torch.Tensor
    labels: torch.Tensor


def joined(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


FORMS = {
    "mapping": joined,
    "BatchEncoding": lambda rows: BatchEncoding(joined(rows)),
    "dataclass": lambda rows: Pair("text first", **joined(rows)),
    "number of no dimension first": lambda rows: [{"labels": joined(rows)["labels"]}, joined(rows)["input_ids"]],
}


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("form", FORMS)
def test_own_quality_is_the_mean_over_rows_in_any_form_of_batch(make_trainer, form):
    class Formed(Plain):
        def training_step(self, batch, batch_idx):
            if isinstance(batch, Pair):
                batch = {"input_ids": batch.input_ids, "labels": batch.labels}
            elif isinstance(batch, list):
                batch = {"input_ids": batch[1], **batch[0]}
            return self.net(**batch).loss

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", self.training_step(batch, batch_idx))

    rows = sentences(10, 1).dataset  # the last batch has one row
    drop, module = SublayerDrop(2, count=1), Formed()
    trainer = make_trainer(drop, max_steps=4, val_check_interval=4)
    trainer.fit(module, *(DataLoader(rows, batch_size=3, collate_fn=FORMS[form]) for _ in range(2)))
    loss, _ = by_hand(module.net, list(sentences(10, 1)), 4)
    assert drop.quality["end"].values["loss"] == pytest.approx(loss, rel=1e-5)
    assert trainer.callback_metrics["val_loss"].item() == pytest.approx(loss, rel=1e-5)


class Head(torch.nn.Module):
    """Notes in an attribute what it keeps in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(2))
        self.rows, self.history = 2, []


class Tracing(Plain):
    """Changes what it holds in every way that a validation may."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()), persistent=False)
        self.head, self.seen, self.array = Head(), torch.zeros(()), np.zeros(2)
        self.history = {"val": [], "deep": ([{"list": [1]}], torch.ones(2))}
        self.recent, self.counts, self.lists = deque([1], maxlen=3), Counter(a=1), defaultdict(list)
        self.own, self.weights = {1, 2}, list(self.net.parameters())

    def validation_step(self, batch, batch_idx):
        self.count += 1
        self.seen += 1
        self.replaced = self.replaced + 1
        self.array += 1
        self.recent.append(batch_idx)
        self.counts["a"] += 1
        self.lists["new"].append(1)
        self.own.add(7)
        self.history["val"].append(batch_idx)
        self.history["deep"][0][0]["list"].append(2)
        self.history["deep"][1].mul_(2)
        self.later = 1
        self.head.table = torch.zeros(self.head.rows + 1)
        self.head.rows += 1
        self.head.history.append(1)
        return super().validation_step(batch, batch_idx)


def held(module):
    plain = {k: v for k, v in vars(module).items() if k in ("history", "seen", "recent", "counts", "lists")}
    head = module.head.rows, module.head.history, dict(module.head.named_buffers())
    return copy.deepcopy(
        {
            **plain,
            "own": module.own,
            "array": module.array.tolist(),
            "head": head,
            "count": module.count,
            "re": module.replaced,
        }
    )


def test_validation_leaves_no_trace_in_containers_tensors_and_buffers(make_trainer):
    class AskOnce(Ask):
        def on_train_batch_end(self, trainer, pl_module, *args):
            before, names, identities = held(pl_module), set(vars(pl_module)), id(pl_module.history["deep"][0])
            super().on_train_batch_end(trainer, pl_module, *args)
            assert same(before, held(pl_module))
            assert set(vars(pl_module)) == names
            assert id(pl_module.history["deep"][0]) == identities

    ask, module = AskOnce(None), Tracing()
    fit(make_trainer, ask, module=module, val_check_interval=6, num_sanity_val_steps=0)
    assert len(ask.found) == 2
    assert module.count == 4  # Lightning's own validation leaves its traces


class Reading(Plain):
    """Reads in a hook what the Trainer shows."""

    def __init__(self):
        super().__init__()
        self.read = None

    def on_validation_epoch_end(self):
        shown = self.trainer.callback_metrics
        self.log("val_seen", shown["val_loss"] + self.trainer.logged_metrics["val_acc"])

    def on_validation_end(self):
        assert "val_seen" in self.trainer.callback_metrics


@pytest.mark.parametrize("sanity", [0, 1])
def test_hooks_read_the_metrics_of_the_own_validation_and_others_do_not(make_trainer, sanity):
    class Look(Ask):
        def on_train_batch_end(self, trainer, pl_module, *args):
            before = dict(trainer.callback_metrics)
            super().on_train_batch_end(trainer, pl_module, *args)
            assert trainer.callback_metrics == before

    ask = Look("val_seen")
    fit(make_trainer, ask, module=Reading(), val_check_interval=6, num_sanity_val_steps=sanity)
    loss, accuracy = ask.expected
    assert ask.found[0].values["val_seen"] == pytest.approx(loss + accuracy, rel=1e-5)


def test_names_that_lightning_logs_name_the_quality(make_trainer):
    class Named(Plain):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            output = self.net(**batch)
            self.log("val_loss", output.loss, False, None, True)
            self.log(f"val_plain_{dataloader_idx}", output.loss, add_dataloader_idx=False)
            self.log("val_acc", (output.logits.argmax(-1) == batch["labels"]).float().mean())

    wanted = ("val_acc/dataloader_idx_0", "val_loss_epoch/dataloader_idx_0", "val_plain_0", "val_acc")
    asked = {name: Ask(name) for name in wanted}
    trainer = make_trainer(*asked.values(), max_steps=3, val_check_interval=3)
    trainer.fit(Named(), sentences(18, 0), [sentences(10, 1), sentences(6, 2)])
    assert set(wanted[:3]) <= trainer.callback_metrics.keys()
    for name, ask in asked.items():
        if "loss" in name or name == "val_plain_0":
            assert ask.found[0].values[name] == pytest.approx(ask.expected[0], rel=1e-5)
    assert asked[wanted[0]].found[0].values[wanted[0]] == asked["val_acc"].found[0].values["val_acc"]
    epoch = Ask("val_loss_epoch")
    fit(make_trainer, epoch, module=Named())
    assert epoch.found[0].values["val_loss_epoch"] == pytest.approx(epoch.expected[0], rel=1e-5)


LIMITED = {"limit_val_batches": 2, "num_sanity_val_steps": 0, "check_val_every_n_epoch": 9}


def test_own_quality_sees_no_more_batches_than_limit_val_batches(make_trainer):
    class Counting(Plain):
        ran = 0

        def validation_step(self, batch, batch_idx):
            Counting.ran += 1
            return super().validation_step(batch, batch_idx)

    make_trainer(SublayerDrop(2, count=1), max_steps=3, **LIMITED).fit(Counting(), sentences(18, 0), sentences(18, 1))
    assert Counting.ran == 3 * 2


def test_quality_of_a_causal_model_sees_no_more_batches_than_limit_val_batches(make_trainer):
    drop, module = SublayerDrop(2, count=1), Foreign()
    make_trainer(drop, max_steps=3, **LIMITED).fit(module, loader(), val_loader())
    batches = list(val_loader())
    assert len(batches) > 2
    assert drop.quality["end"] == ls.evaluate_quality(module, batches[:2])


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("quality_batches", [0, 16])
@pytest.mark.parametrize("kind", [Foreign, Plain])
def test_every_model_without_validation_gets_one_warning_unless_no_quality_is_wanted(
    make_trainer, kind, quality_batches
):
    class Never(kind):
        validation_step = pl.LightningModule.validation_step

    drop = SublayerDrop(2, count=1, quality_batches=quality_batches)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(drop, max_steps=3).fit(Never(), loader() if kind is Foreign else sentences(18, 0))
    said = [each for each in caught if "quality" in str(each.message)]
    assert [str(each.message).partition(".")[0] for each in said] == [
        "SublayerDrop: the quality around the drop is left out"
    ] * (quality_batches > 0)
    assert all("lightning/pytorch" in each.filename for each in said)  # Lightning prints no line of source there


def test_warning_of_an_error_names_no_line_of_layershed(make_trainer):
    class Failing(Plain):
        def validation_step(self, batch, batch_idx):
            raise KeyError("labels")

    trainer = make_trainer(SublayerDrop(2, count=1), max_steps=3, num_sanity_val_steps=0, check_val_every_n_epoch=9)
    with pytest.warns(UserWarning, match="KeyError: 'labels'") as caught:
        trainer.fit(Failing(), sentences(18, 0), sentences(6, 1))
    [said] = [each for each in caught if "quality" in str(each.message)]
    assert "lightning/pytorch" in said.filename
