"""Optimizers, schedules and callbacks of others beside a drop: right against zeroed branches, or refused."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.optim.swa_utils import AveragedModel
from torchdata.stateful_dataloader import StatefulDataLoader

import layershed as ls
from layershed.errors import OptimizerError, RecoveryError, ScheduleError
from layershed.recovery.lora import adapted_modules
from layershed.surgery import bypassed_sublayers
from tests.support.lora_runs import dropping, recovery, refused_at_start
from tests.support.models import build_model
from tests.support.runs import BATCH, Foreign, loader, logits_of, same, sequences, state_of, val_loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]


def zero(_module, _args, output):
    return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0


class Zeroed(pl.Callback):
    """The reference: after a step, branches give zero and their parameters have no gradient."""

    def __init__(self, step, plan):
        self.step, self.keys, self.frozen = step, [(s.block, s.kind) for s in plan], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for parameter in self.frozen:
            parameter.grad = None

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step < self.step or self.frozen:
            return
        for block, kind in self.keys:
            layer = pl_module.net.model.layers[block]
            branch = layer.mlp if kind == "mlp" else layer.self_attn
            norm = layer.post_attention_layernorm if kind == "mlp" else layer.input_layernorm
            branch.register_forward_hook(zero)
            self.frozen += [*branch.parameters(), *norm.parameters()]


def with_optimizer(configure):
    class Own(Foreign):
        def configure_optimizers(self):
            made = configure(self)
            return made if isinstance(made, dict) else {"optimizer": made}

    return Own


def each(module, only_trainable=False):
    """A group for each parameter."""
    own = (parameter for parameter in module.parameters() if parameter.requires_grad or not only_trainable)
    return [{"params": [parameter], "lr": 1e-2 * (1 + number % 3)} for number, parameter in enumerate(own)]


def scheduled(optimizer, make):
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), "interval": "step"}}


def factors(optimizer):
    return LambdaLR(optimizer, [lambda step, i=i: 1 / (1 + step * (i % 2)) for i in range(len(optimizer.param_groups))])


def one_cycle(optimizer):
    return OneCycleLR(optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=20)


OPTIMIZERS = {
    "a group per parameter, with lambdas": lambda m: scheduled(torch.optim.AdamW(each(m)), factors),
    "a group per trainable parameter": lambda m: torch.optim.AdamW(each(m, only_trainable=True)),
    "one cycle over groups": lambda m: scheduled(torch.optim.SGD(each(m), momentum=0.9), one_cycle),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-2),
    "SGD with momentum": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9, nesterov=True),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=1e-2),
    "fused": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True),
    "foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, foreach=True, amsgrad=True),
    "a tensor as rate": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(1e-2), foreach=False),
    "with names": lambda m: torch.optim.AdamW(m.named_parameters(), lr=1e-2),
}
FAST = ("a group per parameter, with lambdas", "a group per trainable parameter")


def run(make_trainer, folder, callbacks, module, ckpt_path=None, steps=6, **options):
    saving = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    trainer = make_trainer(*callbacks, saving, enable_checkpointing=True, max_steps=steps, **options)
    torch.manual_seed(7)
    trainer.fit(module, StatefulDataLoader(sequences(BATCH * 6), batch_size=BATCH), val_loader(), ckpt_path=ckpt_path)
    return trainer, module


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in OPTIMIZERS])
def test_optimizer_follows_the_drop_and_resumes(make_trainer, tmp_path, name, lora):
    make = with_optimizer(OPTIMIZERS[name])

    def own():
        return [dropping(3), *([recovery(finish="adapter")] if lora else [])]

    drops = own()
    trainer, module = run(make_trainer, tmp_path / "whole", drops, make())
    assert len(bypassed_sublayers(module)) == 3
    assert bool(adapted_modules(module)) == lora
    if not lora:
        _, zeroed = run(make_trainer, tmp_path / "zeroed", [Zeroed(3, drops[0].plan)], make())
        found = module.state_dict()
        for key, wanted in zeroed.state_dict().items():
            torch.testing.assert_close(found[key], wanted, rtol=1e-4, atol=1e-5)
    for step in (2, 3, 5):
        again, resumed = run(make_trainer, tmp_path / "again", own(), make(), tmp_path / "whole" / f"step={step}.ckpt")
        assert same(state_of(again, resumed), state_of(trainer, module)), step


def test_resumed_configure_optimizers_sees_the_model_that_the_run_began_with(make_trainer, tmp_path):
    seen = []

    def noting(module):
        seen.append([(name, parameter.requires_grad) for name, parameter in module.named_parameters()])
        return torch.optim.AdamW(module.parameters(), lr=1e-2)

    make = with_optimizer(noting)
    run(make_trainer, tmp_path, [dropping(3), recovery(finish="adapter")], make())
    _, module = run(make_trainer, tmp_path, [dropping(3), recovery(finish="adapter")], make(), tmp_path / "step=5.ckpt")
    assert seen[0] == seen[1]
    assert "configure_optimizers" not in vars(module)
    assert adapted_modules(module)


class Lookahead(torch.optim.AdamW):
    """Keeps slow weights in a list of its own."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=1e-2)
        self.slow = [[parameter.detach().clone() for parameter in group["params"]] for group in self.param_groups]


@pytest.mark.parametrize("make", [lambda: dropping(4), lambda: recovery(start=2)], ids=["drop", "LoRA"])
def test_optimizer_with_slow_weights_of_its_own_is_refused_before_the_first_step(make_trainer, make):
    module = with_optimizer(lambda m: Lookahead(m.parameters()))()
    refused_at_start(make_trainer(make()), module, OptimizerError, "slow holds a tensor for each parameter")


def test_lora_beside_an_average_inside_the_module_is_refused_before_the_first_step(make_trainer):
    module = Foreign()
    module.average = AveragedModel(module.net)
    drops = [dropping(4, transformer="net"), recovery(transformer="net")]
    refused_at_start(make_trainer(*drops), module, ScheduleError, "holds a copy of the model")


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("lora", [False, True])
def test_drop_and_lora_work_while_model_pruning_holds_masks(make_trainer, lora):
    """Masked weights stay zero, and merging comes after the masks were made permanent."""
    pruning = ModelPruning("l1_unstructured", amount=0.3, use_global_unstructured=True)
    module, own = Foreign(), [dropping(3), *([recovery()] if lora else [])]
    trainer = make_trainer(*own, pruning, max_epochs=3)
    trainer.fit(module, loader(2), val_loader())
    assert len(bypassed_sublayers(module)) == 3
    assert not any(name.endswith("weight_mask") for name in module.state_dict())
    if not lora:
        zeros = sum(int((p == 0).sum()) for p in module.parameters()) / sum(p.numel() for p in module.parameters())
        assert zeros > 0.3


def pruning(**options):
    return ModelPruning("l1_unstructured", amount=0.3, make_pruning_permanent=False, **options)


@pytest.mark.parametrize("first", [True, False])
def test_merge_into_weights_that_model_pruning_leaves_masked_is_refused_before_the_first_step(make_trainer, first):
    own = [dropping(4), recovery(target_modules=["up_proj"])]
    trainer = make_trainer(*([pruning(), *own] if first else [*own, pruning()]))
    refused_at_start(trainer, Foreign(), RecoveryError, r"layers.0.mlp.up_proj would still be masked when")


class EmbeddingOnly(ModelPruning):
    def filter_parameters_to_prune(self, parameters_to_prune=()):
        return [(module, name) for module, name in parameters_to_prune if isinstance(module, torch.nn.Embedding)]


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    ("finish", "make"),
    [
        ("adapter", pruning),
        ("merge", lambda: pruning(apply_pruning=False)),
        ("merge", lambda: EmbeddingOnly("l1_unstructured", amount=0.3, make_pruning_permanent=False)),
    ],
    ids=["keeps the adapter", "never prunes", "prunes other modules"],
)
def test_lasting_masks_that_no_merge_meets_are_left_alone(make_trainer, finish, make):
    module = Foreign()
    trainer = make_trainer(dropping(1), recovery(finish=finish), make(), max_epochs=2)
    trainer.fit(module, loader(2), val_loader())
    assert bool(adapted_modules(module)) == (finish == "adapter")


def reparametrized(how):
    model = build_model()
    layer = model.model.layers[1].mlp.up_proj
    if how == "pruned":
        prune.l1_unstructured(layer, "weight", amount=0.5)
    elif how == "old weight_norm":
        weight_norm(layer)
    else:
        parametrizations.weight_norm(layer)
    return model


@pytest.mark.default_cases(1)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("how", ["pruned", "old weight_norm", "parametrized"])
def test_lora_on_a_computed_weight_is_exact_and_its_merge_is_refused(make_trainer, how):
    """torch would compute the weight anew before the next forward pass, without the merged adapter."""
    model = reparametrized(how)
    before = logits_of(model)
    ls.inject_lora(model, rank=2)
    assert torch.equal(logits_of(model), before)
    for layer in adapted_modules(model).values():
        torch.nn.init.normal_(layer.lora_B["recovery"].weight)
    adapted = logits_of(model)
    with pytest.raises(RecoveryError, match=r"layers.1.mlp.up_proj is computed from other parameters"):
        ls.merge_lora(model)
    assert torch.equal(logits_of(model), adapted)
    ls.remove_lora(model)
    assert torch.equal(logits_of(model), before)
    module = Foreign()
    module.net = reparametrized(how).train()
    refused_at_start(make_trainer(dropping(4), recovery()), module, RecoveryError, "is computed from other parameters")
