"""What users do by hand: hooks, replaced modules, wrapped forwards."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import layershed as ls
from tests.support.by_others.action import EVERY, Table, action
from tests.support.by_others.world import Model, World, dense_model

ACTIONS: Table = {}


def _cores(world: World) -> list[str]:
    """Paths of the sublayers that are dropped, as a user knows them."""
    dropped = world.architecture.dropped
    return [s.path for s in ls.find_sublayers(dense_model(world.name)) if (s.block, s.kind) in dropped]


def _first(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _scale(_module: nn.Module, _args: Any, output: Any) -> None:
    _first(output).mul_(1.0)


@action(ACTIONS, "a forward hook works in place")
def in_place_hook(world: World) -> Iterator[Model]:
    for path in _cores(world):
        world.model.get_submodule(path).register_forward_hook(_scale)
    yield world.model


@action(ACTIONS, "hooks record all outputs")
def recording_hooks(world: World) -> Iterator[Model]:
    seen: list[Any] = []
    for module in world.model.modules():
        module.register_forward_hook(lambda _m, _a, output: seen.append(output))
        module.register_forward_pre_hook(lambda _m, args: seen.append(args))
    yield world.model


@action(ACTIONS, "a full backward hook and a backward pass", ("llama", "gpt2", "opt", "bert"))
def backward_hooks(world: World) -> Iterator[Model]:
    for path in _cores(world):
        world.model.get_submodule(path).register_full_backward_hook(lambda *_: None)
    world.model(**world.batch).loss.backward()
    yield world.model


@action(ACTIONS, "a sublayer's module is replaced by a copy (setattr)")
def replaced(world: World) -> Iterator[Model]:
    source = dense_model(world.name)
    for path in _cores(world):
        world.model.set_submodule(path, source.get_submodule(path))
    yield world.model


@action(ACTIONS, "a sublayer's module is replaced by a subclass", ("llama", "gpt2", "opt"))
def subclassed(world: World) -> Iterator[Model]:
    for path in _cores(world):
        module = copy.deepcopy(dense_model(world.name).get_submodule(path))
        module.__class__ = type("Mine", (type(module),), {})
        world.model.set_submodule(path, module)
    yield world.model


@action(ACTIONS, "a whole block is replaced by a dense one")
def block_replaced(world: World) -> Iterator[Model]:
    source = dense_model(world.name)
    for stack, other in zip(_stacks(world.model), _stacks(source), strict=True):
        stack[1] = other[1]
    yield world.model


@action(ACTIONS, "all blocks are replaced (a new ModuleList)", ("llama", "gpt2", "opt"))
def blocks_replaced(world: World) -> Iterator[Model]:
    source = dense_model(world.name)
    for (path, _), other in zip(_named_stacks(world.model), _stacks(source), strict=True):
        world.model.set_submodule(path, nn.ModuleList(other))
    yield world.model


@action(ACTIONS, "all blocks go into a new ModuleList", EVERY)
def blocks_relisted(world: World) -> Iterator[Model]:
    for path, stack in _named_stacks(world.model):
        world.model.set_submodule(path, nn.ModuleList(list(stack)))
    yield world.model


def _named_stacks(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    named = model.named_modules()
    return [(n, m) for n, m in named if isinstance(m, nn.ModuleList) and len(m) > 2 and "experts" not in n]


def _stacks(model: nn.Module) -> list[nn.ModuleList]:
    return [stack for _, stack in _named_stacks(model)]


class _Wrapper(nn.Module):
    """Calls what it wraps, and passes other attributes on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


@action(ACTIONS, "a sublayer's module is wrapped", steps=2)
def wrapped(world: World) -> Iterator[Model]:
    for path in _cores(world):
        world.model.set_submodule(path, _Wrapper(world.model.get_submodule(path)))
    yield world.model
    for path in _cores(world):
        world.model.set_submodule(path, world.model.get_submodule(f"{path}.inner"))
    yield world.model


@action(ACTIONS, "every block is wrapped", ("llama", "gpt2", "opt"), steps=2)
def blocks_wrapped(world: World) -> Iterator[Model]:
    for stack in _stacks(world.model):
        for i, block in enumerate(stack):
            stack[i] = _Wrapper(block)
    yield world.model
    for stack in _stacks(world.model):
        for i, block in enumerate(stack):
            stack[i] = block.get_submodule("inner")
    yield world.model


@action(ACTIONS, "a sublayer's forward is wrapped (functools.wraps)")
def forward_wrapped(world: World) -> Iterator[Model]:
    for path in _cores(world):
        module = world.model.get_submodule(path)
        module.forward = _noisy(module.forward)
    yield world.model


def _noisy(forward: Any) -> Any:
    @functools.wraps(forward)
    def loud(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return loud


@action(ACTIONS, "a sublayer's forward is replaced by a method of the user's")
def forward_replaced(world: World) -> Iterator[Model]:
    for path in _cores(world):
        module = world.model.get_submodule(path)
        own = type(module).forward

        def mine(self: nn.Module, *args: Any, own: Any = own, **kwargs: Any) -> Any:
            return own(self, *args, **kwargs)

        module.forward = types.MethodType(mine, module)
    yield world.model


@action(ACTIONS, "a sublayer's forward is replaced by a plain function", ("llama", "opt", "bart"))
def forward_by_function(world: World) -> Iterator[Model]:
    source = dense_model(world.name)
    for path in _cores(world):
        world.model.get_submodule(path).forward = source.get_submodule(path).forward
    yield world.model


@action(ACTIONS, "a class's forward is patched", ("llama", "gpt2", "opt"))
def class_patched(world: World) -> Iterator[Model]:
    kinds = {type(world.model.get_submodule(path)) for path in _cores(world)}
    kept = {kind: kind.forward for kind in kinds}
    for kind in kinds:
        kind.forward = _noisy(kind.forward)
    try:
        yield world.model
    finally:
        for kind, forward in kept.items():
            kind.forward = forward


@action(
    ACTIONS, "a forward is deleted from every instance (del module.forward)", ("llama", "opt", "bert"), moments=(0,)
)
def forward_deleted(world: World) -> Iterator[Model]:
    for module in world.model.modules():
        module.__dict__.pop("forward", None)
    yield world.model


@action(ACTIONS, "all hooks are removed and forwards deleted", ("llama", "opt", "bert"), moments=(0,))
def cleaned(world: World) -> Iterator[Model]:
    for module in world.model.modules():
        module.__dict__.pop("forward", None)
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    yield world.model


@action(ACTIONS, "weights are copied parameter by parameter into a fresh model", ("llama", "opt"), moments=(1,))
def copied_parameters(world: World) -> Iterator[Model]:
    fresh = world.fresh()
    with torch.no_grad():
        for new, old in zip(fresh.parameters(), world.model.parameters(), strict=True):
            new.copy_(old)
    yield fresh


@action(ACTIONS, "blocks are shared with another model", ("llama", "gpt2"), moments=(0,))
def shared_blocks(world: World) -> Iterator[Model]:
    other = world.fresh()
    for (path, _), stack in zip(_named_stacks(other), _stacks(world.model), strict=True):
        other.set_submodule(path, stack)
    other.load_state_dict(world.model.state_dict())
    yield other
