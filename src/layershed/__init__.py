"""Training-aware layer dropping for transformers on PyTorch Lightning.

The functions work on any Hugging Face transformer, inside or outside of training; the Lightning callbacks that decide
when to call them are in :mod:`layershed.callbacks`.
"""

from layershed.adapter import SublayerAdapter, register_adapter
from layershed.adapter_folder import load_adapter, save_adapter
from layershed.branches import LeftAlone
from layershed.calibration import ImportanceTracker, estimate_importance
from layershed.checkpoint import load_checkpoint
from layershed.costs import CostModel, PassCosts
from layershed.discovery import find_left_alone, find_sublayers, find_transformer
from layershed.distillation import Distillation, self_distillation_loss
from layershed.errors import LayershedError
from layershed.export import load_plan, load_pretrained, save_pretrained
from layershed.functional import angular, cosine_importance, relative_magnitude
from layershed.intervals import Interval
from layershed.latency import Latency, measure_latency
from layershed.metrics import METRICS, Angular, CosineImportance, ImportanceMetric, RelativeMagnitude
from layershed.plan import Drop, DropPlan, ImportanceScores, Sublayer
from layershed.pruning import drop_sublayers
from layershed.quality import Quality, evaluate_quality
from layershed.quantization import dequantize, quantization_of, quantize
from layershed.recovery import adapters_off, inject_lora, merge_lora, remove_lora
from layershed.roofline import ACCELERATORS, Ceilings, Cost, accelerator, measure_ceilings
from layershed.schedule import DropSchedule
from layershed.selection import select_sublayers
from layershed.speed import PhaseSpeed, SpeedReport, measure_speed, speedup_degradation_ratio
from layershed.stopwatch import SpeedSettings
from layershed.surgery import bypass, bypassed_sublayers, dense, dropped_sublayers, remove, removed_sublayers, restore
from layershed.targeting import drop_to_speedup

__all__ = [
    "ACCELERATORS",
    "METRICS",
    "Angular",
    "Ceilings",
    "CosineImportance",
    "Cost",
    "CostModel",
    "Distillation",
    "Drop",
    "DropPlan",
    "DropSchedule",
    "ImportanceMetric",
    "ImportanceScores",
    "ImportanceTracker",
    "Interval",
    "Latency",
    "LayershedError",
    "LeftAlone",
    "PassCosts",
    "PhaseSpeed",
    "Quality",
    "RelativeMagnitude",
    "SpeedReport",
    "SpeedSettings",
    "Sublayer",
    "SublayerAdapter",
    "accelerator",
    "adapters_off",
    "angular",
    "bypass",
    "bypassed_sublayers",
    "cosine_importance",
    "dense",
    "dequantize",
    "drop_sublayers",
    "drop_to_speedup",
    "dropped_sublayers",
    "estimate_importance",
    "evaluate_quality",
    "find_left_alone",
    "find_sublayers",
    "find_transformer",
    "inject_lora",
    "load_adapter",
    "load_checkpoint",
    "load_plan",
    "load_pretrained",
    "measure_ceilings",
    "measure_latency",
    "measure_speed",
    "merge_lora",
    "quantization_of",
    "quantize",
    "register_adapter",
    "relative_magnitude",
    "remove",
    "remove_lora",
    "removed_sublayers",
    "restore",
    "save_adapter",
    "save_pretrained",
    "select_sublayers",
    "self_distillation_loss",
    "speedup_degradation_ratio",
]
