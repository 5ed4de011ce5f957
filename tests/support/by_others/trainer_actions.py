"""What transformers' Trainer does: two steps of training, checkpoints, resuming, the best model, mixed precision."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from transformers import PreTrainedModel, Trainer, TrainingArguments

import layershed as ls
from tests.support.by_others.action import CAUSAL, Table, action
from tests.support.by_others.world import Model, World

ACTIONS: Table = {}


def _trainer(world: World, model: PreTrainedModel | None = None, **options: Any) -> Trainer:
    AcceleratorState._reset_state(reset_partial_state=True)
    rows = [{name: value[i] for name, value in world.batch.items()} for i in (0, 1)] * 4
    plain = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "learning_rate": 0.01, "seed": 0}
    plain |= {"per_device_train_batch_size": 2, "max_steps": 2, "save_strategy": "no", "dataloader_pin_memory": False}
    arguments = TrainingArguments(str(world.folder / "run"), **{**plain, **options})
    return Trainer(world.model if model is None else model, arguments, train_dataset=rows, eval_dataset=rows[:2])


def _checkpoint(world: World) -> Path:
    return world.folder / "run" / "checkpoint-2"


@action(ACTIONS, "Trainer trains", CAUSAL, trains=True, steps=2, tolerance=1e-3)
def train(world: World) -> Iterator[Model]:
    trainer = _trainer(world)
    yield world.model
    trainer.train()
    yield trainer.model.eval()


@action(ACTIONS, "Trainer trains in bfloat16", CAUSAL, trains=True, steps=3, tolerance=0.1)
def train_bf16(world: World) -> Iterator[Model]:
    trainer = _trainer(world, bf16=True)
    yield world.model
    trainer.train()
    yield trainer.model.eval()
    yield trainer.model


@action(ACTIONS, "Trainer.save_model, layershed loads", moments=(0,))
def save_model(world: World) -> Iterator[Model]:
    _trainer(world).save_model(str(world.folder / "saved"))
    yield ls.load_pretrained(world.folder / "saved")


@action(ACTIONS, "Trainer.save_model, transformers loads", ("llama", "opt", "bert"), moments=(0,))
def save_model_loaded(world: World) -> Iterator[Model]:
    _trainer(world).save_model(str(world.folder / "saved"))
    yield type(world.model).from_pretrained(world.folder / "saved")


@action(ACTIONS, "a Trainer checkpoint, layershed loads", CAUSAL, moments=(0, 1), steps=2, trains=True, tolerance=1e-3)
def checkpoint(world: World) -> Iterator[Model]:
    trainer = _trainer(world, save_strategy="steps", save_steps=2)
    yield world.model
    trainer.train()
    yield ls.load_pretrained(_checkpoint(world))


@action(
    ACTIONS, "Trainer resumes with the same model", ("llama", "opt"), trains=True, steps=2, moments=(0,), tolerance=1e-3
)
def resume(world: World) -> Iterator[Model]:
    trainer = _trainer(world, save_strategy="steps", save_steps=2, max_steps=4, save_total_limit=3)
    trainer.train()
    yield world.model
    again = _trainer(world, max_steps=4)
    again.train(resume_from_checkpoint=str(_checkpoint(world)))
    yield again.model.eval()


@action(ACTIONS, "Trainer resumes with a fresh model", ("llama", "opt"), trains=True, moments=(0,), tolerance=1e-3)
def resume_fresh(world: World) -> Iterator[Model]:
    trainer = _trainer(world, save_strategy="steps", save_steps=2, max_steps=4, save_total_limit=3)
    trainer.train()
    again = _trainer(world, world.fresh(), max_steps=4)
    again.train(resume_from_checkpoint=str(_checkpoint(world)))
    yield again.model.eval()


@action(ACTIONS, "Trainer loads the best model", ("llama", "opt"), trains=True, moments=(0, 2), steps=2, tolerance=1e-3)
def best(world: World) -> Iterator[Model]:
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer = _trainer(world, **options, load_best_model_at_end=True)
    yield world.model
    trainer.train()
    yield trainer.model.eval()
