"""What the callbacks agree on: the run directory with its files, and how metrics are published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy

from layershed.files.atomic import write_text as write_text
from layershed.planning.plan import Drop, DropPlan, Sublayer
from layershed.saving.lora_folder import PLAN_FILE
from layershed.stand_ins.install import overridden
from layershed.surgery import bypassed_sublayers, dropped_sublayers, removed_sublayers

Sums = dict[str, list[float]]

IMPORTANCE_FILE = "importance.csv"
SPEED_FILE = "speed.json"
REPORT_FILE = "report.html"


def run_directory(trainer: Trainer) -> Path:
    """The directory of this run: the first logger's, or the trainer's root; the same on every rank."""
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def publish(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Log metrics at the current step, in any hook: to every logger, and where other callbacks can monitor them.

    ``pl_module.log`` is refused in most hooks, and reaches the loggers only every ``log_every_n_steps``.
    """
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step)
    show(trainer, metrics)


def show(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Put metrics where other callbacks can monitor them; for those of a resumed run, which are logged already."""
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})


def current_drop(pl_module: LightningModule) -> tuple[Sublayer, ...]:
    """What is bypassed now, without a probe: cheap enough for every step."""
    return bypassed_sublayers(pl_module) if next(overridden(pl_module), None) else ()


def own_share(trainer: Trainer, shares: Sequence[Sums]) -> Sums:
    """This rank's part of the running sums of every rank; on another number of ranks the first one takes everything."""
    if len(shares) == trainer.world_size:
        return shares[trainer.global_rank]
    scale = 1.0 if trainer.is_global_zero else 0.0
    columns = {name: zip(*(share[name] for share in shares), strict=True) for name in shares[0]}
    return {name: [scale * sum(values) for values in column] for name, column in columns.items()}


def plan_of(directory: Path, pl_module: LightningModule) -> DropPlan | None:
    """What is dropped now: the plan with its scores if SublayerDrop left one in this run, else the bare sublayers."""
    gone, dropped = removed_sublayers(pl_module), dropped_sublayers(pl_module)
    if not dropped:
        return None
    path = directory / PLAN_FILE
    plan = DropPlan.load(path) if path.is_file() else None
    # the file may be of an earlier run in the same directory, or the user has bypassed more by hand; what the model
    # lacked from the start, having been saved without it, stands in no plan of this run
    if plan is not None and tuple(sorted((*gone, *plan))) == dropped:
        return DropPlan((*(Drop(sublayer) for sublayer in gone), *plan.drops), plan.scope, plan.metric)
    return DropPlan(tuple(Drop(sublayer) for sublayer in dropped))


def rewrap(trainer: Trainer, pl_module: LightningModule) -> None:
    """DistributedDataParallel fixed at its construction which gradients it waits for: build it anew."""
    if isinstance(trainer.strategy, DDPStrategy):
        for parameter in pl_module.parameters():
            parameter.grad = None
        trainer.strategy.model = pl_module
        trainer.strategy.configure_ddp()


class StepCounter:
    """Tells which optimizer steps a batch takes: none or one by accumulation, several by manual optimization."""

    def __init__(self) -> None:
        self._last = 0
        self.stride = 1  # of the last batch that took any

    def start(self, trainer: Trainer, stride: int | None = None) -> None:
        """Begin counting at the trainer's current step, in a resumed run with the stride that it had."""
        self._last = trainer.global_step
        self.stride = stride or self.stride

    def coming(self, trainer: Trainer) -> range:
        """The steps of the coming batch, if it takes as many as the last one that took any."""
        return range(trainer.global_step + 1, trainer.global_step + 1 + self.stride)

    def taken(self, trainer: Trainer) -> range:
        """The steps since the last call, counted from 1."""
        taken = range(self._last + 1, trainer.global_step + 1)
        self._last = trainer.global_step
        self.stride = len(taken) or self.stride
        return taken
