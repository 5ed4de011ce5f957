"""What all callbacks share: the run directory, its files, and the way to publish metrics."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import nn

from layershed.discovery.model_record import kept_model_record
from layershed.files.atomic import write_text
from layershed.integration.namespaces import DDPStrategy, LightningModule, Trainer, rank_zero_info
from layershed.planning.plan import PLAN_FILE, Drop, DropPlan, Sublayer
from layershed.stand_ins.record import overridden
from layershed.surgery import bypassed_sublayers, dropped_sublayers, removed_sublayers

Sums = dict[str, list[float]]
_AVERAGED: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()
_ELSEWHERE: WeakKeyDictionary[Trainer, Path] = WeakKeyDictionary()

IMPORTANCE_FILE = "importance.csv"
SPEED_FILE = "speed.json"
QUALITY_FILE = "quality.json"
REPORT_FILE = "report.html"


def run_directory(trainer: Trainer) -> Path:
    """The run directory, the same on every rank: the first logger's, or ``default_root_dir``.

    Nothing is written into the current directory unless a logger has its own files of each run there. It is Lightning's
    default of ``default_root_dir``, and WandbLogger's of ``save_dir``. Then the files go into ``name/version`` of the
    logger, where Lightning puts checkpoints, or into a temporary directory; that is said once.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective
    own = trainer.loggers and getattr(trainer.loggers[0], "log_dir", None) is not None
    if not own and folder.resolve() == Path.cwd().resolve():
        folder = _elsewhere(trainer)
    return _made(trainer, folder)


def _elsewhere(trainer: Trainer) -> Path:
    """A directory of this run's own instead of the current one; chosen once, as a version may be known only later."""
    if trainer not in _ELSEWHERE:
        chosen, why = "", ""
        if trainer.is_global_zero:
            logger = next(iter(trainer.loggers), None)
            name, version = (None, None) if logger is None else (logger.name, logger.version)
            if name and version is not None:
                chosen = str(Path(name) / (version if isinstance(version, str) else f"version_{version}"))
            else:
                chosen = tempfile.mkdtemp(prefix="layershed-")
            why = "there is no logger" if logger is None else "the logger's directory is the current one"
        _ELSEWHERE[trainer] = Path(trainer.strategy.broadcast(chosen)).resolve()
        rank_zero_info(
            f"layershed: {why}, so files of this run are in {_ELSEWHERE[trainer]}. To keep them elsewhere, set the "
            "Trainer's default_root_dir, or the save_dir of a logger."
        )
    return _ELSEWHERE[trainer]


def _made(trainer: Trainer, folder: Path) -> Path:
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def publish(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Log metrics at the current step, in any hook, to every logger and for monitoring by other callbacks.

    Most hooks refuse ``pl_module.log``, and it reaches the loggers only every ``log_every_n_steps``.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step)
    show(trainer, metrics)


def show(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Let other callbacks monitor metrics that are logged already, such as those of a resumed run."""
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})


def current_drop(pl_module: LightningModule) -> tuple[Sublayer, ...]:
    """The sublayers that are bypassed now, without a probe; cheap enough for every step."""
    return bypassed_sublayers(pl_module) if next(overridden(pl_module), None) else ()


def own_share(trainer: Trainer, shares: Sequence[Sums]) -> Sums:
    """This rank's part of the sums of every rank; if the number of ranks has changed, rank 0 takes them all."""
    if len(shares) == trainer.world_size:
        return shares[trainer.global_rank]
    scale = 1.0 if trainer.is_global_zero else 0.0
    columns = {name: zip(*(share[name] for share in shares), strict=True) for name in shares[0]}
    return {name: [scale * sum(values) for values in column] for name, column in columns.items()}


def plan_of(directory: Path, pl_module: LightningModule) -> DropPlan | None:
    """The current drop: the plan with scores if SublayerDrop wrote one in this run, else without scores."""
    gone, dropped = removed_sublayers(pl_module), dropped_sublayers(pl_module)
    if not dropped:
        return None
    path = directory / PLAN_FILE
    plan = DropPlan.load(path) if path.is_file() else None
    # The file may be from an earlier run in the same directory, or the user has bypassed more by hand. No plan of this
    # run lists the sublayers that the model was saved without.
    records = {record for module in pl_module.modules() if (record := kept_model_record(module)) is not None}
    if plan is not None and plan.model is not None and records and plan.model not in records:
        plan = None
    if plan is not None and tuple(sorted((*gone, *plan))) == dropped:
        return replace(plan, drops=(*(Drop(sublayer) for sublayer in gone), *plan.drops))
    return DropPlan(tuple(Drop(sublayer) for sublayer in dropped))


def save_plan(trainer: Trainer, plan: DropPlan | None) -> None:
    """Write the plan, if there is one, into the run directory."""
    folder = run_directory(trainer)  # a collective: call it on all ranks
    if plan is not None and trainer.is_global_zero:
        write_text(folder / PLAN_FILE, plan.to_json())


def rewrap(trainer: Trainer, pl_module: LightningModule) -> None:
    """Rebuild DistributedDataParallel, because it chooses the gradients to wait for at construction.

    Gradients that are being accumulated are kept.
    """
    if isinstance(trainer.strategy, DDPStrategy):
        gradients = [(parameter, parameter.grad) for parameter in pl_module.parameters() if parameter.grad is not None]
        for parameter, _ in gradients:
            parameter.grad = None
        trainer.strategy.model = pl_module
        trainer.strategy.configure_ddp()
        for parameter, gradient in gradients:
            parameter.grad = gradient if parameter.requires_grad else None
        _AVERAGED[trainer.strategy.model] = trainable_ids(pl_module)


def averaged(trainer: Trainer) -> set[int] | None:
    """The ids of the parameters whose gradients the DistributedDataParallel of :func:`rewrap` averages, if it runs."""
    model = trainer.strategy.model
    return None if model is None else _AVERAGED.get(model)


def trainable_ids(module: nn.Module) -> set[int]:
    """The ids of the trainable parameters of a module."""
    return {id(parameter) for parameter in module.parameters() if parameter.requires_grad}


class StepCounter:
    """Counts the optimizer steps of a batch: none or one with accumulation, several with manual optimization."""

    def __init__(self) -> None:
        self._last = 0
        self.stride = 1  # steps of the last batch that took any

    def start(self, trainer: Trainer, stride: int | None = None) -> None:
        """Begin counting at the trainer's current step; a resumed run passes its former stride."""
        self._last = trainer.global_step
        self.stride = stride or self.stride

    def coming(self, trainer: Trainer) -> range:
        """The steps of the next batch, if it takes as many as the last batch that took any."""
        return range(trainer.global_step + 1, trainer.global_step + 1 + self.stride)

    def taken(self, trainer: Trainer) -> range:
        """The steps since the last call, counted from 1."""
        taken = range(self._last + 1, trainer.global_step + 1)
        self._last = trainer.global_step
        self.stride = len(taken) or self.stride
        return taken
