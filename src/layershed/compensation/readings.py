"""Reads h, or X, h and b, of sublayers while a model runs, with the tokens that count."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layershed.discovery.anatomy import Anatomy
from layershed.discovery.branches import Branch, LinearPlace, Tap
from layershed.importance.padding import Padding
from layershed.importance.passes import Passes
from layershed.importance.taps import take_argument, take_output
from layershed.planning.plan import Sublayer


@dataclass
class Reading:
    """What one forward pass gave at one sublayer.

    Args:
        h: The output of its own norm, shape (tokens, width).
        counts: True where a token is no padding, shape (tokens,).
        x: Its input X, of the same shape as h; None if only h was read.
        b: What it added to the stream, before it was scaled, of the same shape; None if only h was read.
    """

    h: Tensor
    counts: Tensor
    x: Tensor | None = None
    b: Tensor | None = None


class Readings:
    """Hooks that read sublayers in the forward passes within :meth:`of`.

    Args:
        transformer: The transformer.
        anatomy: Its anatomy.
    """

    def __init__(self, transformer: nn.Module, anatomy: Anatomy) -> None:
        self._transformer = transformer
        self._passes = Passes(transformer, anatomy.paths)
        self._padding = Padding(transformer, anatomy.tokens_first)

    @contextmanager
    def of(self, branches: Iterable[Branch], *, only_h: bool = False) -> Iterator[dict[Sublayer, Reading]]:
        """Yield a mapping that holds the reading of every branch after a forward pass, and is renewed by the next one.

        Args:
            branches: Sublayers that run, or that a linear map replaces, with a place for a map.
            only_h: Whether to read h alone; nothing else can be read while a map runs.
        """
        found: dict[Sublayer, Reading] = {}
        with ExitStack() as stack:
            for path in self._passes.paths:
                module = self._transformer.get_submodule(path)
                enter, leave = partial(self._enter, path), partial(self._leave, path)
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(leave, always_call=True).remove)
            for branch in branches:
                assert branch.linear is not None
                reader = _Reader(branch, branch.linear, self._padding, found)
                if only_h:
                    self._tap(stack, branch.linear.reads, reader.take_only_h)
                    continue
                self._tap(stack, branch.entry, reader.take_x)
                self._tap(stack, branch.linear.reads, reader.take_h)
                self._tap(stack, branch.linear.writes or branch.exit, reader.take_b)
            yield found
        self._padding.forget()

    def _enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        outermost = self._passes.enter(path, _nothing)
        self._padding.enter(path, module, args, kwargs, outermost)

    def _leave(self, path: str, *_: object) -> None:
        self._passes.leave(path)

    def _tap(self, stack: ExitStack, tap: Tap, take: Any) -> None:
        module = self._transformer.get_submodule(tap.path)
        if tap.key is None:
            handle = module.register_forward_hook(partial(take_output, take))
        else:
            names = list(inspect.signature(module.forward).parameters)
            hook = partial(take_argument, take, tap.key, names)
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        stack.callback(handle.remove)


class _Reader:
    def __init__(self, branch: Branch, place: LinearPlace, padding: Padding, found: dict[Sublayer, Reading]) -> None:
        self._branch, self._place, self._padding, self._found = branch, place, padding, found
        self._x: Tensor | None = None
        self._h: Tensor | None = None

    def take_x(self, x: Tensor) -> None:
        # a block that adds in place would overwrite it
        self._x = x.detach().clone() if self._branch.overwritten else x.detach()

    def take_h(self, h: Tensor) -> None:
        self._h = h.detach()

    def take_only_h(self, h: Tensor) -> None:
        aligned, _, mask = self._padding.align(h.detach(), h.detach(), self._branch.sublayer.path)
        self._found[self._branch.sublayer] = Reading(_flat(aligned), _counts(aligned, mask))

    def take_b(self, b: Tensor) -> None:
        if self._x is None or self._h is None:
            return
        path, x, b = self._branch.sublayer.path, self._x, b.detach()
        if self._place.writes is None:  # Y was read
            b = (b.view_as(x).float() - x.float()) / self._place.scale
        h, _, _ = self._padding.align(self._h, self._h, path)
        x, b, mask = self._padding.align(x, b.view_as(x), path)
        self._found[self._branch.sublayer] = Reading(_flat(h), _counts(x, mask), _flat(x), _flat(b))


def _flat(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


def _counts(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.ones(values.shape[:-1].numel(), dtype=torch.bool, device=values.device)
    return mask.bool().reshape(-1)


def _nothing() -> None:
    """A pass begins."""
