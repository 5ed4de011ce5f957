"""The hooks that transformers leaves on a model once somebody has requested extra outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from layershed.stand_ins.watching import remove_forward_hook


@contextmanager
def without_capturing(model: nn.Module) -> Iterator[None]:
    """Afterwards, a model is without the hooks that transformers 5.24 installs at the first request of extra outputs.

    It installs them again when the user requests some. A model with such hooks can no longer be pickled.
    """
    flag = "_output_capturing_hooks_installed"
    before = {module: (set(module._forward_hooks), flag in vars(module)) for module in model.modules()}
    try:
        yield
    finally:
        for module, (known, installed) in before.items():
            if not installed:
                vars(module).pop(flag, None)
            for number in set(module._forward_hooks) - known:
                remove_forward_hook(module, number)
