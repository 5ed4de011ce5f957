"""Typed errors. Their texts say what failed, why, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LayershedError(Exception):
    """Base of all errors that layershed raises on purpose."""


class MissingExtraError(LayershedError, ImportError):
    """An optional package is not installed.

    Args:
        what: What needs the package.
        package: The package.
        extra: The extra of layershed that brings it.
    """

    def __init__(self, what: str, package: str, extra: str) -> None:
        self.what, self.package, self.extra = what, package, extra
        super().__init__(f'{what} needs {package}, which is not installed: pip install "layershed[{extra}]".')

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.what, self.package, self.extra)


class MissingLightningError(LayershedError, ImportError):
    """Neither of Lightning's packages is installed."""

    def __init__(self) -> None:
        super().__init__(
            "The callbacks of layershed need PyTorch Lightning, which is not installed: pip install lightning."
        )


class NoSublayersFoundError(LayershedError, ValueError):
    """The model holds no attention or MLP sublayer that can be dropped."""


class UnprovenStructureError(LayershedError, ValueError):
    """Y = X + f(norm(X)) could not be proven for a block; dropping a part of it could silently change the model."""


class AmbiguousModelError(LayershedError, ValueError):
    """A module holds more than one transformer and none was named."""


class AdapterError(LayershedError, TypeError):
    """A SublayerAdapter was registered for something that is not a subclass of ``nn.Module``."""


class UnknownNameError(LayershedError, ValueError):
    """A name is in no registry.

    Args:
        what: The kind of name, such as "metric".
        name: The unknown name.
        available: The known names.
    """

    def __init__(self, what: str, name: str, available: Iterable[str]) -> None:
        self.what, self.name, self.available = what, name, tuple(sorted(available))
        near = difflib.get_close_matches(str(name), self.available, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        super().__init__(f"Unknown {what} {name!r}. {hint}Available: {', '.join(self.available)}.")


class SelectionError(LayershedError, ValueError):
    """A count, ratio, scope or protection cannot be met."""


class ScheduleError(LayershedError, ValueError):
    """A drop schedule does not fit the run."""


class StrategyError(LayershedError, ValueError):
    """A callback does not support the Trainer's strategy."""


class PlanError(LayershedError, ValueError):
    """A drop plan is malformed or does not fit the model."""


class RevivedSublayerError(LayershedError, RuntimeError):
    """A sublayer that is recorded as dropped would run again, and its stand-in cannot be put back safely."""


class StandInError(LayershedError, NotImplementedError):
    """A dropped sublayer is called in a way in which nothing can run in its place."""


class CalibrationError(LayershedError, ValueError):
    """Importance could not be measured on the given batches."""


class NotFiniteError(CalibrationError):
    """Importance was NaN or infinite in every forward pass that had tokens.

    Args:
        skipped: The skipped forward passes, as a phrase.
    """

    def __init__(self, skipped: object) -> None:
        self.skipped = skipped
        super().__init__(
            f"{skipped}, and nothing is left to average; look for NaN in the weights and the data, or run in a wider "
            "precision (bfloat16, float32)."
        )


class CompensationError(LayershedError, ValueError):
    """What was dropped cannot be compensated for: no linear map can be fitted, or nothing can be folded in."""


class TaskError(LayershedError, ValueError):
    """A task is unknown, cannot be read or cannot be evaluated."""


class MeasurementError(LayershedError, ValueError):
    """Speed or quality could not be measured on the given model."""


class BatchError(CalibrationError, MeasurementError):
    """A batch, or an iterable of batches, is not what the model reads."""


class SpeedupError(MeasurementError):
    """A target speedup cannot be reached."""


class CostError(LayershedError, ValueError):
    """The cost of a model cannot be read off its structure."""


class RecoveryError(LayershedError, ValueError):
    """Recovery is impossible: adapters do not fit, or nothing is left to train."""


class QuantizationError(LayershedError, ValueError):
    """Weights cannot be quantized, or an operation does not support quantized weights."""


class ModelError(LayershedError, ValueError):
    """A model could not be built from its description."""


class DataError(LayershedError, ValueError):
    """A data source is missing, empty or too small, or a row of it is wrong."""


class ChatTemplateError(DataError):
    """A tokenizer has no chat template, or its template cannot write a conversation."""


class ResultError(LayershedError, ValueError):
    """A file of a run is missing, damaged or of another kind."""


class GenerationError(LayershedError, ValueError):
    """No text can be generated from these prompts, with these options, or by this model."""


class OptimizerError(LayershedError, ValueError):
    """An optimizer refuses its arguments."""


class ConfigError(LayershedError, ValueError):
    """A config file cannot be read."""


class ControlError(LayershedError, ValueError):
    """There is no control to compare a run with, or it cannot be read or compared."""


class ExportError(LayershedError, ValueError):
    """A dropped model could not be saved or loaded."""


class CheckpointError(LayershedError, ValueError):
    """A training checkpoint does not fit this run."""
