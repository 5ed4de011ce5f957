"""The hooks that pass on X and b of every branch while a model runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layershed.discovery.anatomy import Anatomy
from layershed.discovery.branches import Branch, Tap
from layershed.discovery.probe import probing
from layershed.discovery.recording import Key


class Taps:
    """Hooks on every sublayer and every block of a transformer. They do nothing until ``on`` is set.

    A place is the index of a sublayer in forward order, or, after those, of a block.

    Args:
        transformer: The transformer.
        anatomy: Its sublayers and blocks.
        begin_pass: Called when a forward pass begins, with the model's body and its arguments.
        measure: Called once per place and forward pass, with the place, X, b and the path of the module that they
            belong to. X and b have any shape that ends in hidden.

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
        begin_pass: Callable[[nn.Module, Any, Any], None],
        measure: Callable[[int, Tensor, Tensor, str], None],
    ) -> None:
        self.on = False
        self._transformer, self._anatomy = transformer, anatomy
        self._hand_on_pass, self._hand_on = begin_pass, measure
        self._branches = anatomy.branches
        self._last_of_block = {branch.sublayer.block: index for index, branch in enumerate(self._branches)}
        self._taps_of_blocks = {i: tap for i in self._last_of_block if (tap := anatomy.blocks[i]) is not None}
        self.blocks = list(self._taps_of_blocks)
        self.names = [*(b.sublayer.name for b in self._branches), *(f"block.{block}" for block in self.blocks)]
        self._overwrites = any(branch.overwritten for branch in self._branches)
        self._handles: list[RemovableHandle] = []
        self._x: dict[int, Tensor] = {}
        self._block_sum: tuple[Tensor, Tensor] | None = None
        self._seen: set[int] = set()

    @property
    def attached(self) -> bool:
        """Whether the hooks are on the model."""
        return bool(self._handles)

    def attach(self) -> None:
        """Register the hooks."""
        body = body_of(self._transformer)
        self._handles = [body.register_forward_pre_hook(self._while_on(self._begin_pass), with_kwargs=True)]
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

    def _tap(self, tap: Tap, take: Callable[[Tensor], None]) -> None:
        """Pass a tensor to ``take`` whenever the model computes it."""
        module = self._transformer.get_submodule(tap.path)
        if tap.key is None:
            self._handles.append(module.register_forward_hook(self._while_on(partial(_take_output, take))))
        else:
            hook = self._while_on(partial(_take_argument, take, tap.key))
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _while_on(self, hook: Callable[..., None]) -> Callable[..., None]:
        # torch.compile must not compile it: it would compile it again for every place
        return partial(_if_on, self, torch.compiler.disable(hook))

    def _place_of(self, block: int) -> int:
        return len(self._branches) + self.blocks.index(block)

    def _forget(self) -> None:
        """Drop the references to tensors of the last forward pass, which may have failed midway."""
        self._seen.clear()
        self._x.clear()
        self._block_sum = None

    def _begin_pass(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Start a forward pass: every place is measured once."""
        self._forget()
        if not probing():
            self._hand_on_pass(module, args, kwargs)

    def _counts(self, place: int) -> bool:
        """Whether the running call is to be measured; gradient checkpointing runs every block twice."""
        return self.on and place not in self._seen and not probing()

    def _note_x(self, place: int, x: Tensor) -> None:
        if self._counts(place):
            # a block that adds in place would overwrite it
            self._x[place] = x.detach().clone() if self._overwrites else x.detach()

    def _leave_branch(self, index: int, branch: Branch, output: Tensor) -> None:
        if not self._counts(index):
            return
        x = self._x.pop(index)
        b = output.detach()
        b = b.view_as(x)  # experts may give their tokens flattened
        b = b.float() - x.float() if branch.scale is None else b if branch.scale == 1 else branch.scale * b
        self._measure(index, x, b, branch.sublayer.path)
        if branch.sublayer.block in self._anatomy.plain:
            self._add_to_block(index, branch, x, b)

    def _leave_block(self, place: int, path: str, y: Tensor) -> None:
        if self._counts(place):
            x = self._x.pop(place)
            self._measure(place, x, y.detach().float() - x.float(), path)

    def _add_to_block(self, index: int, branch: Branch, x: Tensor, b: Tensor) -> None:
        """A block's branch is the sum of its sublayers': Y - X of the block, without the rounding of Y."""
        block = branch.sublayer.block
        if self._block_sum is None:
            # a block that adds in place would overwrite it
            start, total = x, b.clone() if branch.stand_ins[0][1].materialize else b
        else:
            start, total = self._block_sum[0], self._block_sum[1] + b.view_as(self._block_sum[1])
        done = index == self._last_of_block[block]
        self._block_sum = None if done else (start, total)
        if done:
            self._measure(self._place_of(block), start, total, branch.sublayer.path)

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


def _take_output(take: Callable[[Tensor], None], _module: nn.Module, _args: Any, output: Any) -> None:
    take(output[0] if isinstance(output, tuple | list) else output)


def _take_argument(take: Callable[[Tensor], None], key: Key, _module: nn.Module, args: Any, kwargs: Any) -> None:
    take(args[key] if isinstance(key, int) else kwargs[key])
