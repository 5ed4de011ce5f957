"""A contract test for each private part of Lightning that layershed uses: it fails by name when Lightning changes."""

import ast
import importlib
import inspect
import itertools
import pkgutil
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping, ModelCheckpoint, ModelPruning
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.data import extract_batch_size
from torch.utils.data import RandomSampler
from transformers import BatchEncoding

import layershed.callbacks
from layershed.integration import lightning_private as private
from layershed.integration.namespaces import own
from layershed.integration.own_record import shown_metrics
from tests.support.killed import EPOCH, plain, stateful
from tests.support.runs import Foreign, Save, fit_foreign, val_loader
from tests.support.versions import EXACT_RESUME_REFUSES

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
ROOT = Path(__file__).parents[2]


class At(pl.Callback):
    """Calls a function in one hook, and keeps its results."""

    def __init__(self, hook, ask):
        self.ask, self.found = ask, []
        setattr(self, hook, self.called)

    def called(self, trainer, *_, **__):
        self.found.append(self.ask(trainer))


@pytest.fixture
def asked(make_trainer):
    """What a function says at every call of a hook of a fit over two epochs."""
    numbers = itertools.count()

    def go(hook, ask, train=stateful, **settings):
        at = At(hook, ask)
        trainer = make_trainer(at, csv=True, name=f"fit-{next(numbers)}", **{"max_steps": 2 * EPOCH, **settings})
        fit_foreign(trainer, train=train())
        return at.found

    return go


def test_wraps_checkpoint_io_recognizes_wrapped_plugins():
    assert private.wraps_checkpoint_io(AsyncCheckpointIO())
    assert not private.wraps_checkpoint_io(TorchCheckpointIO())


def test_replace_wrapped_checkpoint_io_sets_the_inner_plugin():
    wrapper, inner = AsyncCheckpointIO(TorchCheckpointIO()), TorchCheckpointIO()
    private.replace_wrapped_checkpoint_io(wrapper, inner)
    assert wrapper.checkpoint_io is inner


@pytest.mark.parametrize("shards", [True, False])
def test_saves_shards_equals_the_strategys_setting(shards):
    assert private.saves_shards(ModelParallelStrategy(save_distributed_checkpoint=shards)) is shards


def test_tensor_parallel_size_equals_the_strategys_setting():
    assert private.tensor_parallel_size(ModelParallelStrategy()) == "auto"
    assert private.tensor_parallel_size(ModelParallelStrategy(tensor_parallel_size=2)) == 2


def test_raw_optimizer_unwraps_lightnings_optimizer(asked):
    (found,) = asked(
        "on_fit_end", lambda trainer: private.raw_optimizer(trainer.lightning_module.optimizers()), max_steps=1
    )
    assert type(found) is torch.optim.AdamW
    assert private.raw_optimizer(found) is found


def test_wrapped_sampler_finds_the_sampler_inside_a_distributed_one():
    sampler = RandomSampler(range(4))
    assert private.wrapped_sampler(DistributedSamplerWrapper(sampler, num_replicas=2, rank=0)) is sampler
    assert private.wrapped_sampler(sampler) is None


def test_checkpoint_interval_equals_the_settings_of_model_checkpoint(tmp_path):
    assert private.checkpoint_interval(ModelCheckpoint(tmp_path, every_n_train_steps=3)) == (3, 0)
    assert private.checkpoint_interval(ModelCheckpoint(tmp_path, every_n_epochs=2)) == (0, 2)
    assert private.checkpoint_interval(ModelCheckpoint(tmp_path)) == (0, 1)


@pytest.mark.parametrize("after_training", [True, False])
def test_saves_after_train_epoch_equals_the_setting_of_model_checkpoint(make_trainer, tmp_path, after_training):
    saving = ModelCheckpoint(tmp_path, save_on_train_epoch_end=after_training)
    assert private.saves_after_train_epoch(saving, make_trainer()) is after_training


@pytest.mark.parametrize("after_training", [True, False])
def test_checks_after_train_epoch_equals_the_setting_of_early_stopping(after_training):
    assert (
        private.checks_after_train_epoch(EarlyStopping("x", check_on_train_epoch_end=after_training)) is after_training
    )


def test_header_rewrite_is_replaced_and_given_back(tmp_path):
    logger, asked = CSVLogger(tmp_path, name="", version=0), []
    private.replace_header_rewrite(logger.experiment, lambda names: asked.append(list(names)))
    for step, metrics in enumerate(({"a": 1.0}, {"a": 2.0, "b": 3.0})):
        logger.log_metrics(metrics, step=step)
        logger.save()
    assert len(asked) == 1
    assert set(asked[0]) == {"a", "b", "step"}
    private.give_back_header_rewrite(logger.experiment)
    assert "_rewrite_with_new_header" not in vars(logger.experiment)


def test_set_up_train_loader_makes_the_train_dataloader(asked):
    def ask(trainer):
        before = trainer.train_dataloader
        private.set_up_train_loader(trainer)
        return before, trainer.train_dataloader is not None

    assert asked("on_fit_start", ask, max_steps=1) == [(None, True)]


def test_set_up_val_loaders_makes_the_val_dataloaders(asked):
    def ask(trainer):
        before = trainer.val_dataloaders
        private.set_up_val_loaders(trainer)
        return before, trainer.val_dataloaders is not None

    assert asked("on_fit_start", ask, max_steps=1) == [(None, True)]


def test_on_device_applies_the_transfer_hooks_of_the_module(make_trainer):
    class Hooked(Foreign):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return {"before": batch["input_ids"], "number": dataloader_idx}

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return {**batch, "after": batch["before"] + 1}

        def training_step(self, batch, batch_idx):
            return super().training_step({"input_ids": batch["before"]}, batch_idx)

    ask = At("on_train_batch_end", lambda trainer: private.on_device(trainer, {"input_ids": torch.arange(3)}))
    make_trainer(ask, max_steps=1, limit_val_batches=0).fit(Hooked(), stateful(), val_loader())
    (found,) = ask.found
    assert found["number"] == 0
    assert torch.equal(found["after"], torch.arange(1, 4))


def test_rows_of_equals_the_batch_size_of_lightnings_public_function():
    tensor = torch.zeros(3, 2)
    for batch in (tensor, {"text": ["a"], "ids": tensor}, [torch.tensor(1), tensor], BatchEncoding({"ids": tensor})):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert private.rows_of(batch) == extract_batch_size(batch)
    assert private.rows_of({"text": ["a"]}) == 1


def test_shown_metrics_are_live(make_trainer):
    def ask(trainer):
        shown = shown_metrics(trainer)
        for name, metrics in zip(("callback_metrics", "logged_metrics"), shown, strict=True):
            metrics["mark"] = torch.tensor(1.0)
            assert getattr(trainer, name)["mark"] == 1
            del metrics["mark"]
            assert "mark" not in getattr(trainer, name)

    at = At("on_train_batch_end", ask)
    fit_foreign(make_trainer(at, max_steps=2))
    assert at.found == [None, None]


def test_train_loaders_are_found_and_stateful_ones_recognized(asked):
    def ask(trainer):
        return [private.is_stateful(loader) for loader in private.train_loaders(trainer)]

    assert asked("on_fit_start", ask, max_steps=1) == [[]]
    assert asked("on_train_start", ask, max_steps=1) == [[True]]
    assert asked("on_train_start", ask, plain, max_steps=1) == [[False]]


def test_load_loader_states_moves_the_train_loader(make_trainer, tmp_path):
    """Set up early, which Lightning then leaves at its start."""
    path = tmp_path / "4.ckpt"
    fit_foreign(make_trainer(Save(path, 4), max_steps=4), train=stateful())
    early = At("setup", lambda trainer: private.set_up_train_loader(trainer))
    load = At("on_train_start", lambda trainer: private.load_loader_states(trainer))
    position = At("on_train_start", lambda trainer: private.train_loaders(trainer)[0].state_dict()["_num_yielded"])
    trainer = make_trainer(early, load, position, max_steps=5)
    trainer.fit(Foreign(), stateful(), val_loader(), ckpt_path=path)
    assert position.found == [4]


def test_set_up_resumed_train_loader_leaves_its_position_to_load_loader_states(make_trainer, tmp_path):
    path = tmp_path / "4.ckpt"
    fit_foreign(make_trainer(Save(path, 4), max_steps=4), train=stateful())

    trainer, found = make_trainer(max_steps=5), []

    def positions():
        found.append([loader.state_dict()["_num_yielded"] for loader in private.train_loaders(trainer)])

    def run():
        private.give_back_loop_methods(trainer.fit_loop, ["run"])
        private.set_up_resumed_train_loader(trainer)
        positions()
        private.load_loader_states(trainer)
        positions()
        trainer.fit_loop.run()

    private.replace_loop_method(trainer.fit_loop, "run", run)
    trainer.fit(Foreign(), stateful(), val_loader(), ckpt_path=path)
    assert found == [[0], [4]]


def test_finetuning_groups_are_those_that_backbone_finetuning_saves(make_trainer, tmp_path):
    class Unfreezing(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.net.model.layers[0])

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net.model.layers[0], optimizer)

    class Filtered(Foreign):
        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])

    path = tmp_path / "late.ckpt"
    trainer = make_trainer(Unfreezing(), Save(path, EPOCH + 1), max_steps=EPOCH + 1)
    module = fit_foreign(trainer, Filtered(), train=stateful())
    groups = private.finetuning_groups(torch.load(path, weights_only=False))
    names = {name for group in groups for name in group["params"]}
    assert len(groups) == 2
    assert names == {name for name, _ in module.named_parameters()}


@pytest.mark.parametrize(("permanent", "lasting"), [(False, True), (True, False)])
def test_lasting_masks_are_those_that_model_pruning_leaves_after_training(make_trainer, permanent, lasting):
    module = Foreign()
    layer = module.net.model.layers[0].mlp.up_proj
    pruning = ModelPruning("l1_unstructured", [(layer, "weight")], amount=0.5, make_pruning_permanent=permanent)
    fit_foreign(make_trainer(pruning, max_epochs=1), module)
    assert private.lasting_masks(pruning) == ([(layer, "weight")] if lasting else [])
    assert hasattr(layer, "weight_mask") == lasting


def test_progress_functions_agree_within_and_between_epochs(asked):
    def ask(trainer):
        return (
            private.epoch_in_progress(trainer),
            private.between_epochs(trainer),
            private.batches_done(trainer),
            private.batch_has_ended(trainer),
            private.last_batch_reached(trainer),
        )

    within = asked("on_train_batch_end", ask)
    assert within[2] == (0, False, 3, False, False)
    assert within[EPOCH - 1] == (0, False, None, False, True)
    assert within[EPOCH] == (1, False, 1, False, False)
    ends = asked("on_train_epoch_end", ask)
    assert [found[:2] for found in ends] == [(1, True), (2, True)]
    assert ends[0][3]


def test_validation_is_due_at_every_check_interval(asked):
    due = asked("on_train_batch_end", private.validation_is_due, val_check_interval=2)
    assert due == [False, True] * EPOCH


def test_logged_step_counts_batches_that_stepped(asked):
    assert asked("on_train_batch_end", private.logged_step, max_steps=3, accumulate_grad_batches=2) == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]


def test_row_to_come_lists_the_metrics_of_the_next_logged_row(asked):
    def ask(trainer):
        return sorted(private.row_to_come(trainer))

    assert asked("on_train_batch_end", ask, max_steps=2) == [["train_loss"]] * 2
    assert asked("on_train_batch_end", ask, max_steps=2, log_every_n_steps=2) == [[], ["train_loss"]]
    assert asked("on_train_batch_end", ask, max_steps=1, accumulate_grad_batches=2) == [[], ["train_loss"]]


def test_announced_validation_is_run_when_lightning_resumes(make_trainer, tmp_path):
    """Which it leaves out of a checkpoint that was written at the end of the batch before it."""
    path = tmp_path / "6.ckpt"

    def save(trainer):
        if trainer.global_step == EPOCH and not path.exists():
            trainer.save_checkpoint(path)

    fit_foreign(make_trainer(At("on_train_batch_end", save), max_steps=EPOCH), train=stateful())
    steps = {}
    for announced in (False, True):
        checkpoint = torch.load(path, weights_only=True)
        if announced:
            private.announce_validation(checkpoint)
        torch.save(checkpoint, path)
        validated = At("on_validation_end", lambda trainer: trainer.global_step)
        trainer = make_trainer(validated, max_steps=2 * EPOCH)
        trainer.fit(Foreign(), stateful(), val_loader(), ckpt_path=path)
        steps[announced] = validated.found
    assert steps == {False: [2 * EPOCH], True: [EPOCH, 2 * EPOCH]}


def test_saved_fit_loop_holds_the_positions_of_the_loaders(make_trainer, tmp_path):
    fit_foreign(make_trainer(Save(tmp_path / "at.ckpt", 2), max_steps=3), train=stateful())
    state = private.saved_fit_loop(torch.load(tmp_path / "at.ckpt", weights_only=True))
    assert len(state["combined_loader"]) == 1
    assert private.saved_fit_loop({"state_dict": {}}) == {}


def test_forget_validation_clears_the_loops_record(asked):
    def ask(trainer):
        loop = trainer.fit_loop.epoch_loop
        before = loop.val_loop._has_run
        private.forget_validation(trainer)
        return before, loop.val_loop._has_run

    assert asked("on_train_end", ask, max_steps=EPOCH) == [(True, False)]


def test_fit_loops_have_the_methods_that_are_replaced(make_trainer):
    trainer = make_trainer()
    names = ["run", "reset", "done", "on_run_start", "advance"]
    for loop in private.fit_loops(trainer):
        assert [name for name in names if not hasattr(type(loop), name)] == []
    assert private.fit_loops(trainer)[1] is not trainer.fit_loop


@pytest.mark.parametrize("name", ["run", "on_advance_start", "advance", "on_advance_end", "on_run_start", "reset"])
def test_replaced_loop_method_is_called_by_lightning_and_given_back(make_trainer, name):
    """For a method of the fit loop; each is called in a fit, and the class's own when it is given back."""
    trainer, called = make_trainer(max_steps=1), []

    def replacement():
        called.append(name)
        private.give_back_loop_methods(trainer.fit_loop, [name])
        getattr(trainer.fit_loop, name)()

    private.replace_loop_method(trainer.fit_loop, name, replacement)
    fit_foreign(trainer, train=stateful())
    assert called == [name]
    assert trainer.global_step == 1


@pytest.mark.skipif(not private.supports_exact_resume(), reason=EXACT_RESUME_REFUSES)
def test_steering_functions_use_only_attributes_of_the_loops(make_trainer):
    """Here every name is looked up; test_exact_resume.py tests the end of a resumed fit as a whole."""
    trainer = make_trainer(max_steps=1)
    fit_foreign(trainer, train=stateful())
    loop, batches = trainer.fit_loop, trainer.fit_loop.epoch_loop
    for owner, names in (
        (
            loop,
            ["restarting", "_restarting"],
        ),
        (type(loop), ["done", "skip"]),
        (loop, ["max_batches", "on_run_end", "on_advance_end", "_combined_loader"]),
        (batches, ["restarting", "_batches_that_stepped", "_should_accumulate", "reset"]),
        (batches.batch_progress, ["increment_completed", "is_last_batch", "current", "total"]),
        (type(trainer._logger_connector), ["epoch_end_reached", "should_update_logs", "metrics"]),
    ):
        for name in names:
            assert hasattr(owner, name), f"{type(owner).__name__}.{name}"
    assert not private.nothing_left_to_train(trainer)
    assert not private.resumes_training(trainer)
    assert not private.epoch_is_open(trainer)
    private.begin_epoch_anew(trainer)
    assert not loop.restarting


def test_trainer_of_a_module_is_found_once_attached(make_trainer):
    module, trainer = Foreign(), make_trainer(max_steps=1)
    assert private.trainer_of(module) is None
    fit_foreign(trainer, module)
    assert private.trainer_of(module) is trainer


# ---- no other file reaches them ----


def private_names():
    """Every private name of Lightning's classes around the Trainer: their methods, and what they set on themselves."""
    found = set()
    packages = ["callbacks", "loggers", "loops", "overrides", "plugins", "strategies", "trainer", "core"]
    names = own()
    places = [f"{names.pytorch}.{package}" for package in packages]
    for place in (*places, *(f"{names.fabric}.{package}" for package in ("loggers", "plugins", "strategies"))):
        root = importlib.import_module(place)
        for info in pkgutil.walk_packages(root.__path__, f"{root.__name__}."):
            if any(part in info.name for part in ("xla", "wandb", "mlflow", "comet", "neptune", "litlogger")):
                continue
            tree = ast.parse(Path(importlib.util.find_spec(info.name).origin).read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    found |= {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
                elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
                    found.add(node.attr)
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


UNDOCUMENTED = {"fit_loop", "epoch_loop", "val_loop", "batch_progress", "epoch_progress"}
DOCUMENTED = {"_generate_state_key"}  # Lightning's guide to stateful callbacks tells users to call it
OF_TORCH = {"_version"}  # counts the changes of a tensor in place; CSVLogger has an attribute of the same name


def reached(tree):
    """Names that a syntax tree reaches on another object: as an attribute, or as a string for getattr and vars."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not own or node.attr in UNDOCUMENTED:
                yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning"):
            yield from (f"lightning:{alias.name}" for alias in node.names)


def overridden_names(tree):
    """Methods of classes that a syntax tree defines: what they call on ``self`` may be Lightning's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            yield node.attr


def sources():
    """The files of the rooms that know Lightning; test_layout.py keeps it out of the others."""
    rooms = [ROOT / "callbacks", *(ROOT / "src" / "layershed" / room for room in ("integration", "training", "cli"))]
    for path in sorted(path for room in rooms for path in room.rglob("*.py")):
        if path.name != "lightning_private.py":
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def test_list_of_private_names_holds_those_of_loops_connectors_and_writers():
    assert {
        "_combined_loader",
        "_has_run",
        "_logger_connector",
        "_should_accumulate",
        "_rewrite_with_new_header",
        "_every_n_train_steps",
        "_checkpoint_io",
        "_save_distributed_checkpoint",
        "_teardown",
    } <= private_names()
    found = set(reached(ast.parse("trainer._teardown(); vars(loop)['_has_run']; self._mine; self.trainer.fit_loop")))
    assert {"_teardown", "_has_run", "fit_loop"} <= found
    assert "_mine" not in found


def test_no_file_but_lightning_private_reaches_a_private_name_of_lightning():
    names = private_names() | UNDOCUMENTED
    for path, tree in sources():
        found = {name for name in reached(tree) if name in names or name.startswith("lightning:_")}
        assert not found - DOCUMENTED - OF_TORCH, f"{path.relative_to(ROOT)} reaches {sorted(found)}"


def test_no_callback_calls_a_private_method_that_it_inherits():
    for name in layershed.callbacks.__all__:
        kind = getattr(layershed.callbacks, name)
        tree = ast.parse(inspect.getsource(inspect.getmodule(kind)))
        inherited = {attribute for attribute in dir(pl.Callback) if attribute.startswith("_") and attribute[1] != "_"}
        assert set(overridden_names(tree)) & inherited <= DOCUMENTED, name
