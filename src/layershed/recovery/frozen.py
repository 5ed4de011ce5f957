"""Parameters that stay frozen and out of the optimizers, although others make them trainable or add them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn
from torch.optim import Optimizer

from layershed.recovery.lora import remember_trainable
from layershed.recovery.optimizer_groups import take_out
from layershed.stand_ins.carried import dropped_parameters


class StaysFrozen:
    """Freezes parameters again that a callback or a hook has unfrozen. It is cheap enough for every step."""

    def __init__(self) -> None:
        self._parameters: list[nn.Parameter] = []
        self._transformer: nn.Module | None = None
        self._frozen_now: Callable[[nn.Module], Iterable[nn.Parameter]] = dropped_parameters
        self._size = -1  # number of parameters in the optimizers after the last check

    def hold(self, transformer: nn.Module, parameters_of: Callable[[nn.Module], Iterable[nn.Parameter]]) -> None:
        """Keep parameters of a transformer frozen from now on, and no others.

        Args:
            transformer: The transformer.
            parameters_of: Gives the parameters that must be frozen in its present state.
        """
        self._transformer, self._frozen_now, self._size = transformer, parameters_of, -1
        self._parameters = list(parameters_of(transformer))

    def enforce(self, optimizers: Sequence[Optimizer]) -> list[nn.Parameter]:
        """Freeze them, clear their gradients, and take them out of the optimizers.

        The transformer remembers what was unfrozen: ``restore`` and ``merge_lora`` make it trainable.

        Returns:
            The parameters that had been unfrozen.
        """
        self._let_go_of_restored()
        unfrozen = [parameter for parameter in self._parameters if parameter.requires_grad]
        if self._transformer is not None and unfrozen:
            remember_trainable(self._transformer, unfrozen)
        for parameter in unfrozen:
            parameter.requires_grad_(False)
            parameter.grad = None
        if unfrozen or _size(optimizers) != self._size:
            take_out(optimizers, self._parameters)
            self._size = _size(optimizers)
        return unfrozen

    def _let_go_of_restored(self) -> None:
        """What was restored by hand, or merged, may train again."""
        if self._transformer is None or not any(parameter.requires_grad for parameter in self._parameters):
            return
        still = {id(parameter) for parameter in self._frozen_now(self._transformer)}
        self._parameters = [parameter for parameter in self._parameters if id(parameter) in still]


def _size(optimizers: Iterable[Optimizer]) -> int:
    return sum(len(group["params"]) for optimizer in optimizers for group in optimizer.param_groups)
