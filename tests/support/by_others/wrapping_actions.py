"""Wrappers of torch around the whole model: averaging, data parallelism, sharding."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._C._distributed_c10d import FileStore
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.support.by_others.action import Table, action
from tests.support.by_others.world import Model, World

ACTIONS: Table = {}


@contextmanager
def _one_process(world: World) -> Iterator[None]:
    kept = dict(os.environ)
    store = FileStore(str(world.folder / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(kept)


@action(ACTIONS, "AveragedModel")
def averaged(world: World) -> Iterator[Model]:
    average = AveragedModel(world.model)
    average.update_parameters(world.model)
    average.update_parameters(world.model)
    yield average


@action(ACTIONS, "EMA, weights copied back", ("llama", "opt", "bart"), steps=2)
def ema(world: World) -> Iterator[Model]:
    average = AveragedModel(world.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    yield world.model
    average.update_parameters(world.model)
    world.model.load_state_dict(average.module.state_dict())
    yield world.model


@action(ACTIONS, "DataParallel", ("llama", "opt"))
def data_parallel(world: World) -> Iterator[Model]:
    yield nn.DataParallel(world.model)


@action(ACTIONS, "DDP, two passes", ("llama", "gpt2", "opt", "bert", "bart"))
def ddp(world: World) -> Iterator[Model]:
    with _one_process(world):
        wrapped = DistributedDataParallel(world.model)
        for _ in range(2):
            loss = wrapped(**world.batch).loss
            loss.backward()
        yield wrapped


@action(ACTIONS, "DDP, its state dict into a fresh model", ("llama", "opt"), moments=(0,))
def ddp_state(world: World) -> Iterator[Model]:
    with _one_process(world):
        weights = DistributedDataParallel(world.model).state_dict()
        fresh = world.fresh()
        nn.modules.utils.consume_prefix_in_state_dict_if_present(weights, "module.")
        fresh.load_state_dict(weights)
        yield fresh


@action(ACTIONS, "FSDP2 shards every block", ("llama", "opt", "bert"))
def sharded(world: World) -> Iterator[Model]:
    with _one_process(world):
        for stack in [m for m in world.model.modules() if isinstance(m, nn.ModuleList) and len(m) > 2]:
            for block in stack:
                fully_shard(block, mesh=_mesh())
        yield fully_shard(world.model, mesh=_mesh())


def _mesh() -> torch.distributed.device_mesh.DeviceMesh:
    return torch.distributed.device_mesh.init_device_mesh("cpu", (1,))


@action(ACTIONS, "a wrapper of the user's own, wrapped twice", ("llama", "opt", "bart"))
def own_wrapper(world: World) -> Iterator[Model]:
    class Wrapper(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, **inputs: torch.Tensor) -> object:
            return self.net(**inputs)

    yield Wrapper(Wrapper(world.model))


@action(ACTIONS, "a deep copy as teacher, then the student goes", ("llama", "opt"), moments=(0,))
def teacher(world: World) -> Iterator[Model]:
    student, world.model = world.model, copy.deepcopy(world.model)
    del student
    yield world.model
