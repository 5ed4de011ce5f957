"""Optimizers follow a model that changes: parameters leave, others join, and the learning rate is scaled.

All changes are in place, because learning-rate schedulers keep references to the group objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from layershed.errors import CheckpointError, RecoveryError
from layershed.recovery.lora import adapted_modules
from layershed.stand_ins.carried import dropped_parameters, maps_of, stand_ins_of
from layershed.stand_ins.install import hidden_parameters

Layout = list[list[list[str]]]
"""Names of the parameters in every group of every optimizer."""


def forget_parameters(optimizers: Iterable[Optimizer], transformer: nn.Module) -> None:
    """Take the parameters of bypassed sublayers out of the optimizers, with their state, in place.

    A second call changes nothing.

    Args:
        optimizers: The run's optimizers.
        transformer: The model with bypassed sublayers.
    """
    take_out(optimizers, dropped_parameters(transformer))


def take_out(optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]) -> None:
    """Take parameters out of the optimizers, with their state, in place."""
    gone = {id(parameter) for parameter in parameters}
    _forget(optimizers, lambda parameter: id(parameter) in gone)


def forget_quantized(optimizers: Iterable[Optimizer], module: nn.Module) -> None:
    """Take out quantized weights and their originals, which are no parameters of the module any more."""
    trainable = {id(parameter) for parameter in module.parameters() if parameter.is_floating_point()}
    _forget(optimizers, lambda parameter: id(parameter) not in trainable)


def hand_over(
    optimizers: Sequence[Optimizer], module: nn.Module, transformer: nn.Module, origin: Layout | None = None
) -> None:
    """Make optimizers train the adapters of a transformer instead of its frozen weights.

    Parameters outside the transformer keep their state. An adapter joins the group that held its weight. If no group
    held it, the adapter joins the first group that holds a parameter of the transformer.

    Args:
        optimizers: The run's optimizers.
        module: The LightningModule.
        transformer: The transformer in it, with adapters injected and everything else frozen.
        origin: The groups of the weights before any of them left; None for the present groups.
    """
    if not optimizers:
        return
    names = {id(parameter): name.replace(".base_layer.", ".") for name, parameter in module.named_parameters()}
    origin = [] if origin is None else origin
    first = {
        name: group
        for optimizer, layout in zip(optimizers, origin, strict=False)
        for group, held in zip(optimizer.param_groups, layout, strict=False)
        for name in held
    }
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    home = {id(parameter): group for group in groups for parameter in group["params"]}
    own = {id(parameter) for parameter in transformer.parameters()}
    default = next((group for group in groups if any(id(p) in own for p in group["params"])), groups[0])
    for layer in adapted_modules(transformer).values():
        weights = [id(weight) for weight in layer.base_layer.parameters()]
        known = (home.get(weight, first.get(names[weight])) for weight in weights)
        group = next((group for group in known if group is not None), default)
        for parameter in layer.parameters():
            if parameter.requires_grad and id(parameter) not in home:
                group["params"].append(parameter)
                home[id(parameter)] = group
    _forget(optimizers, lambda parameter: id(parameter) in own and not parameter.requires_grad)
    for optimizer in optimizers:
        _begin_anew(optimizer)
    _in_order(groups, module)


def adopt_maps(optimizers: Sequence[Optimizer], module: nn.Module, transformer: nn.Module) -> None:
    """Make optimizers train the linear maps of a transformer that none of them holds yet.

    A map joins the group that holds, or held before, a weight of the sublayer that it replaces; call it before these
    weights leave. If no group holds one, the map joins the first group that holds a parameter of the transformer.

    Args:
        optimizers: The run's optimizers.
        module: The LightningModule.
        transformer: The transformer in it.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    home = {id(parameter): group for group in groups for parameter in group["params"]}
    own = {id(parameter) for parameter in transformer.parameters()}
    default = next((group for group in groups if any(id(p) in own for p in group["params"])), next(iter(groups), None))
    changed = False
    for path, stand_in in stand_ins_of(transformer).items():
        joining = [p for p in (stand_in.map.parameters() if stand_in.map is not None else ()) if id(p) not in home]
        if not joining or default is None:
            continue
        hidden = (home.get(id(p)) for _, p in hidden_parameters(transformer.get_submodule(path)))
        group = next((group for group in hidden if group is not None), default)
        group["params"].extend(joining)
        changed = True
    if changed:
        _in_order(groups, module)
        for optimizer in optimizers:
            _begin_anew(optimizer)


def train_only_maps(optimizers: Sequence[Optimizer], module: nn.Module, transformer: nn.Module) -> None:
    """Freeze a transformer but for its linear maps, and make the optimizers train these instead.

    Args:
        optimizers: The run's optimizers.
        module: The LightningModule; its parameters outside the transformer keep training.
        transformer: The transformer in it.

    Raises:
        RecoveryError: If it has no linear map.
    """
    maps = {id(p): p for each in maps_of(transformer).values() for p in each.parameters()}
    if not maps:
        raise RecoveryError(
            "LoRARecovery(mode='stand_ins'): there is no linear map to train. Set replace='linear' in SublayerDrop, or "
            "use mode='lora'."
        )
    adopt_maps(optimizers, module, transformer)
    for parameter in transformer.parameters():
        parameter.requires_grad_(id(parameter) in maps)
        parameter.grad = parameter.grad if id(parameter) in maps else None
    own = {id(parameter) for parameter in transformer.parameters()}
    _forget(optimizers, lambda parameter: id(parameter) in own - maps.keys())


def _in_order(groups: Iterable[dict[str, Any]], module: nn.Module) -> None:
    """Sort the parameters of groups as the module orders them, which identifies their states after a resume."""
    place = {id(parameter): index for index, parameter in enumerate(module.parameters())}
    for group in groups:
        group["params"].sort(key=lambda parameter: place.get(id(parameter), -1))


def layout_of(optimizers: Iterable[Optimizer], module: nn.Module) -> Layout:
    """The names of the parameters in each group."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [[[names.get(id(p), "") for p in group["params"]] for group in o.param_groups] for o in optimizers]


def restore_layout(
    optimizers: Sequence[Optimizer], module: nn.Module, layout: Layout, *, configured: list[int] | None = None
) -> None:
    """Give fresh optimizers the groups of an interrupted run; call it before their state is loaded.

    Args:
        optimizers: The optimizers of the resumed run.
        module: The module whose parameters they hold.
        layout: The groups of the interrupted run.
        configured: The numbers of groups with which the interrupted run began. Groups that were added later are added
            here; their options come with the state.

    Raises:
        CheckpointError: If the number of optimizers or groups differs, or a parameter does not exist.
    """
    parameters = dict(module.named_parameters())
    for name, parameter in list(parameters.items()):
        parameters.setdefault(f"{name}_orig", parameter)  # torch's pruning calls it so until it is made permanent
    saved, found = [len(groups) for groups in layout], [len(optimizer.param_groups) for optimizer in optimizers]
    if found not in (saved, configured):
        raise CheckpointError(
            f"The checkpoint's optimizers have {saved} parameter groups, but configure_optimizers made {found}; they "
            "must agree."
        )
    for optimizer, groups in zip(optimizers, layout, strict=True):
        for _ in groups[len(optimizer.param_groups) :]:
            optimizer.param_groups.append({**optimizer.defaults, "params": []})
    for optimizer, groups in zip(optimizers, layout, strict=True):
        for group, names in zip(optimizer.param_groups, groups, strict=True):
            missing = [name for name in names if name not in parameters]
            if missing:
                raise CheckpointError(f"The checkpoint's optimizer held {missing[0]!r}, which the model lacks.")
            group["params"][:] = [parameters[name] for name in names]


def complete_state(optimizer: Optimizer) -> list[nn.Parameter]:
    """Give every trainable parameter a state: torch's distributed checkpoints need one for all parameters or for none.

    The new states hold no information. Delete them once the checkpoint is written.

    Returns:
        The parameters that had none.
    """
    started = {id(parameter) for parameter in optimizer.state}
    lacking = [
        [p for p in group["params"] if p.requires_grad and id(p) not in started] for group in optimizer.param_groups
    ]
    if any(lacking):
        with _step_of_no_length(optimizer, lacking):
            type(optimizer).step(optimizer)  # not the instance's own step: a scheduler counts its calls
    return [parameter for held in lacking for parameter in held]


@contextmanager
def _step_of_no_length(optimizer: Optimizer, held: Sequence[Sequence[nn.Parameter]]) -> Iterator[None]:
    """Within the context the groups hold only these parameters; all gradients and learning rates are zero."""
    groups = optimizer.param_groups
    before = [{**group, "params": list(group["params"])} for group in groups]
    gradients = [(parameter, parameter.grad) for own in held for parameter in own]
    for group, own in zip(groups, held, strict=True):
        group["params"][:] = own
        group["lr"] = 0.0
    for parameter, _ in gradients:
        parameter.grad = torch.zeros_like(parameter)
    try:
        yield
    finally:
        for group, old in zip(groups, before, strict=True):
            group["params"][:] = old["params"]
            group["lr"] = old["lr"]
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def without_empty_groups(optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Within the context no optimizer has an empty group: torch's distributed checkpoints confuse empty groups."""
    kept = [(optimizer, list(optimizer.param_groups)) for optimizer in optimizers]
    for optimizer, groups in kept:
        optimizer.param_groups[:] = [group for group in groups if group["params"]]
    try:
        yield
    finally:
        for optimizer, groups in kept:
            # loading a state makes new group objects
            full = iter(optimizer.param_groups[:])
            optimizer.param_groups[:] = [next(full) if group["params"] else group for group in groups]


class LearningRateFactor:
    """Scales the learning rates of optimizers during their steps only, so that any schedule continues unchanged.

    Args:
        factor: Returns the factor of the current step.
    """

    def __init__(self, factor: Callable[[], float]) -> None:
        self._factor = factor
        self._handles: list[RemovableHandle] = []
        self._kept: list[tuple[dict[str, Any], Any]] = []

    def attach(self, optimizers: Iterable[Optimizer]) -> None:
        """Scale the steps of these optimizers from now on."""
        self.detach()
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before))
            self._handles.append(optimizer.register_step_post_hook(self._after))

    def detach(self) -> None:
        """Stop scaling, also after a step that an error interrupted."""
        self._put_back()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, optimizer: Optimizer, *_: object) -> None:
        self._put_back()
        factor = self._factor()
        for group in optimizer.param_groups if factor != 1 else ():
            self._kept.append((group, group["lr"]))
            group["lr"] = group["lr"] * factor

    def _after(self, *_: object) -> None:
        self._put_back()

    def _put_back(self) -> None:
        for group, rate in self._kept:
            group["lr"] = rate
        self._kept = []


def _forget(optimizers: Iterable[Optimizer], gone: Callable[[nn.Parameter], bool]) -> None:
    for optimizer in optimizers:
        leaving = [p for group in optimizer.param_groups for p in group["params"] if gone(p)]
        for parameter in leaving:
            optimizer.state.pop(parameter, None)
        for group in optimizer.param_groups:
            group["params"][:] = [parameter for parameter in group["params"] if not gone(parameter)]
        if leaving:
            _begin_anew(optimizer)


def _begin_anew(optimizer: Optimizer) -> None:
    """Make LBFGS forget its history, which is of one flat vector over all its parameters."""
    if isinstance(optimizer, LBFGS):
        optimizer.state.clear()
        optimizer._numel_cache = None
