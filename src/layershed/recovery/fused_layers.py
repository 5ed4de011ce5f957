"""torch's own encoder layers, which in eval mode read the weights of their parts without calling them.

``nn.TransformerEncoderLayer`` calls this its fast path. An adapter in such a part would not run. torch leaves the path
if any part has a hook, so a hook that does nothing sits on each adapter there. It is gone with the adapter.
"""

from __future__ import annotations

from torch import nn


def keep_from_fusing(transformer: nn.Module, adapters: set[nn.Module]) -> None:
    """Make torch's encoder layers call the given adapters."""
    for layer in transformer.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            for adapter in adapters.intersection(layer.modules()):
                allow_fusing(adapter)  # a layer may be held twice
                adapter.register_forward_pre_hook(_called)


def allow_fusing(module: nn.Module) -> None:
    """Undo :func:`keep_from_fusing` for a module that took over the hooks of an adapter, or for an adapter."""
    for number in [number for number, hook in module._forward_pre_hooks.items() if hook is _called]:
        del module._forward_pre_hooks[number]


def _called(_module: nn.Module, _args: object) -> None:
    """A hook that does nothing."""
