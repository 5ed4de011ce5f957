"""Training-aware layer dropping for transformers on PyTorch Lightning.

The functions work on any Hugging Face transformer, inside or outside of training. The Lightning callbacks that decide
when to call them are in :mod:`layershed.callbacks`.

Importing this package imports nothing else (PEP 562): each public name imports its own module at its first use.
"""

from __future__ import annotations

import difflib
import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names for type checkers and editors; a test compares them with the table below
    from layershed.compensation.fit import LinearMaps, fit_linear_maps
    from layershed.compensation.fold import Fold, compensate
    from layershed.discovery.branches import LeftAlone
    from layershed.discovery.find import find_left_alone, find_sublayers, find_transformer
    from layershed.discovery.registry import SublayerAdapter, register_adapter
    from layershed.drop import DropMethod, drop_sublayers
    from layershed.errors import LayershedError
    from layershed.evaluation.long_context import loss_by_position, passkey_retrieval
    from layershed.evaluation.results import TaskResults, TaskScore
    from layershed.evaluation.tasks import evaluate_tasks
    from layershed.importance.damage import leave_one_out
    from layershed.importance.functional import angular, cosine_importance, relative_magnitude
    from layershed.importance.metrics import METRICS, Angular, CosineImportance, ImportanceMetric, RelativeMagnitude
    from layershed.importance.tracker import ImportanceTracker, estimate_importance
    from layershed.performance.costs import CostModel, PassCosts
    from layershed.performance.forward import ForwardReport, measure_forward
    from layershed.performance.intervals import Interval
    from layershed.performance.latency import Latency, measure_latency
    from layershed.performance.roofline import ACCELERATORS, Ceilings, Cost, accelerator, measure_ceilings
    from layershed.performance.speed import PhaseSpeed, SpeedReport, measure_speed, speedup_degradation_ratio
    from layershed.performance.speedup_target import drop_to_speedup
    from layershed.performance.stopwatch import SpeedSettings
    from layershed.planning.model_record import ModelRecord
    from layershed.planning.plan import Drop, DropPlan, ImportanceScores, Sublayer
    from layershed.planning.schedule import DropSchedule
    from layershed.planning.selection import select_sublayers
    from layershed.quality import Quality, evaluate_quality
    from layershed.quantization import dequantize, quantization_of, quantize
    from layershed.recovery.distillation import Distillation, self_distillation_loss
    from layershed.recovery.lora import adapters_off, inject_lora, merge_lora, remove_lora
    from layershed.saving.checkpoint import load_checkpoint
    from layershed.saving.lora_folder import load_adapter, save_adapter
    from layershed.saving.own_model import load_weights, save_weights
    from layershed.saving.pretrained import load_plan, load_pretrained, save_pretrained
    from layershed.search.greedy import greedy_search
    from layershed.stand_ins.linear_map import LinearMap
    from layershed.surgery import (
        bypass,
        bypassed_sublayers,
        dense,
        dropped_sublayers,
        linear_maps,
        remove,
        removed_sublayers,
        restore,
    )

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
    "DropMethod",
    "DropPlan",
    "DropSchedule",
    "Fold",
    "ForwardReport",
    "ImportanceMetric",
    "ImportanceScores",
    "ImportanceTracker",
    "Interval",
    "Latency",
    "LayershedError",
    "LeftAlone",
    "LinearMap",
    "LinearMaps",
    "ModelRecord",
    "PassCosts",
    "PhaseSpeed",
    "Quality",
    "RelativeMagnitude",
    "SpeedReport",
    "SpeedSettings",
    "Sublayer",
    "SublayerAdapter",
    "TaskResults",
    "TaskScore",
    "accelerator",
    "adapters_off",
    "angular",
    "bypass",
    "bypassed_sublayers",
    "compensate",
    "cosine_importance",
    "dense",
    "dequantize",
    "drop_sublayers",
    "drop_to_speedup",
    "dropped_sublayers",
    "estimate_importance",
    "evaluate_quality",
    "evaluate_tasks",
    "find_left_alone",
    "find_sublayers",
    "find_transformer",
    "fit_linear_maps",
    "greedy_search",
    "inject_lora",
    "leave_one_out",
    "linear_maps",
    "load_adapter",
    "load_checkpoint",
    "load_plan",
    "load_pretrained",
    "load_weights",
    "loss_by_position",
    "measure_ceilings",
    "measure_forward",
    "measure_latency",
    "measure_speed",
    "merge_lora",
    "passkey_retrieval",
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
    "save_weights",
    "select_sublayers",
    "self_distillation_loss",
    "speedup_degradation_ratio",
]

# Which module defines which names.
_NAMES = {
    "discovery.branches": ("LeftAlone",),
    "discovery.find": ("find_left_alone", "find_sublayers", "find_transformer"),
    "discovery.registry": ("SublayerAdapter", "register_adapter"),
    "compensation.fit": ("LinearMaps", "fit_linear_maps"),
    "compensation.fold": ("Fold", "compensate"),
    "drop": ("DropMethod", "drop_sublayers"),
    "errors": ("LayershedError",),
    "evaluation.long_context": ("loss_by_position", "passkey_retrieval"),
    "evaluation.results": ("TaskResults", "TaskScore"),
    "evaluation.tasks": ("evaluate_tasks",),
    "importance.damage": ("leave_one_out",),
    "importance.functional": ("angular", "cosine_importance", "relative_magnitude"),
    "importance.metrics": ("METRICS", "Angular", "CosineImportance", "ImportanceMetric", "RelativeMagnitude"),
    "importance.tracker": ("ImportanceTracker", "estimate_importance"),
    "performance.costs": ("CostModel", "PassCosts"),
    "performance.intervals": ("Interval",),
    "performance.latency": ("Latency", "measure_latency"),
    "performance.roofline": ("ACCELERATORS", "Ceilings", "Cost", "accelerator", "measure_ceilings"),
    "performance.forward": ("ForwardReport", "measure_forward"),
    "performance.speed": ("PhaseSpeed", "SpeedReport", "measure_speed", "speedup_degradation_ratio"),
    "performance.speedup_target": ("drop_to_speedup",),
    "performance.stopwatch": ("SpeedSettings",),
    "planning.model_record": ("ModelRecord",),
    "planning.plan": ("Drop", "DropPlan", "ImportanceScores", "Sublayer"),
    "planning.schedule": ("DropSchedule",),
    "planning.selection": ("select_sublayers",),
    "quality": ("Quality", "evaluate_quality"),
    "quantization": ("dequantize", "quantization_of", "quantize"),
    "recovery.distillation": ("Distillation", "self_distillation_loss"),
    "recovery.lora": ("adapters_off", "inject_lora", "merge_lora", "remove_lora"),
    "saving.checkpoint": ("load_checkpoint",),
    "saving.lora_folder": ("load_adapter", "save_adapter"),
    "saving.own_model": ("load_weights", "save_weights"),
    "saving.pretrained": ("load_plan", "load_pretrained", "save_pretrained"),
    "search.greedy": ("greedy_search",),
    "stand_ins.linear_map": ("LinearMap",),
    "surgery": (
        "bypass",
        "bypassed_sublayers",
        "dense",
        "dropped_sublayers",
        "linear_maps",
        "remove",
        "removed_sublayers",
        "restore",
    ),
}
_MODULES = {name: f"layershed.{module}" for module, names in _NAMES.items() for name in names}


if not TYPE_CHECKING:  # a type checker would take every misspelt name for an attribute

    def __getattr__(name: str) -> object:
        if name in _MODULES:
            value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
            return value
        if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
            return importlib.import_module(f"{__name__}.{name}")  # layershed.errors, layershed.callbacks
        near = difflib.get_close_matches(name, __all__, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}", name=name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
