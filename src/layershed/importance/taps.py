"""The hooks that pass on X and b of every branch while a model runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layershed.discovery.anatomy import Anatomy
from layershed.discovery.branches import Branch, Tap
from layershed.discovery.probe import probing
from layershed.discovery.recording import Key
from layershed.errors import CalibrationError
from layershed.importance.passes import Passes, recomputing


class Taps:
    """Hooks on every sublayer and every block of a transformer. They do nothing until ``on`` is set.

    A place is the index of a sublayer in forward order, or, after those, of a block.

    Args:
        transformer: The transformer.
        anatomy: Its sublayers and blocks.
        begin_pass: Called when a forward pass begins.
        enter: Called when a block begins to run, or a module around it, with the path, the module, its arguments and
            whether no module around it is running.
        measure: Called once per place and forward pass, with the place, X, b and the path of the module that they
            belong to. X and b have any shape that ends in hidden.
        fail: Called with the error if something could not be measured.

    Attributes:
        on: Whether the hooks pass on what they see.
        blocks: Indices of the blocks that are measured.
        names: Name of every place, such as ``attention.3`` or ``block.3``.
        attached: Whether the hooks are on the model.
    """

    def __init__(
        self,
        transformer: nn.Module,
        anatomy: Anatomy,
        *,
        begin_pass: Callable[[], None],
        enter: Callable[[str, nn.Module, Any, Any, bool], None],
        measure: Callable[[int, Tensor, Tensor, str], None],
        fail: Callable[[Exception], None],
    ) -> None:
        self.on = False
        self._transformer, self._anatomy = transformer, anatomy
        self._hand_on_pass, self._hand_on_call, self._hand_on, self._fail = begin_pass, enter, measure, fail
        self._branches = anatomy.branches
        self._last_of_block = {branch.sublayer.block: index for index, branch in enumerate(self._branches)}
        self._taps_of_blocks = {i: tap for i in self._last_of_block if (tap := anatomy.blocks[i]) is not None}
        self.blocks = list(self._taps_of_blocks)
        self.names = [*(b.sublayer.name for b in self._branches), *(f"block.{block}" for block in self.blocks)]
        self._overwrites = any(branch.overwritten for branch in self._branches)
        self._handles: list[RemovableHandle] = []
        self._x: dict[int, Tensor] = {}
        self._block_sum: tuple[int, Tensor, Tensor] | None = None  # the block, X and the branches so far
        self._seen: set[int] = set()
        self._passes = Passes(transformer, anatomy.paths)

    @property
    def attached(self) -> bool:
        """Whether the hooks are on the model."""
        return bool(self._handles)

    def attach(self) -> None:
        """Register the hooks."""
        for path in self._passes.paths:
            module = self._transformer.get_submodule(path)
            enter = self._while_on(partial(self._enter, path), _enter_if_on)
            leave = self._while_on(partial(self._leave, path), _leave_if_on)
            self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(leave, always_call=True))
        for index, branch in enumerate(self._branches):
            self._tap(branch.entry, partial(self._note_x, index))
            self._tap(branch.exit, partial(self._leave_branch, index, branch))
        for block, tap in self._taps_of_blocks.items():
            if block not in self._anatomy.plain:
                place = self._place_of(block)
                self._tap(tap, partial(self._note_x, place))
                self._tap(Tap(tap.path), partial(self._leave_block, place, tap.path))

    def detach(self) -> None:
        """Remove the hooks, and drop the references to activations."""
        self.on = False
        self._forget()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def restart(self) -> None:
        """Pass on what is seen from now on; the next call of a block, or of a module around it, begins a pass."""
        self._begin_pass()
        self._passes.forget()
        self.on = True

    def _tap(self, tap: Tap, take: Callable[[Tensor], None]) -> None:
        """Pass a tensor to ``take`` whenever the model computes it."""
        module = self._transformer.get_submodule(tap.path)
        if tap.key is None:
            self._handles.append(module.register_forward_hook(self._while_on(partial(take_output, take))))
        else:
            names = list(inspect.signature(module.forward).parameters)
            hook = self._while_on(partial(take_argument, take, tap.key, names))
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _while_on(self, hook: Callable[..., None], switch: Callable[..., None] | None = None) -> Callable[..., None]:
        # torch.compile must not compile it: it would compile it again for every place
        return partial(switch or _if_on, self, torch.compiler.disable(partial(self._safely, hook)))

    def _safely(self, hook: Callable[..., None], *args: Any) -> None:
        try:
            hook(*args)
        except Exception as error:
            self._fail(error)

    def _place_of(self, block: int) -> int:
        return len(self._branches) + self.blocks.index(block)

    def _forget(self) -> None:
        """Drop the references to tensors of the last forward pass, which may have failed midway."""
        self._seen.clear()
        self._x.clear()
        self._block_sum = None

    def _begin_pass(self) -> None:
        """Start a forward pass: every place is measured once."""
        self._forget()
        self._hand_on_pass()

    def _enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not probing() and not recomputing():
            outermost = self._passes.enter(path, self._begin_pass)
            self._hand_on_call(path, module, args, kwargs, outermost)

    def _leave(self, path: str, *_: object) -> None:
        if not probing() and not recomputing():
            self._passes.leave(path)

    def _counts(self, place: int) -> bool:
        """Whether the running call is to be measured: the first in a pass, and not that of gradient checkpointing."""
        return self.on and place not in self._seen and not probing() and not recomputing()

    def _note_x(self, place: int, x: Tensor) -> None:
        if place in self._seen and not self._passes.inside and not probing() and not recomputing():
            self._begin_pass()  # the parts of the blocks are called one by one
        if self._counts(place):
            # a block that adds in place would overwrite it
            self._x[place] = x.detach().clone() if self._overwrites else x.detach()

    def _leave_branch(self, index: int, branch: Branch, output: Tensor) -> None:
        if not self._counts(index):
            return
        x = self._x_of(index, branch.sublayer.path)
        b = output.detach()
        b = b.view_as(x)  # experts may give their tokens flattened
        b = b.float() - x.float() if branch.scale is None else b if branch.scale == 1 else branch.scale * b
        whole = self._with_block(index, branch, x, b) if branch.sublayer.block in self._anatomy.plain else None
        self._measure(index, x, b, branch.sublayer.path)
        if whole is not None:
            self._measure(self._place_of(branch.sublayer.block), *whole, branch.sublayer.path)

    def _leave_block(self, place: int, path: str, y: Tensor) -> None:
        if self._counts(place):
            x = self._x_of(place, path)
            self._measure(place, x, y.detach().float() - x.float(), path)

    def _x_of(self, place: int, path: str) -> Tensor:
        """X of a place.

        Raises:
            CalibrationError: If the module that takes it did not run in this pass.
        """
        if place not in self._x:
            raise CalibrationError(
                f"Cannot measure {self.names[place]} ({path}): it ran, but its input X was not seen. Call the whole "
                "block, or leave its importance out."
            )
        return self._x.pop(place)

    def _with_block(self, index: int, branch: Branch, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
        """X and branch of a whole block once its last sublayer has run.

        The branch is the sum of its sublayers': Y - X of the block, without the rounding of Y.
        """
        block = branch.sublayer.block
        if self._block_sum is None or self._block_sum[0] != block:  # a block before it may have stopped midway
            # a block that adds in place would overwrite it
            start, total = x, b.clone() if branch.stand_ins[0][1].materialize else b
        else:
            start, total = self._block_sum[1], self._block_sum[2] + b.view_as(self._block_sum[2])
        done = index == self._last_of_block[block]
        self._block_sum = None if done else (block, start, total)
        return (start, total) if done else None

    def _measure(self, place: int, x: Tensor, b: Tensor, path: str) -> None:
        self._seen.add(place)
        self._hand_on(place, x, b, path)


def body_of(transformer: nn.Module) -> nn.Module:
    """The transformer without its head, if that takes the same inputs."""
    body = getattr(transformer, "base_model", transformer)
    parameters = inspect.signature(body.forward).parameters.values()
    main = getattr(transformer, "main_input_name", "")
    takes_any = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    return body if takes_any or any(parameter.name == main for parameter in parameters) else transformer


def _if_on(taps: Taps, hook: Callable[..., None], *args: Any) -> None:
    if taps.on:
        hook(*args)


# the same again: torch.compile compiles each function for a few types of arguments only


def _enter_if_on(taps: Taps, hook: Callable[..., None], module: nn.Module, args: Any, kwargs: Any) -> None:
    if taps.on:
        hook(module, args, kwargs)


def _leave_if_on(taps: Taps, hook: Callable[..., None], module: nn.Module, args: Any, output: Any) -> None:
    if taps.on:
        hook(module, args, output)


def take_output(take: Callable[[Tensor], None], _module: nn.Module, _args: Any, output: Any) -> None:
    """Pass on what a module returns first."""
    take(output[0] if isinstance(output, tuple | list) else output)


def take_argument(
    take: Callable[[Tensor], None], key: Key, names: Sequence[str], _module: nn.Module, args: Any, kwargs: Any
) -> None:
    """Take an argument by its position or its name, however the caller passes it."""
    given = {**dict(enumerate(args)), **dict(zip(names, args, strict=False)), **kwargs}
    take(given[key] if key in given or isinstance(key, str) else given[names[key]])
