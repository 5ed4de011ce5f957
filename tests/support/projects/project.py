"""What a project in somebody else's manner consists of, and the trial: two lines alone, then every callback."""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import layershed as ls
from layershed.callbacks import (
    ExactResume,
    Export,
    LoRARecovery,
    Quantization,
    RedundancyMonitor,
    Report,
    SpeedMonitor,
    SublayerDrop,
)
from layershed.discovery.find import dissect, find_transformer
from layershed.integration.namespaces import Callback
from tests.support.conformance import reference

NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
VOCABULARY = 61
STEPS = 12


@dataclass(frozen=True)
class Project:
    """A small project.

    Args:
        imitates: The project in whose manner it is written.
        module: Makes the LightningModule.
        train: Makes the training loader.
        val: Makes the validation loader.
        outputs: What the module computes for fixed inputs, in eval mode.
        quality: A metric that it logs in validation.
        adapter: The class that needs a SublayerAdapter, and the adapter; None for Hugging Face models.
    """

    imitates: str
    module: Callable[[], Any]
    train: Callable[[], DataLoader[Any]]
    val: Callable[[], DataLoader[Any]]
    outputs: Callable[[Any], Tensor]
    quality: str
    adapter: tuple[type[nn.Module], ls.SublayerAdapter] | None = None


class TrialError(Exception):
    """A project does not work; the text says what is wrong."""


def namespace_of(name: str) -> Any:
    """The Lightning of that name, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def ids(rows: int, tokens: int, seed: int = 0) -> Tensor:
    """Token ids, none of them special."""
    return torch.randint(4, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def items(count: int, make: Callable[[int], Any], **options: Any) -> DataLoader[Any]:
    """A loader over made items, three a batch."""
    dataset: Any = [make(number) for number in range(count)]
    return DataLoader(dataset, batch_size=3, **options)


def louder(model: nn.Module) -> nn.Module:
    """The model with random weights large enough for every branch to matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def try_two_lines(project: Project, pl: Any, folder: Path) -> None:
    """The README's two lines in a project without a logger, and the adapter of a hand-written model.

    Raises:
        TrialError: If nothing was dropped, the outputs differ from those with zeroed branches, or files are left in the
            current directory.
    """
    _register(project)
    torch.manual_seed(0)
    module = project.module()
    with _in_directory(folder), _our_warnings() as said:
        watch = RedundancyMonitor(every_n_steps=2)
        drop = SublayerDrop(start=8, scope="attention", count=2)
        trainer = _trainer(pl, [watch, drop], logger=False)
        trainer.fit(module, project.train(), project.val())
    if left := sorted(path.name for path in folder.iterdir()):
        raise TrialError(f"files in the current directory: {', '.join(left)}")
    if said:
        raise TrialError(f"warned: {said[0]}")
    _check_drop(project, module, drop)
    if not any(name.startswith("importance/attention") for name in trainer.callback_metrics):
        raise TrialError("no importance was measured")
    missing = {"drop/loss_before", "drop/loss_after", "drop/loss_end"} - trainer.callback_metrics.keys()
    if missing:
        raise TrialError(f"{min(missing)} was not measured")


def try_everything(project: Project, pl: Any, folder: Path) -> None:
    """Every callback; Quantization of Hugging Face models alone, the only ones that it takes.

    Raises:
        TrialError: If one of them did not do its part, or merged adapters compute something else than adapters.
    """
    _register(project)
    torch.manual_seed(0)
    module = project.module()
    drop = SublayerDrop(start=6, count=2, quality=project.quality)
    speed = SpeedMonitor(runs=1, quality=project.quality, quality_mode="max")
    quantizable = project.adapter is None and find_spec("bitsandbytes") is not None
    lora = [Quantization(), LoRARecovery(rank=2, finish="dequantize")] if quantizable else [LoRARecovery(rank=2)]
    ours = [RedundancyMonitor(2), drop, *lora, speed, Export(), Report(every_n_steps=1), ExactResume()]
    adapted = AdaptedOutputs(project, folder / "step.ckpt")
    # the loggers of a namespace are those that its Trainer knows
    logger = importlib.import_module(f"{pl.__name__}.loggers").CSVLogger(folder, name="", version="")
    with _our_warnings() as said, contextlib.redirect_stdout(None):
        trainer = _trainer(pl, [adapted, *ours], logger=logger, log_every_n_steps=1)
        trainer.fit(module, project.train(), project.val())
    if said:
        raise TrialError(f"warned: {said[0]}")
    _check_drop(project, module, drop)
    written = {path.name for path in folder.iterdir()}
    expected = {"importance.csv", "drop_plan.json", "speed.json", "pruned", "report.html", "metrics.csv"}
    if missing := sorted(expected - written):
        raise TrialError(f"not written: {', '.join(missing)}")
    metrics = trainer.callback_metrics
    measured = [f"drop/{project.quality}_before", f"drop/{project.quality}_end", "drop/loss_end", "speed/sdr"]
    for name in [*measured, *(["quantization/bytes"] if quantizable else [])]:
        if name not in metrics:
            raise TrialError(f"{name} was not measured")
    expected_outputs = project.outputs(module)
    _check_merge(adapted.outputs, adapted.without, expected_outputs)
    _check_checkpoint(project, folder / "step.ckpt", drop)
    _load(project, module, folder / "pruned")
    if not torch.equal(project.outputs(module), expected_outputs):
        raise TrialError("the exported model computes something else")


class AdaptedOutputs(Callback):
    """Saves a checkpoint during recovery, and keeps the outputs with adapters and without them."""

    outputs: Tensor
    without: Tensor

    def __init__(self, project: Project, path: Path) -> None:
        self.project, self.path = project, path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == STEPS - 4:
            trainer.save_checkpoint(self.path)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.outputs = self.project.outputs(pl_module)
        with ls.adapters_off(pl_module):
            self.without = self.project.outputs(pl_module)


def _check_merge(adapted: Tensor, without: Tensor, merged: Tensor) -> None:
    if torch.allclose(adapted, without, atol=1e-4):
        raise TrialError("the adapters change nothing, so the trial shows nothing")
    if not torch.allclose(adapted, merged, atol=1e-4, rtol=1e-4):
        raise TrialError(f"outputs of merged adapters differ by {(adapted - merged).abs().max():.1e}")


def _check_checkpoint(project: Project, path: Path, drop: SublayerDrop) -> None:
    fresh = project.module()
    ls.load_checkpoint(fresh, path)
    if drop.plan is None or set(drop.plan) != set(ls.dropped_sublayers(fresh)):
        raise TrialError("the checkpoint of the run has another drop")
    if not any(".lora_A." in name for name, _ in fresh.named_parameters()):
        raise TrialError("the checkpoint of the run has no adapters")


def _check_drop(project: Project, module: Any, drop: SublayerDrop) -> None:
    """Two sublayers are dropped, and the outputs are those of zeroed branches."""
    dropped = ls.dropped_sublayers(module)
    if drop.plan is None or len(drop.plan) != 2 or set(drop.plan) != set(dropped):
        raise TrialError(f"dropped {len(dropped)} sublayers instead of 2")
    other = _alone(module)
    ls.restore(other)
    dense = project.outputs(other)
    transformer = find_transformer(other)
    anatomy = dissect(transformer)
    case: Any = SimpleNamespace(model=transformer, anatomy=anatomy)
    silent = reference(case, [branch for branch in anatomy.branches if branch.sublayer in dropped])
    _put(other, transformer, silent)
    found, expected = project.outputs(module), project.outputs(other)
    if torch.allclose(dense, expected, atol=1e-4):
        raise TrialError("the drop changes nothing, so the trial shows nothing")
    if not torch.allclose(found, expected, atol=1e-4, rtol=1e-4):
        raise TrialError(f"outputs differ from zeroed branches by {(found - expected).abs().max():.1e}")


def _load(project: Project, module: Any, folder: Path) -> None:
    """Put the exported model in the place of the trained one."""
    transformer = find_transformer(module)
    if project.adapter is None:
        _put(module, transformer, ls.load_pretrained(folder))
    else:
        fresh = project.module()
        ls.load_weights(fresh, folder)
        _put(module, transformer, find_transformer(fresh))


def _put(module: Any, old: nn.Module, new: nn.Module) -> None:
    path = next(path for path, inner in module.named_modules() if inner is old)
    module.set_submodule(path, new)


def _alone(module: Any) -> Any:
    """A copy without the Trainer."""
    module.trainer = None
    return copy.deepcopy(module)


def _register(project: Project) -> None:
    if project.adapter is not None:
        ls.register_adapter(*project.adapter)


def _trainer(pl: Any, callbacks: list[Any], **options: Any) -> Any:
    return pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **options,
    )


@contextlib.contextmanager
def _in_directory(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _our_warnings() -> Iterator[list[str]]:
    """The warnings of layershed; those of others, which are about tiny data and few workers, are not shown."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    callbacks = ("RedundancyMonitor", "SublayerDrop", "Quantization", "SpeedMonitor", "LoRARecovery", "Export")
    ours = (*callbacks, "Report", "ExactResume", "layershed")
    said += [str(warning.message) for warning in caught if str(warning.message).startswith(ours)]
