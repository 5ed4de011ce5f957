"""The module's own checkpoint hooks: every checkpoint says how the model was changed, by a callback or by hand."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

import layershed as ls
from layershed.callbacks import ExactResume, RedundancyMonitor, Report, SpeedMonitor, SublayerDrop
from layershed.saving.checkpoint import CHECKPOINT_KEY
from tests.support.killed import stateful
from tests.support.runs import Foreign, Save, Watch, causal_lm, fit_foreign, loader, same, unmarked, val_loader

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


@pytest.mark.parametrize("watcher", WATCHERS)
def test_dense_checkpoint_beside_a_watcher_leaves_what_was_bypassed_by_hand(make_trainer, tmp_path, watcher):
    path = tmp_path / "dense.ckpt"
    fit_foreign(make_trainer(WATCHERS[watcher](), Save(path, 2), max_steps=2))
    assert CHECKPOINT_KEY not in torch.load(path)
    module = bypassed()
    make_trainer(WATCHERS[watcher]()).validate(module, val_loader(), ckpt_path=path, verbose=False)
    assert len(ls.bypassed_sublayers(module)) == 2
    assert same(dict(module.state_dict()), torch.load(path)["state_dict"])


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(("watcher", "order"), [("RedundancyMonitor", 1), ("Report", -1), ("SpeedMonitor", 1)])
def test_dense_checkpoint_beside_sublayer_drop_makes_the_model_dense_in_either_order(
    make_trainer, tmp_path, watcher, order
):
    path = tmp_path / "dense.ckpt"
    fit_foreign(make_trainer(WATCHERS[watcher](), Save(path, 2), max_steps=2))
    module = bypassed()
    trainer = make_trainer(*[SublayerDrop(3, count=1), WATCHERS[watcher]()][::order])
    trainer.validate(module, val_loader(), ckpt_path=path, verbose=False)
    assert ls.bypassed_sublayers(module) == ()
    assert not [name for name in vars(module) if name.endswith("_checkpoint")]  # it has its own hooks again


@pytest.mark.filterwarnings(OTHERS)
def test_checkpoint_of_a_model_bypassed_by_hand_is_never_loaded_dense_in_silence(make_trainer, tmp_path):
    """Its error names what resumes the run, too: with SublayerDrop the optimizer would be another."""
    path = tmp_path / "bypassed.ckpt"
    module = fit_foreign(make_trainer(RedundancyMonitor(2), Save(path, 2), max_steps=2), bypassed())
    advice = r"load with .*, or put ExactResume among the callbacks"
    with pytest.raises(RuntimeError, match=rf"layershed: attention\.0, mlp\.0 are dropped; {advice}"):
        Foreign.load_from_checkpoint(path)
    with pytest.raises(RuntimeError, match=advice):
        make_trainer(RedundancyMonitor(2), max_steps=3).fit(Foreign(), stateful(), val_loader(), ckpt_path=path)
    for own, loaded in ([ExactResume()], Foreign()), ([RedundancyMonitor(2)], bypassed()):
        make_trainer(*own, max_steps=3).fit(loaded, stateful(), val_loader(), ckpt_path=path)
        assert ls.bypassed_sublayers(loaded) == ls.bypassed_sublayers(module) != ()


def test_checkpoint_of_causal_lm_bypassed_by_hand_holds_one_mark(make_trainer, tmp_path, text_data):
    """Which notes its structure by itself, and knows of no callbacks."""
    path, module = tmp_path / "bypassed.ckpt", causal_lm()
    keys = set(module.state_dict())
    ls.bypass(module, ls.find_sublayers(module)[:2])
    make_trainer(Report(), Save(path, 2), max_steps=2).fit(module, datamodule=text_data())
    (mark,) = unmarked(torch.load(path)["state_dict"]).keys() - keys
    assert "or put ExactResume among" in mark


def test_hooks_set_on_the_module_instance_are_called_and_come_back(make_trainer, tmp_path):
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
    """Holds a teacher beside the model, and names neither."""

    def __init__(self):
        super().__init__()
        self.teacher = Foreign().net.requires_grad_(False)


@pytest.mark.parametrize(
    "watcher", [lambda: RedundancyMonitor(9, transformer="teacher"), Report], ids=["RedundancyMonitor", "Report"]
)
def test_watcher_of_one_of_two_transformers_leaves_the_other_alone(make_trainer, tmp_path, watcher):
    """A bypass in the other one stays the user's own business, and is never put into the wrong one."""
    path, module = tmp_path / "two.ckpt", Two()
    ls.bypass(module.net, ls.find_sublayers(module.net)[:2])
    fit_foreign(make_trainer(watcher(), Save(path, 2), max_steps=2), module)
    assert CHECKPOINT_KEY not in torch.load(path)
    with pytest.raises(RuntimeError, match=r"net\.model\.layers\.0\.mlp\.dropped"):
        make_trainer(watcher()).validate(Two(), val_loader(), ckpt_path=path, verbose=False)
    loaded = Two()
    ls.bypass(loaded.net, ls.find_sublayers(loaded.net)[:2])
    make_trainer(watcher()).validate(loaded, val_loader(), ckpt_path=path, verbose=False)
    assert ls.bypassed_sublayers(loaded.teacher) == ()


def test_weight_average_copies_a_module_with_structure_hooks(make_trainer, tmp_path):
    path = tmp_path / "averaged.ckpt"
    trainer = make_trainer(ExactResume(), EMAWeightAveraging(decay=0.5), Save(path, 3), max_steps=4)
    module = fit_foreign(trainer)
    assert torch.load(path)["state_dict"].keys() == module.state_dict().keys()


@pytest.mark.filterwarnings(OTHERS)
def test_checkpoint_of_a_drop_is_refused_without_sublayer_drop(make_trainer, tmp_path):
    """Which has taken parameters out of the optimizer."""
    path = tmp_path / "dropped.ckpt"
    fit_foreign(make_trainer(SublayerDrop(2, count=1, quality_batches=0), Save(path, 3), max_steps=4))
    with pytest.raises(RuntimeError, match=r"is dropped; load with .* or put SublayerDrop among the callbacks"):
        make_trainer(RedundancyMonitor(2)).fit(Foreign(), loader(), val_loader(), ckpt_path=path)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("watcher", WATCHERS)
def test_bypass_by_hand_within_a_watched_run_marks_checkpoints_of_the_weights_alone(make_trainer, tmp_path, watcher):
    """Which Lightning writes without asking a callback."""

    def at_step_2(trainer, module):
        if trainer.global_step == 2:
            ls.bypass(module, ls.find_sublayers(module)[:1])

    saving = ModelCheckpoint(tmp_path, save_weights_only=True, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = make_trainer(Watch(at_step_2), WATCHERS[watcher](), saving, enable_checkpointing=True, max_steps=3)
    module = fit_foreign(trainer)
    noted = {step: CHECKPOINT_KEY in torch.load(tmp_path / f"step={step}.ckpt") for step in (1, 2, 3)}
    assert noted == {1: False, 2: True, 3: True}
    with pytest.raises(RuntimeError, match=r"layershed: attention\.0 is dropped"):
        Foreign().load_state_dict(torch.load(tmp_path / "step=3.ckpt")["state_dict"])
    assert len(ls.bypassed_sublayers(module)) == 1
