"""The course of a run, as a report notes it: losses, learning rate, throughput, and when the model was quantized."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from layershed.batches import as_inputs
from layershed.integration.lightning_private import rows_of
from layershed.integration.metric_names import BYTES
from layershed.integration.namespaces import Trainer
from layershed.planning.plan import Sublayer
from layershed.reporting.downsampling import ThinnedCurve
from layershed.reporting.record import LossPoint

# own: the module's own validations; val: also the qualities around a drop
_TIMES = "layershed_times"
CURVES = ("train", "val", "own", "lr", "throughput")


class Course:
    """Curves of a run, short in a long run, and the time that it took.

    The learning rate is that of the first parameter group, in the step itself. Throughput counts all ranks. It is a
    mean over the steps since the last point, without validations; there is none where the model has changed.
    """

    def __init__(self) -> None:
        self.curves = {name: ThinnedCurve() for name in CURVES}
        self.quantized: int | None = None
        self.unit = "tokens/s"
        self.seconds = 0.0  # of earlier parts of a resumed run
        self._began = time.monotonic()
        self._rate: float | None = None
        self._since: float | None = None  # when the first batch after the last point began, moved by each pause
        self._paused: float | None = None
        self._units = 0
        self._dropped: tuple[Sublayer, ...] = ()

    def start(self) -> None:
        """Begin to measure time."""
        self._began, self._since, self._units = time.monotonic(), None, 0

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, validation and saving included."""
        return self.seconds + time.monotonic() - self._began

    def batch_begins(self, trainer: Trainer) -> None:
        """Note the learning rate of the coming step."""
        groups = trainer.optimizers[0].param_groups if trainer.optimizers else []
        self._rate = float(groups[0]["lr"]) if groups else None
        if self._since is None:
            self._since, self._units = time.monotonic(), 0

    def batch_ends(self, trainer: Trainer, batch: Any, dropped: tuple[Sublayer, ...]) -> None:
        """Count what was read, and note a drop or a quantization, with which more than training took time."""
        if dropped != self._dropped:
            self._dropped = dropped
            self.interrupt()
        inputs = as_inputs(batch)
        ids = None if inputs is None else inputs.get("input_ids")
        tokens = isinstance(ids, Tensor)
        self.unit = "tokens/s" if tokens else "samples/s"
        self._units += trainer.world_size * (ids.numel() if tokens and isinstance(ids, Tensor) else rows_of(batch))
        self.note_quantization(trainer)

    def note_quantization(self, trainer: Trainer) -> None:
        """Note the step at which Quantization logged the bytes of the weights."""
        if self.quantized is None and BYTES in trainer.callback_metrics:
            self.quantized = trainer.global_step
            self.interrupt()

    def point(self, step: int, loss: float) -> None:
        """Note a training loss, and with it the learning rate and the throughput since the last one."""
        self.curves["train"].add(step, loss)
        if self._rate is not None:
            self.curves["lr"].add(step, self._rate)
        now = time.monotonic()
        if self._since is not None and now > self._since and self._units:
            self.curves["throughput"].add(step, self._units / (now - self._since))
        self._since = None

    def validation(self, step: int, loss: float) -> None:
        """Note a loss of the module's own validation."""
        for name in ("val", "own"):
            self.curves[name].add(step, loss)

    def quality(self, step: int, loss: float | None) -> None:
        """Note a loss around a drop, and keep the points beside it."""
        for name in ("train", "val"):
            self.curves[name].mark()
        if loss is not None:
            self.curves["val"].add(step, loss)
            self.curves["val"].mark()
        self.interrupt()

    def interrupt(self) -> None:
        """Leave out the throughput until the next point: something else took time."""
        self._since = None

    def pause(self) -> None:
        """A validation begins."""
        self._paused = time.monotonic()

    def go_on(self) -> None:
        """It has ended."""
        if self._since is not None and self._paused is not None:
            self._since += time.monotonic() - self._paused
        self._paused = None

    def losses(self) -> tuple[LossPoint, ...]:
        """The losses, by step."""
        points = [LossPoint(step, name, loss) for name in ("train", "val") for step, loss in self.curves[name]]
        return tuple(sorted(points, key=lambda point: point.step))

    def others(self) -> dict[str, tuple[tuple[int, float], ...]]:
        """Learning rate and throughput, by their names in a picture."""
        names = {"learning rate": "lr", f"throughput ({self.unit})": "throughput"}
        return {shown: points for shown, name in names.items() if (points := tuple(self.curves[name]))}

    def events(self) -> tuple[tuple[int, str], ...]:
        """When the model was quantized."""
        return () if self.quantized is None else ((self.quantized, "quantized"),)

    def state_dict(self) -> dict[str, Any]:
        """What is the same in every run of the same config, as primitives."""
        curves = {name: curve.state_dict() for name, curve in self.curves.items() if name != "throughput"}
        return {"losses": curves, "quantized": self.quantized}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; checkpoints of earlier versions have fewer curves."""
        for name, curve in self.curves.items():
            if name in state["losses"]:
                curve.load_state_dict(state["losses"][name])
        self.quantized = state.get("quantized")

    def save_times(self, checkpoint: dict[str, Any]) -> None:
        """Note throughput and duration in a checkpoint, apart from the state: no two runs have the same."""
        checkpoint[_TIMES] = {"throughput": self.curves["throughput"].state_dict(), "seconds": self.elapsed}

    def load_times(self, checkpoint: dict[str, Any]) -> None:
        """The inverse of :meth:`save_times`."""
        if noted := checkpoint.get(_TIMES):
            self.curves["throughput"].load_state_dict(noted["throughput"])
            self.seconds = noted["seconds"]
