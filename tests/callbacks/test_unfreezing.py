"""Dropped weights, and the base under LoRA, stay frozen when callbacks and hooks unfreeze a model during a run."""

from itertools import product

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torchdata.stateful_dataloader import StatefulDataLoader

from layershed.errors import CheckpointError
from layershed.recovery.lora import adapted_modules
from layershed.stand_ins.record import overridden
from layershed.surgery import bypassed_sublayers, restore
from tests.support.finetuned import Backbone, Blockwise
from tests.support.lora_runs import dropping, recovery
from tests.support.runs import BATCH, fit_foreign, same, sequences, state_of

EPOCH = 6  # steps; the loader of fit_foreign holds as many batches
UNFROZEN_AT, STEPS = 2 * EPOCH, 3 * EPOCH + 2

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
    pytest.mark.filterwarnings("ignore:.*already exist within another group:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*were made trainable while it trains adapters:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]


class ByHook(Backbone):
    """Unfreezes by a hook of its own; a resumed run must not need the hook a second time."""

    def __init__(self, hook, whole):
        super().__init__()
        self.hook, self.whole = hook, whole
        self.backbone.requires_grad_(False)

    def configure_optimizers(self):
        parameters = self.parameters() if self.whole else self.head.parameters()
        return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)

    def unfreeze(self, hook):
        if hook == self.hook and self.trainer.global_step == UNFROZEN_AT:
            self.backbone.requires_grad_(True)
            if not self.whole:
                held = {id(p) for group in self.trainer.optimizers[0].param_groups for p in group["params"]}
                new = [p for p in self.backbone.parameters() if id(p) not in held]
                self.trainer.optimizers[0].add_param_group({"params": new, "lr": 1e-3})

    def on_train_epoch_start(self):
        self.unfreeze("on_train_epoch_start")

    def on_train_epoch_end(self):
        self.unfreeze("on_train_epoch_end")

    def on_train_batch_start(self, batch, batch_idx):
        self.unfreeze("on_train_batch_start")

    def on_before_zero_grad(self, optimizer):
        self.unfreeze("on_before_zero_grad")


def backbone_finetuning():
    return BackboneFinetuning(unfreeze_backbone_at_epoch=2, backbone_initial_lr=1e-3, lambda_func=lambda _: 1.5)


class Frozen(pl.Callback):
    """Checks, as the last callback, that dropped weights take part in no step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for module, _ in overridden(pl_module):
            for parameter in module.parameters():
                assert not parameter.requires_grad
                assert id(parameter) not in held
        for layer in adapted_modules(pl_module).values():
            for name, parameter in layer.base_layer.named_parameters():
                assert not parameter.requires_grad, name
                assert id(parameter) not in held, name


def run(make_trainer, folder, callbacks, module, ckpt_path=None, steps=STEPS):
    """Its last state. It writes a checkpoint after every step, and one at the end of every epoch."""
    savers = [
        ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1),
        ModelCheckpoint(folder, filename="end-{step}", save_top_k=-1, save_on_train_epoch_end=True),
    ]
    trainer = make_trainer(*callbacks, Frozen(), *savers, enable_checkpointing=True, max_steps=steps)
    trainer.fit(module, StatefulDataLoader(sequences(BATCH * EPOCH), batch_size=BATCH), ckpt_path=ckpt_path)
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return {"state": state_of(trainer, module), "trainable": trainable, "dropped": bypassed_sublayers(module)}


def both_orders(make_drop, make_other):
    return {
        "drop first": lambda: [*make_drop(), make_other()],
        "drop last": lambda: [make_other(), *make_drop()],
    }


FINETUNING = {"backbone": backbone_finetuning, "blockwise": Blockwise}
ORDERS = ("drop first", "drop last")
DROPS = {
    "drop before": lambda: [dropping(4)],
    "drop after": lambda: [dropping(15)],
    "rounds on both sides": lambda: [dropping(8, count=1, every_n_steps=7, rounds=2)],
    "LoRA before": lambda: [dropping(4), recovery(finish="adapter")],
    "LoRA after": lambda: [dropping(15), recovery(finish="adapter")],
    "drop before and LoRA after": lambda: [dropping(4), recovery(start=15, finish="adapter")],
    "full recovery": lambda: [dropping(4), recovery(mode="full", lr_factor=0.5)],
}


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    ("finetuning", "drop", "order"),
    [
        ("backbone", "rounds on both sides", "drop last"),
        ("blockwise", "LoRA before", "drop first"),
        *(pytest.param("backbone", *others, marks=pytest.mark.slow) for others in product(DROPS, ORDERS)),
        *(pytest.param("blockwise", *others, marks=pytest.mark.slow) for others in product(DROPS, ORDERS)),
    ],
)
def test_run_with_an_unfreezing_callback_keeps_dropped_weights_out_and_resumes(
    make_trainer, tmp_path, finetuning, drop, order
):
    """Frozen checks every step; the resumed runs start before and after the unfreezing and the drop."""
    make = both_orders(DROPS[drop], FINETUNING[finetuning])[order]
    start, folder = Backbone(), tmp_path / "whole"
    dense = {name: value.clone() for name, value in start.state_dict().items()}
    whole = run(make_trainer, folder, make(), start)
    assert whole["dropped"]
    if "before" in drop and "LoRA" not in drop:  # dropped while frozen, so never trained
        for module, _ in overridden(start):
            path = next(name for name, other in start.named_modules() if other is module)
            assert all(torch.equal(p, dense[f"{path}.{name}"]) for name, p in module.named_parameters())
    lora = drop in ("LoRA before", "LoRA after", "drop before and LoRA after")
    trained = [name for name in whole["trainable"] if name.startswith("backbone.")]
    assert trained
    assert all("lora_" in name for name in trained) == lora
    for name in ("step=5", "end-step=12", "step=16"):
        resumed = run(make_trainer, tmp_path / "again", make(), Backbone(), folder / f"{name}.ckpt")
        assert same(resumed, whole), name


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    ("hook", "whole", "drop"),
    [
        ("on_train_epoch_end", False, "LoRA before"),
        ("on_train_batch_start", True, "drop before"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in product(
                ("on_train_epoch_end", "on_train_epoch_start", "on_train_batch_start", "on_before_zero_grad"),
                (False, True),
                ("LoRA before", "drop before"),
            )
        ),
    ],
)
def test_hook_of_the_module_that_unfreezes_leaves_dropped_weights_frozen_and_resumes(
    make_trainer, tmp_path, hook, whole, drop
):
    module = ByHook(hook, whole)
    uninterrupted = run(make_trainer, tmp_path / "whole", DROPS[drop](), module)
    assert uninterrupted["trainable"] > {"head.weight", "head.bias"}
    path = tmp_path / "whole" / ("end-step=12.ckpt" if hook == "on_train_epoch_end" else "step=14.ckpt")
    resumed = run(make_trainer, tmp_path / "again", DROPS[drop](), ByHook("none", whole), path)
    assert same(resumed, uninterrupted)


def test_base_that_is_unfrozen_under_lora_gives_one_warning_and_stays_as_it_was(make_trainer, tmp_path):
    module = Backbone()
    drops = [dropping(4), recovery(finish="adapter")]
    with pytest.warns(UserWarning, match="LoRARecovery: .* made trainable while it trains adapters") as caught:
        run(make_trainer, tmp_path, [*drops, Blockwise()], module)
    assert len([w for w in caught if "while it trains adapters" in str(w.message)]) == 1
    base = Backbone().state_dict()
    for path, layer in adapted_modules(module).items():
        assert torch.equal(layer.base_layer.weight, base[f"{path}.weight"])


def test_sublayer_dropped_while_frozen_is_trainable_once_it_is_restored_after_the_unfreezing(make_trainer, tmp_path):
    module = Backbone()
    run(make_trainer, tmp_path, [dropping(4), backbone_finetuning()], module)
    dropped = [parameter for carrier, _ in overridden(module) for parameter in carrier.parameters()]
    assert not any(parameter.requires_grad for parameter in dropped)
    restore(module)
    assert all(parameter.requires_grad for parameter in dropped)


def test_merge_makes_the_base_trainable_that_was_unfrozen_under_lora(make_trainer, tmp_path):
    module = Backbone()
    run(make_trainer, tmp_path, [dropping(4), recovery(), backbone_finetuning()], module)
    assert not adapted_modules(module)
    assert module.backbone.model.norm.weight.requires_grad


def test_run_in_which_nothing_is_unfrozen_notes_nothing(make_trainer, tmp_path):
    """So its checkpoints hold what they held before, and resuming with other frozen weights stays possible."""
    trainer = make_trainer(dropping(4), max_steps=8)
    fit_foreign(trainer)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert "layershed_trained" not in torch.load(tmp_path / "a.ckpt", weights_only=True)


def test_resuming_with_fewer_groups_than_the_run_began_with_is_refused(make_trainer, tmp_path):
    class Two(Backbone):
        def configure_optimizers(self):
            groups = [{"params": [self.head.weight]}, {"params": [self.head.bias], "lr": 1e-3}]
            return torch.optim.AdamW(groups, lr=1e-2)

    run(make_trainer, tmp_path / "two", [dropping(4), recovery()], Two(), steps=8)
    with pytest.raises(CheckpointError, match="parameter groups, but configure_optimizers made"):
        run(make_trainer, tmp_path / "one", [dropping(4), recovery()], Backbone(), tmp_path / "two" / "step=6.ckpt")


def test_weights_restored_by_hand_stay_trainable_when_a_checkpoint_is_saved(make_trainer, tmp_path):
    module = Backbone()
    module.backbone.requires_grad_(True)
    trainer = make_trainer(dropping(4), max_steps=8)
    trainer.fit(module, StatefulDataLoader(sequences(BATCH * EPOCH), batch_size=BATCH))
    assert not all(parameter.requires_grad for parameter in module.parameters())
    restore(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert all(parameter.requires_grad for parameter in module.parameters())
