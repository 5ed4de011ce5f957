"""SublayerDrop with linear maps and searches: what trains on, what a resumed run gives, and what is refused."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import layershed as ls
from layershed.callbacks import LoRARecovery, SublayerDrop
from layershed.errors import SelectionError, UnknownNameError
from layershed.integration.loaders import calibration_batches
from tests.support.drop_runs import outcome, refused
from tests.support.runs import Foreign, Watch, fit_foreign, loader, same, val_loader


def drop_of(**options):
    return SublayerDrop(
        6, **{"count": 3, "calibration_batches": 4, "quality_batches": 2, "replace": "linear", **options}
    )


def test_the_maps_of_a_drop_are_those_of_the_function(make_trainer):
    """On the weights of that step and the first batches of the train loader."""
    seen = {}

    class Before(Watch):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 6:
                seen["model"] = copy.deepcopy(pl_module.net)
                seen["batches"] = list(calibration_batches(trainer, "train"))[:4]

    class After(Watch):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 6:
                seen["maps"] = {s: copy.deepcopy(each) for s, each in ls.linear_maps(pl_module.net).items()}

    drop = drop_of()
    fit_foreign(make_trainer(Before(None), drop, After(None), max_steps=7))
    expected = ls.fit_linear_maps(seen["model"], seen["batches"], drop.plan)
    assert expected.keys() == seen["maps"].keys() == set(drop.plan)
    for sublayer, linear_map in expected.items():
        assert torch.equal(seen["maps"][sublayer].up.weight, linear_map.up.weight)
    assert {each.action for each in drop.plan.drops} == {"linear"}


@pytest.mark.parametrize("recovery", [None, "lora"])
def test_the_maps_train_on_and_the_hidden_weights_do_not(make_trainer, recovery):
    seen = {}

    class AtTheDrop(Watch):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 6:
                seen.update({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    drop = drop_of()
    extra = [LoRARecovery(finish="merge")] if recovery else []
    module = fit_foreign(make_trainer(drop, *extra, AtTheDrop(None), max_steps=10, **{"name": str(recovery)}))
    now = dict(module.named_parameters())
    for sublayer in drop.plan:
        own = [name for name in now if name.startswith(f"net.{sublayer.path}.")]
        maps = [name for name in own if "linear_stand_in" in name]
        assert len(maps) == 2
        assert all(not torch.equal(now[name], seen[name]) for name in maps if name in seen)
        assert all(torch.equal(now[name], seen[name]) for name in set(own) - set(maps) if name in seen)


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.parametrize("options", [{"replace": "linear", "rank": 4}, {"method": "best"}])
def test_a_resumed_run_equals_the_uninterrupted_one(make_trainer, tmp_path, options):
    """Resumed at an epoch's end: before the drop, and after it."""

    def run(name, ckpt_path=None):
        drop = SublayerDrop(9, count=2, calibration_batches=3, quality_batches=2, **options)
        module = Foreign(steps=24)
        every = ModelCheckpoint(
            tmp_path / f"{name}-ckpt", filename="{step}", save_top_k=-1, save_on_train_epoch_end=True
        )
        trainer = make_trainer(drop, every, name=name, csv=True, enable_checkpointing=True, max_steps=14)
        trainer.fit(module, loader(), val_loader(), ckpt_path=ckpt_path)
        return outcome(trainer, module, drop)

    whole = run("whole")
    for at in (6, 12):
        assert same(run(f"resumed-{at}", ckpt_path=tmp_path / "whole-ckpt" / f"step={at}.ckpt"), whole)


def test_the_best_method_searches_and_replaces(make_trainer):
    drop = SublayerDrop(3, count=2, calibration_batches=3, quality_batches=2, method="best")
    module = fit_foreign(make_trainer(drop, max_steps=5))
    assert set(ls.linear_maps(module.net)) == set(drop.plan)
    assert drop.plan.metric == "kl"
    assert drop.scored == []


def test_a_checkpoint_loads_into_a_new_module_with_its_maps(make_trainer, tmp_path):
    drop = drop_of()
    trainer = make_trainer(drop, max_steps=8)
    module = fit_foreign(trainer)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fresh = Foreign()
    ls.load_checkpoint(fresh, tmp_path / "last.ckpt")
    ids = next(iter(val_loader()))["input_ids"]
    assert torch.equal(fresh.net.eval()(ids).logits, module.net.eval()(ids).logits)
    assert set(ls.linear_maps(fresh.net)) == set(drop.plan)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"metric": "kl", "count": None, "target_speedup": 1.1}, SelectionError, "Give count or ratio"),
        ({"search": "greedy"}, SelectionError, "Choose kl or loss"),
        ({"replace": None, "rank": 3}, SelectionError, "Set replace='linear'"),
        ({"method": "bst"}, UnknownNameError, "best"),
        ({"method": "best", "metric": "angular"}, SelectionError, "sets metric itself"),
    ],
)
def test_methods_that_cannot_be_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        drop_of(**options)


def test_damage_of_a_model_without_a_head_is_refused_before_training(make_trainer):
    class Body(Foreign):
        def __init__(self):
            super().__init__()
            self.net = self.net.model
            self.head = torch.nn.Linear(32, 97)

        def loss(self, batch):
            logits = self.head(self.net(input_ids=batch["input_ids"]).last_hidden_state)
            return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    refused(
        make_trainer,
        lambda: SublayerDrop(3, count=1, metric="kl"),
        ls.LayershedError,
        "does not predict the next token",
        module=Body(),
    )


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_recovery_of_stand_ins_trains_the_maps_alone_and_resumes_exactly(make_trainer, tmp_path):
    def run(name, ckpt_path=None):
        drop, module = drop_of(), Foreign(steps=24)
        every = ModelCheckpoint(
            tmp_path / f"{name}-ckpt", filename="{step}", save_top_k=-1, save_on_train_epoch_end=True
        )
        recovery = LoRARecovery(mode="stand_ins")
        trainer = make_trainer(drop, recovery, every, name=name, csv=True, enable_checkpointing=True, max_steps=15)
        trainer.fit(module, loader(), val_loader(), ckpt_path=ckpt_path)
        return trainer, module, outcome(trainer, module, drop)

    trainer, module, whole = run("whole")
    maps = {id(p) for each in ls.linear_maps(module.net).values() for p in each.parameters()}
    assert {id(p) for p in module.parameters() if p.requires_grad} == maps
    assert {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]} == maps
    at_the_drop = torch.load(tmp_path / "whole-ckpt" / "step=6.ckpt", weights_only=True)["state_dict"]
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, at_the_drop[name]) == (id(parameter) not in maps)
    _, _, resumed = run("resumed", ckpt_path=tmp_path / "whole-ckpt" / "step=12.ckpt")
    assert same(resumed, whole)


def test_recovery_of_stand_ins_without_maps_is_refused_before_training(make_trainer):
    trainer = make_trainer(SublayerDrop(3, count=1, quality_batches=0), LoRARecovery(mode="stand_ins"))
    with pytest.raises(ls.LayershedError, match="there is no linear map to train"):
        fit_foreign(trainer)
    assert trainer.global_step == 0


def test_a_drop_with_folds_is_that_of_the_functions(make_trainer):
    seen = {}

    class Before(Watch):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 3:
                seen["model"] = copy.deepcopy(pl_module.net)
                seen["batches"] = list(calibration_batches(trainer, "train"))[:4]

    class After(Watch):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 3:
                seen["after"] = copy.deepcopy(pl_module.net.state_dict())

    drop = SublayerDrop(3, count=2, calibration_batches=4, quality_batches=1, replace="fold")
    fit_foreign(make_trainer(Before(None), drop, After(None), max_steps=4))
    ls.bypass(seen["model"], drop.plan)
    ls.compensate(seen["model"], seen["batches"])
    expected = seen["model"].state_dict()
    assert all(torch.equal(value, seen["after"][name]) for name, value in expected.items())
    assert {each.action for each in drop.plan.drops} == {"bypass"}


@pytest.mark.parametrize("options", [{"replace": "linear"}, {"replace": "fold"}, {"method": "best"}])
def test_a_loader_that_cannot_be_read_twice_is_refused_before_training(make_trainer, options):
    refused(
        make_trainer,
        lambda: SublayerDrop(3, count=1, **options),
        ls.LayershedError,
        "needs a DataLoader over a map-style dataset",
        train=list(loader()),
    )
