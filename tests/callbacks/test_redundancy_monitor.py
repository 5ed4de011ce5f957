"""RedundancyMonitor against a training loop without Lightning and hooks of our own."""

import csv
import itertools
import pickle
import shutil
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import layershed as ls
from layershed.callbacks import ExactResume, RedundancyMonitor, SublayerDrop
from layershed.errors import AmbiguousModelError, LayershedError, ScheduleError, UnknownNameError
from tests.support.killed import stateful
from tests.support.models import build_model
from tests.support.runs import (
    Broken,
    Foreign,
    HandRun,
    Interrupt,
    Interrupted,
    Manual,
    Save,
    causal_lm,
    fit_foreign,
    loader,
    same,
    sequences,
    state_of,
    val_loader,
)
from tests.support.thinned import some_of


def rows(folder, metric=None):
    """importance.csv as {step: {(block, kind): value}}, of one metric or of the only one."""
    with open(folder / "importance.csv", encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    found = {}
    for row in read:
        assert list(row) == ["step", "block", "kind", "metric", "value"]
        if metric in (None, row["metric"]):
            step = found.setdefault(int(row["step"]), {})
            assert (int(row["block"]), row["kind"]) not in step, row
            step[int(row["block"]), row["kind"]] = float(row["value"])
    return found


def by_hand(batches, steps, metric="cosine", accumulate=1, mask=None, **overrides):
    """The same rows from a loop without Lightning."""
    run = HandRun(accumulate, **overrides)
    wanted = {}
    for step in run.train(batches):
        values = run.captured.importances(metric, mask)
        if step in steps:
            wanted[step] = values
    return wanted


def close(left, right):
    assert left.keys() == right.keys()
    for step in left:
        assert left[step] == pytest.approx(right[step], rel=2e-5), step


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("metric", ["cosine", "relative_magnitude", "angular"])
def test_rows_are_the_importances_of_the_measured_steps_batches(make_trainer, tmp_path, metric):
    trainer = make_trainer(RedundancyMonitor(every_n_steps=3, metric=metric), max_steps=7)
    fit_foreign(trainer)
    wanted = by_hand(itertools.islice(itertools.cycle(loader()), 7), {3, 6}, metric)
    assert len(wanted[3]) == 12
    close(rows(tmp_path / "run"), wanted)


def test_accumulation_averages_all_micro_batches_of_the_step(make_trainer, tmp_path):
    fit_foreign(make_trainer(RedundancyMonitor(2), max_steps=4, accumulate_grad_batches=2), train=loader(8))
    close(rows(tmp_path / "run"), by_hand(loader(8), {2, 4}, accumulate=2))


def test_padding_does_not_count_in_the_importances(make_trainer, tmp_path):
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[1, 9:] = False
    items = [{**item, "attention_mask": row.long()} for item, row in zip(sequences(2), mask, strict=True)]
    train = torch.utils.data.DataLoader(items, batch_size=2)
    fit_foreign(make_trainer(RedundancyMonitor(1), max_steps=1), train=train)
    close(rows(tmp_path / "run"), by_hand(train, {1}, mask=mask))


def test_gradient_checkpointing_changes_no_value(make_trainer, tmp_path, text_data):
    for name, on in (("with", True), ("without", False)):
        module = causal_lm(gradient_checkpointing=on)
        make_trainer(RedundancyMonitor(2), max_steps=4, name=name).fit(module, datamodule=text_data())
    assert rows(tmp_path / "with") == rows(tmp_path / "without")
    assert set(rows(tmp_path / "with")) == {2, 4}


def test_training_is_bit_identical_and_no_forward_pass_is_added(make_trainer):
    class Count(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.passes = 0
            pl_module.net.model.register_forward_pre_hook(self.add)

        def add(self, *_):
            self.passes += 1

    states, passes = [], []
    for name, monitors in (("without", []), ("with", [RedundancyMonitor(2)])):
        count = Count()
        trainer = make_trainer(*monitors, count, max_steps=6, name=name, limit_val_batches=0)
        module = fit_foreign(trainer, attention_dropout=0.2)
        states.append((state_of(trainer, module), torch.get_rng_state()))
        passes.append(count.passes)
    assert passes == [6, 6]
    assert same(states[0], states[1])


def test_monitor_does_not_count_passes_outside_the_training_step(make_trainer, tmp_path):
    class Sample(pl.Callback):
        """Runs the model on other tokens after every training step, as a sampling callback does."""

        def on_train_batch_end(self, trainer, pl_module, *_):
            with torch.no_grad():
                pl_module.net(input_ids=torch.full((3, 5), 50))

        on_before_optimizer_step = on_validation_end = on_train_batch_end

    for name, callbacks in (("before", [Sample(), RedundancyMonitor(2)]), ("after", [RedundancyMonitor(2), Sample()])):
        # validation after every micro-batch: also between the two of a measured step
        trainer = make_trainer(*callbacks, name=name, max_steps=4, accumulate_grad_batches=2, val_check_interval=1)
        fit_foreign(trainer, train=loader(8))
        close(rows(tmp_path / name), by_hand(loader(8), {2, 4}, accumulate=2))


def test_importances_reach_the_logger_and_other_callbacks(make_trainer, tmp_path):
    checkpoint = ModelCheckpoint(
        tmp_path / "best", filename="{step}", monitor="importance/attention_mean", mode="min", every_n_train_steps=2
    )
    trainer = make_trainer(RedundancyMonitor(2), checkpoint, csv=True, max_steps=6, enable_checkpointing=True)
    fit_foreign(trainer)
    found = rows(tmp_path / "run")
    assert set(found) == {2, 4, 6}
    with open(tmp_path / "run" / "metrics.csv", encoding="utf-8", newline="") as file:
        logged = {int(row["step"]): row for row in csv.DictReader(file) if row.get("importance/mlp.0")}
    assert set(logged) == {2, 4, 6}
    means = {}
    for step, values in found.items():
        for (block, kind), value in values.items():
            assert float(logged[step][f"importance/{kind}.{block}"]) == pytest.approx(value, rel=1e-6)
        for kind in ("attention", "mlp", "block"):
            own = [value for (_, other), value in values.items() if other == kind]
            assert float(logged[step][f"importance/{kind}_mean"]) == pytest.approx(sum(own) / 4, rel=1e-6)
        means[step] = sum(value for (_, kind), value in values.items() if kind == "attention") / 4
    for (block, kind), value in found[6].items():
        assert trainer.callback_metrics[f"importance/{kind}.{block}"].item() == pytest.approx(value, rel=1e-6)
    best = min(means, key=means.get)
    assert checkpoint.best_model_path == str(tmp_path / "best" / f"step={best}.ckpt")
    assert checkpoint.best_model_score.item() == pytest.approx(means[best], rel=1e-6)


def test_dropped_sublayers_have_no_rows(make_trainer, tmp_path):
    drop = SublayerDrop(3, scope="joint", count=3, quality_batches=0)
    fit_foreign(make_trainer(RedundancyMonitor(2), drop, max_steps=6))
    found = rows(tmp_path / "run")
    gone = {(sublayer.block, sublayer.kind) for sublayer in drop.plan}
    whole = {(block, kind) for block in range(4) for kind in ("attention", "mlp", "block")}
    empty = {(b, "block") for b in range(4) if {(b, "attention"), (b, "mlp")} <= gone}
    assert set(found[2]) == whole
    assert set(found[4]) == set(found[6]) == whole - gone - empty


def hooks_of(module):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()]


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("interrupted", [False, True])
def test_monitor_leaves_no_forward_hook_on_the_model(make_trainer, interrupted):
    module = Foreign()
    before = hooks_of(module)
    inside = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            inside.append(hooks_of(pl_module))
            if interrupted and batch_idx == 2:
                raise Interrupted

    trainer = make_trainer(RedundancyMonitor(2), SublayerDrop(3, count=1), Look(), max_steps=4)
    if interrupted:
        with pytest.raises(Interrupted):
            fit_foreign(trainer, module)
    else:
        fit_foreign(trainer, module)
    assert sum(inside[0]) > sum(before)
    ls.restore(module)  # the record of the drop has hooks, too
    assert hooks_of(module) == before


def test_forward_hooks_go_if_another_callback_refuses_the_run(make_trainer):
    module = Foreign()
    before = hooks_of(module)
    with pytest.raises(ScheduleError):
        fit_foreign(make_trainer(RedundancyMonitor(2), SublayerDrop(50, count=1)), module)
    assert hooks_of(module) == before


def test_two_metrics_side_by_side_equal_each_alone(make_trainer, tmp_path):
    both = [RedundancyMonitor(2), RedundancyMonitor(3, metric="angular")]
    fit_foreign(make_trainer(*both, max_steps=6, name="both"))
    fit_foreign(make_trainer(RedundancyMonitor(2), max_steps=6, name="cosine"))
    fit_foreign(make_trainer(RedundancyMonitor(3, metric="angular"), max_steps=6, name="angular"))
    assert rows(tmp_path / "both", "cosine") == rows(tmp_path / "cosine")
    assert rows(tmp_path / "both", "angular") == rows(tmp_path / "angular")
    assert set(rows(tmp_path / "both", "angular")) == {3, 6}


class SaveMiddle(pl.Callback):
    """Writes a checkpoint after the micro-batch of that number, from 0: in the middle of a window of accumulation."""

    def __init__(self, path, batch):
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.default_cases(1)
@pytest.mark.filterwarnings("ignore:The checkpoint was written between two optimizer steps")
@pytest.mark.parametrize("saved_at", ["between", "middle"])
def test_resumed_file_equals_the_uninterrupted_one(make_trainer, tmp_path, text_data, saved_at):
    """In the middle of a window Lightning loses the gradient so far: with a learning rate of 0 that is no matter."""
    still = {} if saved_at == "between" else {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)}

    def monitors():
        return [RedundancyMonitor(2), RedundancyMonitor(3, metric="angular")]

    def run(name, *callbacks, ckpt_path=None):
        own = [ExactResume(), *monitors(), *callbacks]
        trainer = make_trainer(*own, name=name, max_steps=8, accumulate_grad_batches=2)
        trainer.fit(causal_lm(**still), datamodule=text_data(), ckpt_path=ckpt_path)

    cut, stop = tmp_path / "cut.ckpt", 7
    save = Save(cut, 3) if saved_at == "between" else SaveMiddle(cut, 6)
    run("whole")
    with pytest.raises(Interrupted):
        run("cut", save, Interrupt(stop))
    run("resumed", ckpt_path=tmp_path / "cut.ckpt")
    whole = (tmp_path / "whole" / "importance.csv").read_text()
    assert set(rows(tmp_path / "whole", "cosine")) == {2, 4, 6, 8}
    assert (tmp_path / "resumed" / "importance.csv").read_text() == whole
    # the step whose first micro-batch was seen before the interruption is measured on both
    run("cut", ckpt_path=tmp_path / "cut.ckpt")
    assert (tmp_path / "cut" / "importance.csv").read_text() == whole


def test_monitor_in_an_old_directory_begins_a_new_file(make_trainer, tmp_path):
    for _ in range(2):
        fit_foreign(make_trainer(RedundancyMonitor(2), RedundancyMonitor(2, metric="angular"), max_steps=4))
    assert set(rows(tmp_path / "run", "cosine")) == set(rows(tmp_path / "run", "angular")) == {2, 4}


class Two(Foreign):
    """A student with its teacher."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.teacher = build_model(num_hidden_layers=2).requires_grad_(False).train()


def test_monitor_requires_a_name_for_two_transformers_before_training(make_trainer, tmp_path):
    module = Two()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(AmbiguousModelError, match="net, teacher"):
        fit_foreign(make_trainer(RedundancyMonitor(1), max_steps=2), module)
    assert same(dict(module.state_dict()), before)
    fit_foreign(make_trainer(RedundancyMonitor(1, transformer="net"), max_steps=2), module)
    assert set(rows(tmp_path / "run")[1]) == {(b, k) for b in range(4) for k in ("attention", "mlp", "block")}


def test_monitor_refuses_arguments_out_of_range():
    with pytest.raises(ScheduleError, match="every_n_steps=0"):
        RedundancyMonitor(0)
    with pytest.raises(UnknownNameError, match="cosine"):
        RedundancyMonitor(metric="cosin")
    assert issubclass(ScheduleError, LayershedError)


def test_overriding_should_measure_gives_another_cadence(make_trainer, tmp_path):
    class Early(RedundancyMonitor):
        def should_measure(self, step):
            return step in (1, 2, 5)

    fit_foreign(make_trainer(Early(), max_steps=6), val=val_loader())
    assert set(rows(tmp_path / "run")) == {1, 2, 5}


def test_manual_optimization_with_two_steps_a_batch_is_measured(make_trainer, tmp_path):
    """global_step is even after every batch: a measured batch is the one that comes to or over the step."""
    fit_foreign(make_trainer(RedundancyMonitor(2), max_steps=8, name="even"), Manual())
    fit_foreign(make_trainer(RedundancyMonitor(5), max_steps=12, name="odd"), Manual())
    assert set(rows(tmp_path / "even")) == {4, 6, 8}
    assert set(rows(tmp_path / "odd")) == {6, 10}


def test_monitor_warns_of_nan_passes_and_leaves_them_out(make_trainer, tmp_path):
    """The second of two micro-batches of step 2, and of one of step 3, which is not measured."""
    settings = {"max_steps": 4, "accumulate_grad_batches": 2}
    trainer = make_trainer(RedundancyMonitor(2), csv=True, **settings)
    with pytest.warns(UserWarning, match=r"RedundancyMonitor, step 2: 1 of 3 forward passes.*attention\.0\.") as caught:
        fit_foreign(trainer, Broken(beside=(3, 4)), train=loader(8))
    assert len([warning for warning in caught if "RedundancyMonitor" in str(warning.message)]) == 1
    close(rows(tmp_path / "run"), by_hand(loader(8), {2, 4}, accumulate=2))
    fit_foreign(make_trainer(RedundancyMonitor(2), name="whole", **settings), train=loader(8))
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    with open(tmp_path / "run" / "metrics.csv", encoding="utf-8", newline="") as file:
        skipped = [(row["step"], float(row[name])) for row in csv.DictReader(file) if row[name := "importance/skipped"]]
    assert skipped == [("2", 1), ("4", 0)], "said again once it is over, so that nobody reads an old count"


def test_step_without_a_finite_pass_has_no_rows(make_trainer, tmp_path):
    trainer = make_trainer(RedundancyMonitor(1), max_steps=4)
    with pytest.warns(UserWarning, match="step 3: 1 of 1 forward passes left out"):
        fit_foreign(trainer, Broken(alone=(2,)))
    assert set(rows(tmp_path / "run")) == {1, 2, 4}
    assert trainer.callback_metrics["importance/skipped"] == 0


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_passes_left_out_before_an_interruption_are_counted_after_it(make_trainer, tmp_path):
    """The first of two micro-batches of step 2 came with a pass of NaN, before the checkpoint."""
    for name, ckpt_path in (("whole", None), ("resumed", tmp_path / "cut.ckpt")):
        save = SaveMiddle(tmp_path / "cut.ckpt", 2)
        trainer = make_trainer(RedundancyMonitor(2), save, name=name, max_steps=2, accumulate_grad_batches=2)
        with pytest.warns(UserWarning, match="step 2: 1 of 3 forward passes left out"):
            trainer.fit(Broken(beside=(2,)), stateful(8), val_loader(), ckpt_path=ckpt_path)


@pytest.fixture
def run_twice(make_trainer, text_data, tmp_path):
    """Runs two monitors for 8 steps with a checkpoint at step 4, then again from that checkpoint."""

    def run(name, *callbacks, ckpt_path=None):
        monitors = [RedundancyMonitor(1), RedundancyMonitor(2, metric="angular")]
        trainer = make_trainer(*monitors, *callbacks, name=name, max_steps=8)
        trainer.fit(causal_lm(), datamodule=text_data(), ckpt_path=ckpt_path)
        return (tmp_path / name / "importance.csv").read_bytes()

    return run


def at_checkpoints(folder):
    path = folder / "checkpoints" / "4.ckpt"
    path.parent.mkdir(parents=True)
    return path


def test_monitor_checkpoint_holds_no_rows_and_does_not_grow(make_trainer, tmp_path):
    saves = [Save(tmp_path / f"{step}.ckpt", step) for step in (3, 30)]
    fit_foreign(make_trainer(RedundancyMonitor(1), *saves, max_steps=30), steps=30)
    states = []
    for step in (3, 30):
        (state,) = torch.load(tmp_path / f"{step}.ckpt", weights_only=True)["callbacks"].values()
        states.append(state)
        lines = (tmp_path / "run" / "importance.csv").read_bytes().splitlines(keepends=True)
        assert state["history"]["bytes"] == sum(map(len, lines[: 1 + 12 * step]))
    assert len(pickle.dumps(states[1])) - len(pickle.dumps(states[0])) < 20
    assert (tmp_path / "run" / "importance.csv").stat().st_size > 9 * states[0]["history"]["bytes"]


@pytest.mark.slow
def test_monitor_finds_its_history_in_a_moved_run_directory(run_twice, tmp_path):
    path = at_checkpoints(tmp_path / "run")
    whole = run_twice("run", Save(path, 4))
    shutil.move(tmp_path / "run", tmp_path / "moved")
    moved = tmp_path / "moved" / "checkpoints" / "4.ckpt"
    assert run_twice("elsewhere", ckpt_path=moved) == whole
    assert (tmp_path / "moved" / "importance.csv").read_bytes() == whole, "only its own run may write to it"
    assert run_twice("moved", ckpt_path=moved) == whole


def ruined(path, how):
    if how == "gone":
        path.unlink()
    elif how == "shorter":
        path.write_bytes(path.read_bytes()[:700])
    elif how == "another run's":
        path.write_bytes(path.read_bytes().replace(b"0.", b"0.1"))
    else:
        path.write_bytes(b"root:x:0:0" + path.read_bytes()[10:])


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("how", some_of(["gone", "shorter", "another run's", "no importances"], 2))
def test_missing_history_is_warned_of_once(run_twice, tmp_path, how):
    path = at_checkpoints(tmp_path / "run")
    whole = run_twice("run", Save(path, 4))
    ruined(tmp_path / "run" / "importance.csv", how)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = run_twice("resumed", ckpt_path=path)
    told = [str(warning.message) for warning in caught if "importance.csv" in str(warning.message)]
    assert len(told) == 1
    assert "begins after step 4" in told[0]
    lines = whole.splitlines(keepends=True)
    assert resumed == b"".join([lines[0], *(line for line in lines[1:] if int(line.split(b",")[0]) > 4)])


@pytest.mark.slow
def test_monitor_does_not_copy_history_named_by_a_foreign_checkpoint(run_twice, tmp_path):
    """A checkpoint may be untrusted: a file is not copied only because the checkpoint names it."""
    path, secret = tmp_path / "4.ckpt", tmp_path / "secret.csv"
    run_twice("run", Save(path, 4))
    shutil.move(tmp_path / "run" / "importance.csv", secret)
    checkpoint = torch.load(path, weights_only=True)
    for state in checkpoint["callbacks"].values():
        state["history"]["file"] = str(secret)
    torch.save(checkpoint, path)
    with pytest.warns(UserWarning, match="begins after step 4"):
        resumed = run_twice("resumed", ckpt_path=path)
    assert resumed.splitlines()[1].startswith(b"5,")


@pytest.mark.slow
def test_resumed_run_in_the_directory_of_another_keeps_no_rows_of_it(run_twice, tmp_path):
    path = tmp_path / "4.ckpt"
    whole = run_twice("run", Save(path, 4))
    run_twice("old")
    with (tmp_path / "old" / "importance.csv").open("ab") as file:
        file.write(b"9,0,attention,cosine,0.5\n")
    assert run_twice("old", ckpt_path=path) == whole


@pytest.mark.slow
def test_monitor_new_in_a_resumed_run_keeps_the_rows_of_the_others(make_trainer, text_data, run_twice, tmp_path):
    path = tmp_path / "run" / "4.ckpt"
    run_twice("run", Save(path, 4))
    history = rows(tmp_path / "run", "cosine")
    monitors = [RedundancyMonitor(2, metric="relative_magnitude"), RedundancyMonitor(1)]
    with pytest.warns(UserWarning, match="callback"):  # Lightning: the one of angular is gone
        make_trainer(*monitors, max_steps=8).fit(causal_lm(), datamodule=text_data(), ckpt_path=path)
    assert rows(tmp_path / "run", "cosine") == history
    assert set(rows(tmp_path / "run", "relative_magnitude")) == {6, 8}
