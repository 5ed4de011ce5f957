"""Lightning callbacks that watch, drop, quantize, recover, measure, export, report and resume inside any Trainer.

Each callback works alone, finds the transformer in any LightningModule, and keeps its state in the checkpoint. It
shares only the model, the logged metrics and the files of the run directory with the others.
"""

import sys
from typing import TYPE_CHECKING

from layershed.callbacks.best_checkpoint import BestCheckpoint
from layershed.callbacks.exact_resume import ExactResume
from layershed.callbacks.export import Export
from layershed.callbacks.lora_recovery import LoRARecovery
from layershed.callbacks.quantization import Quantization
from layershed.callbacks.redundancy_monitor import RedundancyMonitor
from layershed.callbacks.speed_monitor import SpeedMonitor
from layershed.callbacks.sublayer_drop import SublayerDrop
from layershed.callbacks.task_evaluation import TaskEvaluation
from layershed.extras import needs

if TYPE_CHECKING:
    from layershed.callbacks.report import Report

__all__ = [
    "BestCheckpoint",
    "ExactResume",
    "Export",
    "LoRARecovery",
    "Quantization",
    "RedundancyMonitor",
    "Report",
    "SpeedMonitor",
    "SublayerDrop",
    "TaskEvaluation",
]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name != "Report":
            there = sys.modules[__name__]  # for the suggestion of a name
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=there)
        with needs("report", "Report"):  # only here: the other callbacks work without matplotlib
            from layershed.callbacks.report import Report
        globals()[name] = Report
        return Report
