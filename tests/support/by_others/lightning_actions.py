"""What Lightning's callbacks and checkpoints do in a module that knows nothing of layershed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn
from torch.optim.swa_utils import get_ema_avg_fn
from torch.utils.data import DataLoader

from tests.support.by_others.action import Table, action
from tests.support.by_others.world import Model, World, dense_model

ACTIONS: Table = {}
THREE = ("llama", "gpt2", "opt")


class Plain(LightningModule):
    """A user's module."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net: Any = dense_model(name)

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss: torch.Tensor = self.net(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)

    def forward(self, **inputs: torch.Tensor) -> Any:
        return self.net(**inputs)


class WithBackbone(Plain):
    """Where the model's transformer is the backbone."""

    @property
    def backbone(self) -> nn.Module:
        """The transformer without its head."""
        return self.net.base_model


def _fit(world: World, *callbacks: Callback, module: Plain | None = None, **options: Any) -> LightningModule:
    if module is None:
        module = Plain(world.name)
        module.net = world.model
    rows: Any = [{name: value[i] for name, value in world.batch.items()} for i in (0, 1)]
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=world.folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        max_epochs=2,
        callbacks=list(callbacks),
        **options,
    )
    module.net.train()
    trainer.fit(module, DataLoader(rows, batch_size=2))
    return module.eval()


@action(ACTIONS, "Lightning trains", THREE, trains=True, tolerance=1e-3)
def fit(world: World) -> Iterator[Model]:
    yield _fit(world)


@action(ACTIONS, "Lightning trains in bf16-mixed", THREE, trains=True, tolerance=0.05)
def fit_bf16(world: World) -> Iterator[Model]:
    yield _fit(world, precision="bf16-mixed")


@action(ACTIONS, "Lightning trains in bf16-true", THREE, trains=True, tolerance=0.05)
def fit_bf16_true(world: World) -> Iterator[Model]:
    yield _fit(world, precision="bf16-true")


@action(ACTIONS, "Lightning's ModelCheckpoint, load_from_checkpoint", THREE, moments=(0,), trains=True, tolerance=1e-3)
def checkpoint(world: World) -> Iterator[Model]:
    _fit(world, ModelCheckpoint(world.folder, filename="kept"))
    yield Plain.load_from_checkpoint(world.folder / "kept.ckpt", weights_only=True).eval()


@action(ACTIONS, "load_from_checkpoint(strict=False)", THREE, moments=(0,), trains=True, tolerance=1e-3)
def checkpoint_loosely(world: World) -> Iterator[Model]:
    _fit(world, ModelCheckpoint(world.folder, filename="kept"))
    yield Plain.load_from_checkpoint(world.folder / "kept.ckpt", strict=False, weights_only=True).eval()


@action(ACTIONS, "a Lightning checkpoint's weights, net. cut off", THREE, moments=(0,), trains=True, tolerance=1e-3)
def checkpoint_cut(world: World) -> Iterator[Model]:
    _fit(world, ModelCheckpoint(world.folder, filename="kept"))
    weights = torch.load(world.folder / "kept.ckpt", weights_only=True)["state_dict"]
    fresh = world.fresh()
    fresh.load_state_dict({key.removeprefix("net."): value for key, value in weights.items()})
    yield fresh


@action(ACTIONS, "Lightning's BackboneFinetuning", ("llama", "mixtral"), trains=True, tolerance=1e-3)
def finetuning(world: World) -> Iterator[Model]:
    module = WithBackbone(world.name)
    module.net = world.model
    callback = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01, verbose=False)
    if world.silent:
        module.training_step = _silenced(world, module)  # type: ignore[method-assign]
    yield _fit(world, callback, module=module)


def _silenced(world: World, module: Plain) -> Any:
    """Unfreezing unfreezes the reference's zeros, too, so they are made zero again in each step."""

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        world.stir(module, "no such name")
        return Plain.training_step(module, batch)

    return step


@action(ACTIONS, "Lightning's StochasticWeightAveraging", THREE, trains=True, tolerance=1e-3)
def swa(world: World) -> Iterator[Model]:
    yield _fit(world, StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1))


@action(ACTIONS, "Lightning's WeightAveraging", THREE, trains=True, tolerance=1e-3)
def averaging(world: World) -> Iterator[Model]:
    yield _fit(world, WeightAveraging(avg_fn=get_ema_avg_fn(0.9)))


@action(ACTIONS, "Lightning's ModelPruning", ("llama", "opt"), trains=True, tolerance=1e-3)
def pruning(world: World) -> Iterator[Model]:
    maps = [(m, "weight") for m in world.model.modules() if type(m) is nn.Linear and m.out_features != 97]
    yield _fit(
        world, ModelPruning("l1_unstructured", parameters_to_prune=maps, amount=0.3, use_global_unstructured=False)
    )


@action(ACTIONS, "LightningModule, its whole checkpoint saved by hand", THREE, moments=(0,))
def saved_by_hand(world: World) -> Iterator[Model]:
    module = Plain(world.name)
    module.net = world.model
    torch.save(module.state_dict(), world.folder / "weights.pt")
    other = Plain(world.name)
    other.load_state_dict(torch.load(world.folder / "weights.pt", weights_only=True))
    yield other.eval()
