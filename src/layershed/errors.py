"""Typed errors: each carries what it was given and says what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LayershedError(Exception):
    """Base of every error that layershed raises on purpose; its text is one sentence for a person."""


class NoSublayersFoundError(LayershedError, ValueError):
    """The model holds no attention or MLP sublayer that can be dropped."""


class UnprovenStructureError(LayershedError, ValueError):
    """A residual branch did not satisfy Y = X + f(norm(X)); dropping it could silently change the model."""


class AmbiguousModelError(LayershedError, ValueError):
    """A module holds more than one transformer and none was named."""


class AdapterError(LayershedError, TypeError):
    """A SublayerAdapter was registered for something that is no class of modules."""


class UnknownNameError(LayershedError, ValueError):
    """A name is in no registry.

    Args:
        what: What the name stands for, such as "metric".
        name: The name that was asked for.
        available: The names that exist.
    """

    def __init__(self, what: str, name: str, available: Iterable[str]) -> None:
        self.what, self.name, self.available = what, name, tuple(sorted(available))
        near = difflib.get_close_matches(name, self.available, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        super().__init__(f"Unknown {what} {name!r}. {hint}Available: {', '.join(self.available)}.")


class SelectionError(LayershedError, ValueError):
    """A count, ratio, scope or protection that cannot be met."""


class ScheduleError(LayershedError, ValueError):
    """A drop schedule that cannot happen in this run."""


class StrategyError(LayershedError, ValueError):
    """The Trainer's strategy keeps the weights in a way that does not let a callback do its work."""


class PlanError(LayershedError, ValueError):
    """A drop plan that is malformed, or that does not fit the model."""


class CalibrationError(LayershedError, ValueError):
    """Importance could not be measured on the given batches."""


class NotFiniteError(CalibrationError):
    """No importance is left to average: it was NaN or infinite in every forward pass that had tokens.

    Args:
        skipped: The forward passes that were left out, as words.
    """

    def __init__(self, skipped: object) -> None:
        self.skipped = skipped
        super().__init__(
            f"{skipped}, and nothing is left to average; look for NaN in the weights and the data, or run in a wider "
            "precision (bfloat16, float32)."
        )


class MeasurementError(LayershedError, ValueError):
    """Speed or quality could not be measured on the given model."""


class SpeedupError(MeasurementError):
    """A target speedup that cannot be reached."""


class CostError(LayershedError, ValueError):
    """What a model computes cannot be told from its structure."""


class RecoveryError(LayershedError, ValueError):
    """Recovery that cannot happen as asked: adapters that do not fit, or nothing left to train."""


class QuantizationError(LayershedError, ValueError):
    """Weights that cannot be quantized, or an operation that quantized weights do not bear."""


class ModelError(LayershedError, ValueError):
    """A model could not be built from what was asked for."""


class DataError(LayershedError, ValueError):
    """A data source that is missing, empty or too small."""


class OptimizerError(LayershedError, ValueError):
    """Arguments that an optimizer refuses."""


class ConfigError(LayershedError, ValueError):
    """A config file that cannot be read."""


class ExportError(LayershedError, ValueError):
    """A dropped model could not be saved or loaded."""


class CheckpointError(LayershedError, ValueError):
    """A training checkpoint does not fit this run."""
