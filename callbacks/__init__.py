"""Lightning callbacks that watch, drop, quantize, recover, measure, export, report and resume inside any Trainer.

Each callback works alone, finds the transformer in any LightningModule, and keeps its state in the checkpoint. It
shares only the model, the logged metrics and the files of the run directory with the others.
"""

from layershed.callbacks.exact_resume import ExactResume
from layershed.callbacks.export import Export
from layershed.callbacks.lora_recovery import LoRARecovery
from layershed.callbacks.quantization import Quantization
from layershed.callbacks.redundancy_monitor import RedundancyMonitor
from layershed.callbacks.report import Report
from layershed.callbacks.speed_monitor import SpeedMonitor
from layershed.callbacks.sublayer_drop import SublayerDrop

__all__ = [
    "ExactResume",
    "Export",
    "LoRARecovery",
    "Quantization",
    "RedundancyMonitor",
    "Report",
    "SpeedMonitor",
    "SublayerDrop",
]
