"""Callbacks that only watch, without one that changes the model: resumed runs, and structures given by hand."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger

import layershed as ls
from layershed.callbacks import RedundancyMonitor, Report, SpeedMonitor, SublayerDrop
from layershed.saving.checkpoint import CHECKPOINT_KEY
from tests.integration.test_pending_work import EPOCH, Kill, Killed, rows_of, stateful
from tests.support.runs import (
    Foreign,
    Manual,
    Save,
    causal_lm,
    fit_foreign,
    loader,
    same,
    state_of,
    val_loader,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
    pytest.mark.usefixtures("unpainted"),
]

OTHERS = "ignore:.*callbacks used to create the checkpoint need to be provided:UserWarning"
WATCHERS = {
    "RedundancyMonitor": lambda: RedundancyMonitor(2),
    "Report": lambda: Report(every_n_steps=1),
    "SpeedMonitor": lambda: SpeedMonitor(6, 2, runs=1, quality=None),
}


def bypassed(count=2, **overrides):
    """A module of which the first sublayers are bypassed by hand."""
    module = Foreign(**overrides)
    ls.bypass(module, ls.find_sublayers(module)[:count])
    return module


@pytest.fixture
def resumed(make_trainer, tmp_path):
    """A run left alone, and one that is killed behind the checkpoint of a step and resumed with another seed."""

    def go(watcher, module, step, again=None):
        def one(name, seed, *extra, built=module, ckpt_path=None):
            trainer = make_trainer(watcher(), *extra, name=name, max_steps=2 * EPOCH)
            trainer.loggers = [CSVLogger(tmp_path / "logs" / name, name="", version=None)]
            built = built()
            torch.manual_seed(seed)
            trainer.fit(built, stateful(), val_loader(), ckpt_path=ckpt_path)
            return trainer, built

        def left(name, trainer, built):
            history = sorted((tmp_path / "logs" / name).rglob("importance.csv"))
            own = trainer.callbacks[0].state_dict()
            own.pop("history", None)
            return {
                **state_of(trainer, built),
                "own": own,
                "importance": history[-1].read_text() if history else None,
                "rows": rows_of(tmp_path / "logs" / name),
                "dropped": ls.bypassed_sublayers(built),
            }

        path = tmp_path / "cut.ckpt"
        whole = left("whole", *one("whole", 7))
        with pytest.raises(Killed):
            one("cut", 7, Kill(path, step))
        return whole, left("cut", *one("cut", 8, built=again or module, ckpt_path=path))

    return go


@pytest.mark.parametrize("step", [4, 2 * EPOCH], ids=["in mid-epoch", "behind the last step"])
@pytest.mark.parametrize("watcher", WATCHERS)
def test_with_one_of_them_alone_a_resumed_run_is_the_one_left_alone(resumed, watcher, step):
    whole, again = resumed(WATCHERS[watcher], lambda: Foreign(attention_dropout=0.2), step)
    assert (whole["importance"] is not None) == (watcher == "RedundancyMonitor")
    for part in whole:
        assert same(again[part], whole[part]), part


def test_so_it_is_on_a_model_bypassed_by_hand_also_if_nobody_bypasses_it_again(resumed):
    for again in (bypassed, Foreign):
        whole, cut = resumed(WATCHERS["RedundancyMonitor"], bypassed, 4, again)
        assert len(whole["dropped"]) == 2
        for part in whole:
            assert same(cut[part], whole[part]), part


@pytest.mark.parametrize(
    "own", [lambda: RedundancyMonitor(2), lambda: SublayerDrop(8, count=2, calibration_batches=1, quality_batches=1)]
)
def test_so_it_is_where_every_batch_takes_two_steps(resumed, own):
    """The first batch of the resumed run, too: the one that is measured, or scored."""
    whole, again = resumed(own, lambda: Manual(attention_dropout=0.2), 6)
    assert whole["importance"] is None or "\n8,0,attention,cosine," in whole["importance"]
    for part in whole:
        assert same(again[part], whole[part]), part


class FirstOnly(Manual):
    """Of its two optimizers only the first ever steps."""

    def training_step(self, batch, batch_idx):
        first, _ = self.optimizers()
        first.zero_grad()
        self.manual_backward(self.loss(batch) * self.scale)
        first.step()


def test_so_it_is_where_a_batch_takes_fewer_steps_than_there_are_optimizers(resumed):
    """The first batch of the resumed run, which at two steps a batch would be scored, and is not."""

    def own():
        return SublayerDrop(6, count=2, calibration_batches=1, quality_batches=1)

    whole, again = resumed(own, lambda: FirstOnly(attention_dropout=0.2), 4)
    assert len(whole["dropped"]) == 2
    for part in whole:
        assert same(again[part], whole[part]), part


@pytest.mark.parametrize("watcher", WATCHERS)
def test_a_dense_checkpoint_leaves_what_was_bypassed_by_hand(make_trainer, tmp_path, watcher):
    path = tmp_path / "dense.ckpt"
    fit_foreign(make_trainer(WATCHERS[watcher](), Save(path, 2), max_steps=2))
    assert CHECKPOINT_KEY not in torch.load(path)
    module = bypassed()
    make_trainer(WATCHERS[watcher]()).validate(module, val_loader(), ckpt_path=path, verbose=False)
    assert len(ls.bypassed_sublayers(module)) == 2
    assert same(dict(module.state_dict()), torch.load(path)["state_dict"])


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("watcher", WATCHERS)
def test_beside_sublayer_drop_it_makes_the_model_dense_before_and_behind_it(make_trainer, tmp_path, watcher, order):
    path = tmp_path / "dense.ckpt"
    fit_foreign(make_trainer(WATCHERS[watcher](), Save(path, 2), max_steps=2))
    module = bypassed()
    trainer = make_trainer(*[SublayerDrop(3, count=1), WATCHERS[watcher]()][::order])
    trainer.validate(module, val_loader(), ckpt_path=path, verbose=False)
    assert ls.bypassed_sublayers(module) == ()
    assert not [name for name in vars(module) if name.endswith("_checkpoint")]  # it has its own hooks again


@pytest.mark.filterwarnings(OTHERS)
def test_a_structure_made_by_hand_stops_who_would_load_it_densely(make_trainer, tmp_path):
    """And names what resumes the run, too: with SublayerDrop the optimizer would be another."""
    path = tmp_path / "bypassed.ckpt"
    module = fit_foreign(make_trainer(RedundancyMonitor(2), Save(path, 2), max_steps=2), bypassed())
    advice = r"load with .*, or put RedundancyMonitor, SpeedMonitor or Report among the callbacks"
    with pytest.raises(RuntimeError, match=rf"layershed: attention\.0, mlp\.0 are dropped; {advice}"):
        Foreign.load_from_checkpoint(path)
    for watcher in WATCHERS.values():
        loaded = Foreign()
        make_trainer(watcher(), max_steps=3).fit(loaded, loader(), val_loader(), ckpt_path=path)
        assert ls.bypassed_sublayers(loaded) == ls.bypassed_sublayers(module) != ()


def test_of_our_own_module_it_leaves_one_mark(make_trainer, tmp_path, text_data):
    """Which notes its structure by itself, and knows of no callbacks."""
    path, module = tmp_path / "bypassed.ckpt", causal_lm()
    keys = set(module.state_dict())
    ls.bypass(module, ls.find_sublayers(module)[:2])
    make_trainer(Report(), Save(path, 2), max_steps=2).fit(module, datamodule=text_data())
    (mark,) = torch.load(path)["state_dict"].keys() - keys
    assert "or put RedundancyMonitor, SpeedMonitor or Report among" in mark


def test_hooks_that_somebody_set_on_the_module_are_called_and_come_back(make_trainer, tmp_path):
    path, module, called = tmp_path / "hooked.ckpt", Foreign(), []
    hooks = {f"on_{what}_checkpoint": lambda _, what=what: called.append(what) for what in ("save", "load")}
    vars(module).update(hooks)
    watchers = RedundancyMonitor(2), Report()
    fit_foreign(make_trainer(*watchers, Save(path, 2), max_steps=3), module)
    assert {name: vars(module)[name] for name in hooks} == hooks
    for others in ([], [SublayerDrop(3, count=1)]):
        make_trainer(*others, *watchers).validate(module, val_loader(), ckpt_path=path, verbose=False)
        assert {name: vars(module)[name] for name in hooks} == hooks
    assert called == ["save", "load", "load"]


class Two(Foreign):
    """Holds a teacher, of which nobody is told whose structure is whose."""

    def __init__(self):
        super().__init__()
        self.teacher = Foreign().net.requires_grad_(False)


@pytest.mark.parametrize("watcher", [lambda: RedundancyMonitor(9, transformer="teacher"), Report])
def test_of_two_transformers_only_the_watched_one_is_spoken_for(make_trainer, tmp_path, watcher):
    """A bypass in the other one stays the user's own business, and is never put into the wrong one."""
    path, module = tmp_path / "two.ckpt", Two()
    ls.bypass(module.net, ls.find_sublayers(module.net)[:2])
    fit_foreign(make_trainer(watcher(), Save(path, 2), max_steps=2), module)
    assert CHECKPOINT_KEY not in torch.load(path)
    loaded = Two()
    make_trainer(watcher()).validate(loaded, val_loader(), ckpt_path=path, verbose=False)
    assert ls.bypassed_sublayers(loaded) == ()


def test_a_weight_average_copies_a_watched_module_with_its_hooks(make_trainer, tmp_path):
    path = tmp_path / "averaged.ckpt"
    trainer = make_trainer(RedundancyMonitor(2), EMAWeightAveraging(decay=0.5), Save(path, 3), max_steps=4)
    module = fit_foreign(trainer)
    assert torch.load(path)["state_dict"].keys() == module.state_dict().keys()


@pytest.mark.filterwarnings(OTHERS)
def test_a_checkpoint_of_a_drop_is_not_resumed_without_the_callback_that_made_it(make_trainer, tmp_path):
    """Which has taken parameters out of the optimizer."""
    path = tmp_path / "dropped.ckpt"
    fit_foreign(make_trainer(SublayerDrop(2, count=1, quality_batches=0), Save(path, 3), max_steps=4))
    with pytest.raises(RuntimeError, match=r"is dropped; load with .* or put SublayerDrop among the callbacks"):
        make_trainer(RedundancyMonitor(2)).fit(Foreign(), loader(), val_loader(), ckpt_path=path)
