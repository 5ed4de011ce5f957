"""Measures the speedup of the dropped model beside its training metrics."""

from __future__ import annotations

import json
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from layershed.callbacks.run import SPEED_FILE, current_drop, publish, run_directory, show, write_text
from layershed.discovery import find_transformer
from layershed.plan import Sublayer
from layershed.speed import SpeedReport, check_room, measure_speed, speedup_degradation_ratio
from layershed.surgery import removed_sublayers


class SpeedMonitor(Callback):
    """Measures prefill and cached decode, dense against dropped, after every drop.

    Hooks: measures in ``on_train_batch_end`` and ``on_train_end`` if the set of bypassed sublayers has changed; list it
    behind SublayerDrop to measure at the very step of the drop.
    Logs: ``speed/prefill_speedup``, ``speed/decode_speedup`` and their ``_low`` and ``_high`` (95 % interval), tokens
    per second, parameters, KV-cache bytes per token, and ``speed/sdr`` where SublayerDrop logged the accuracy around
    the drop.
    Writes: ``speed.json`` in the run directory, the last measurement.
    Checkpoint: the last measurement, so that a resumed run does not repeat it.

    Args:
        prompt_tokens: Tokens per prompt.
        new_tokens: Tokens decoded one at a time.
        batch_size: Sequences at once.
        runs: Number of dense and dropped pairs.
        transformer: Path of the transformer in the LightningModule; needed only where it holds more than one.

    Raises:
        MeasurementError: Before training, if a number is below 1 or the model has no place for that many tokens.
    """

    def __init__(
        self,
        prompt_tokens: int = 128,
        new_tokens: int = 32,
        batch_size: int = 1,
        runs: int = 5,
        transformer: str | None = None,
    ) -> None:
        self.prompt_tokens, self.new_tokens, self.batch_size, self.runs = prompt_tokens, new_tokens, batch_size, runs
        self.transformer = transformer
        self.report: SpeedReport | None = None
        self._measured: tuple[Sublayer, ...] = ()
        self._latest: dict[str, float] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse settings that cannot be measured."""
        check_room(
            find_transformer(pl_module, name=self.transformer),
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            batch_size=self.batch_size,
            runs=self.runs,
        )
        if gone := removed_sublayers(pl_module):
            rank_zero_warn(
                f"SpeedMonitor measures nothing: the model was saved without {', '.join(s.name for s in gone)}, so "
                "that there is no dense one to compare with."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run starts with the measurement that it had."""
        self._save(trainer)
        show(trainer, self._latest)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure if something was dropped or restored."""
        self._measure_if_changed(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what was dropped at the very end."""
        self._measure_if_changed(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The last measurement, as primitives."""
        measured = [[s.block, s.kind, s.path] for s in self._measured]
        report = None if self.report is None else self.report.to_dict()
        return {"report": report, "measured": measured, "latest": self._latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.report = None if state_dict["report"] is None else SpeedReport.from_dict(state_dict["report"])
        self._measured = tuple(Sublayer(*fields) for fields in state_dict["measured"])
        self._latest = state_dict["latest"]

    def _measure_if_changed(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if removed_sublayers(pl_module):
            return
        dropped = current_drop(pl_module)
        if dropped == self._measured:
            return
        self._measured = dropped
        if not dropped:
            self.report, self._latest = None, {}
            return
        with trainer.precision_plugin.forward_context():
            self.report = measure_speed(
                pl_module,
                prompt_tokens=self.prompt_tokens,
                new_tokens=self.new_tokens,
                batch_size=self.batch_size,
                runs=self.runs,
                name=self.transformer,
            )
        self._save(trainer)
        self._latest = self._metrics(trainer, self.report)
        publish(trainer, self._latest)

    def _metrics(self, trainer: Trainer, report: SpeedReport) -> dict[str, float]:
        metrics: dict[str, float] = {
            "speed/parameters": float(report.parameters_dropped),
            "speed/kv_bytes_per_token": report.kv_bytes_dropped,
        }
        for name, phase in (("prefill", report.prefill), ("decode", report.decode)):
            metrics[f"speed/{name}_tokens_per_s_dense"] = phase.dense
            metrics[f"speed/{name}_tokens_per_s"] = phase.dropped
            metrics[f"speed/{name}_speedup"] = phase.speedup.median
            metrics[f"speed/{name}_speedup_low"] = phase.speedup.low
            metrics[f"speed/{name}_speedup_high"] = phase.speedup.high
        before, after = (trainer.callback_metrics.get(f"drop/accuracy_{when}") for when in ("before", "after"))
        if before is not None and after is not None:
            lost = 100 * (before.item() - after.item())
            metrics["speed/sdr"] = speedup_degradation_ratio(lost, report.decode.speedup.median)
        return metrics

    def _save(self, trainer: Trainer) -> None:
        folder = run_directory(trainer)
        if self.report is not None and trainer.is_global_zero:
            write_text(folder / SPEED_FILE, json.dumps(self.report.to_dict(), indent=2) + "\n")
