"""Measures the speedup of the dropped model beside its training metrics."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from typing import Any, Literal, get_args

from layershed.discovery.find import find_transformer
from layershed.errors import MeasurementError, UnknownNameError
from layershed.integration.metric_names import SDR, quality_name
from layershed.integration.module_hooks import leave_structure, watch_for_bypass, watch_for_changes
from layershed.integration.namespaces import Callback, LightningModule, Trainer, rank_zero_warn
from layershed.integration.preflight import callbacks_of
from layershed.integration.protocols import Drops
from layershed.integration.run import SPEED_FILE, current_drop, publish, run_directory, show, write_text
from layershed.integration.speed_measuring import SpeedTrial, figures, speed_trial
from layershed.integration.strategies import refuse_sharded_speed
from layershed.integration.watching import Watcher
from layershed.performance.forward import measure_forward
from layershed.performance.speed import measure_speed
from layershed.performance.speed_report import MeasuredSpeed, report_from
from layershed.performance.stopwatch import Phase
from layershed.planning.plan import Sublayer
from layershed.surgery import removed_sublayers

Better = Literal["max", "min"]
# The qualities that SublayerDrop measures around the drop, and whether higher or lower is better.
_AROUND_THE_DROP: dict[str, Better] = {"accuracy": "max", "loss": "min", "perplexity": "min"}

_QUALITY = "the quality of a validation, and the SDR with it,"


class SpeedMonitor(Callback):
    """Measures the speed after every drop, dense against dropped, and the quality that it costs.

    Of a causal language model it measures prefill and cached decode. Of any other model it measures the forward pass,
    and of an encoder-decoder also its encoder, in tokens, images or sequences.

    Hooks: measures in ``on_train_batch_end`` and ``on_train_end`` if the set of bypassed sublayers has changed. List it
    after SublayerDrop to measure at the step of the drop. It reads a quality of the module in ``on_validation_end``.
    Logs:

    - ``speed/prefill_speedup``, ``speed/decode_speedup``, and their ``_low`` and ``_high`` (95 % interval);
    - ``speed/prefill_predicted``, ``speed/decode_predicted``, the speedups that the roofline model predicts;
    - ``speed/prefill_ms``, until the prompt is read, and ``speed/decode_ms``, per token, of the dropped model;
    - ``speed/prefill_tokens_per_s``, ``speed/decode_tokens_per_s``, and their ``_dense`` of the dense model;
    - of another model ``speed/forward_speedup``, ``speed/forward_ms``, ``speed/forward_tokens_per_s`` (or ``images``,
      ``sequences``) and so on, and ``speed/encoder_speedup``;
    - ``speed/parameters``, ``speed/kv_bytes_per_token``, ``speed/peak_memory`` and ``speed/file_bytes``, of the dropped
      model;
    - ``speed/sdr``, points of quality lost per percent of speed gained.

    Writes: ``speed.json`` in the run directory, the last measurement. A measurement that fails during training is left
    out with a warning.
    Checkpoint: the last measurement and the dense quality. A resumed run does not repeat them.

    Args:
        prompt_tokens: Tokens per prompt, or per sequence of a forward pass. None for 128, or what fits into the model.
        new_tokens: Tokens decoded one at a time. None for 32, or what fits into the model.
        batch_size: Sequences or images at once.
        runs: Number of pairs of a dense and a dropped run.
        transformer: Path of the transformer in the LightningModule; needed only if it holds several.
        quality: The quality in SDR; None for no SDR. SublayerDrop measures ``accuracy``, ``loss`` and ``perplexity``
            around every drop, and SDR is logged with each measurement. If it measures no accuracy, as of a model that
            is no causal language model, its loss takes the place of accuracy. Any other word is a metric that the
            module logs in validation, or that SublayerDrop measures. The last validation before the drop gives its
            dense value, and each validation after a measurement logs SDR. A point is 0.01: a percentage point of a
            share, 0.01 of a loss.
        quality_mode: Whether ``max`` or ``min`` is better; needed only for a metric of the module.
        phase: The speedup in SDR, ``decode`` or ``prefill``; of other models it is the forward pass.

    Raises:
        MeasurementError: If quality_mode is missing or contradicts the quality; before training, if a number is below
            1, the model has too few positions for the tokens, or nothing measures the quality.
        UnknownNameError: If the phase is unknown.
        StrategyError: Before training, if FSDP2 shards the weights.
    """

    def __init__(
        self,
        prompt_tokens: int | None = None,
        new_tokens: int | None = None,
        batch_size: int = 1,
        runs: int = 9,
        transformer: str | None = None,
        quality: str | None = "accuracy",
        quality_mode: Better | None = None,
        phase: Phase = "decode",
    ) -> None:
        if phase not in get_args(Phase):
            raise UnknownNameError("phase", phase, get_args(Phase))
        self.prompt_tokens, self.new_tokens, self.batch_size, self.runs = prompt_tokens, new_tokens, batch_size, runs
        self.transformer, self.phase = transformer, phase
        self.quality, self.quality_mode = quality, _mode_of(quality, quality_mode)
        self.report: MeasuredSpeed | None = None
        self._trial: SpeedTrial | None = None
        self._watcher = Watcher("SpeedMonitor")
        self._measured: tuple[Sublayer, ...] = ()
        self._latest: dict[str, float] = {}
        self._dense_quality: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start from the beginning unless the model is still the one that was measured."""
        watch_for_changes(pl_module, self.transformer)
        if stage != "fit":
            return
        self._watcher.forget()
        dropped = current_drop(pl_module)
        if dropped != self._measured or (not dropped and trainer.global_step == 0):
            # a resumed run loads the checkpoint's state later
            self.report, self._measured, self._latest, self._dense_quality = None, (), {}, None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the hooks of a module that is in its original state."""
        leave_structure(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse settings that cannot be measured."""
        watch_for_changes(pl_module, self.transformer)
        refuse_sharded_speed(trainer, "SpeedMonitor")
        transformer = find_transformer(pl_module, name=self.transformer)
        self._trial = speed_trial(transformer, self.prompt_tokens, self.new_tokens, self.batch_size, self.runs)
        if self._trial.reason:
            rank_zero_warn(f"SpeedMonitor measures the forward pass instead of decoding. {self._trial.reason}")
        if gone := removed_sublayers(pl_module):
            rank_zero_warn(
                f"SpeedMonitor measures nothing: the model was saved without {_names(gone)}, "
                "so there is no dense model to compare with."
            )
        else:
            self._check_quality(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the last measurement in a resumed run."""
        self._save(trainer)
        show(trainer, self._latest)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure if a sublayer was dropped or restored."""
        watch_for_bypass(pl_module, self.transformer)
        self._measure_if_changed(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the module's own quality: the dense value, or the dropped model's value and its SDR."""
        if self.quality is None or self.quality in _AROUND_THE_DROP:
            return
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        dropped = current_drop(pl_module)
        with self._watcher.leaving_out(_QUALITY):
            self._note_quality(trainer, self.quality, dropped)

    def _note_quality(self, trainer: Trainer, quality: str, dropped: tuple[Sublayer, ...]) -> None:
        value = trainer.callback_metrics.get(quality)
        if value is None:
            raise UnknownNameError("metric of the validation", quality, trainer.callback_metrics)
        if not dropped:
            self._dense_quality = value.item()
        elif self.report is not None and self._dense_quality is not None and dropped == self._measured:
            sdr = {SDR: self._sdr(self.report, self._dense_quality, value.item(), self.quality_mode)}
            self._latest.update(sdr)
            publish(trainer, sdr)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure a drop at the very end."""
        self._measure_if_changed(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the hooks of a module that is in its original state, after an error too."""
        leave_structure(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The last measurement, as primitives."""
        measured = [[s.block, s.kind, s.path] for s in self._measured]
        report = None if self.report is None else self.report.to_dict()
        latest, dense = dict(self._latest), self._dense_quality
        return {"report": report, "measured": measured, "latest": latest, "dense_quality": dense}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.report = None if state_dict["report"] is None else report_from(state_dict["report"])
        self._measured = tuple(Sublayer(*fields) for fields in state_dict["measured"])
        self._latest = state_dict["latest"]
        self._dense_quality = state_dict["dense_quality"]

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
        before, self.report = self.report, None
        with self._watcher.leaving_out("a measurement"):
            self._measure(trainer, pl_module)
        if self.report is None:  # no speed of an earlier drop may stand for this one's
            self._latest = {}
            if before is not None and trainer.is_global_zero:
                (run_directory(trainer) / SPEED_FILE).unlink(missing_ok=True)

    def _measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._trial is not None, "on_fit_start comes first"
        settings = self._trial.settings
        numbers: Any = {"batch_size": settings.batch_size, "runs": settings.runs, "name": self.transformer}
        prompt, new = settings.prompt_tokens, settings.new_tokens
        with trainer.precision_plugin.forward_context():
            if self._trial.generates:
                self.report = measure_speed(pl_module, prompt_tokens=prompt, new_tokens=new, **numbers)
            else:
                self.report = measure_forward(pl_module, tokens=prompt, **numbers)
        with self._watcher.leaving_out(SPEED_FILE):
            self._save(trainer)
        metrics = {**figures(self.report), **self._sdr_around_the_drop(trainer, self.report)}
        self._latest = {**self._latest, **metrics}
        publish(trainer, metrics)

    def _check_quality(self, trainer: Trainer) -> None:
        """Refuse a quality that nothing will measure; warn if it is only the default."""
        if self.quality is None:
            return
        if self.quality not in _AROUND_THE_DROP:
            if not trainer.enable_validation:
                raise MeasurementError(
                    f"SpeedMonitor(quality={self.quality!r}): the run has no validation to log it. Add one, or set "
                    "quality=None."
                )
            return
        if _measures_around_drops(trainer):
            return
        text = (
            f"SpeedMonitor(quality={self.quality!r}): there is no SDR, as no SublayerDrop measures the quality. "
            "Add SublayerDrop with quality_batches above 0 and validation data, name a metric that the module logs in "
            "validation, or set quality=None."
        )
        if self.quality != "accuracy":
            raise MeasurementError(text)
        rank_zero_warn(text)

    def _sdr(self, report: MeasuredSpeed, before: float, after: float, mode: Better | None) -> float:
        lost = before - after if mode == "max" else after - before
        return report.chosen(self.phase)[1].degradation(100 * lost)

    def _sdr_around_the_drop(self, trainer: Trainer, report: MeasuredSpeed) -> dict[str, float]:
        """The SDR from SublayerDrop's quality, if that is the chosen one."""
        if self.quality is None:
            return {}
        for name in (self.quality, "loss") if self.quality == "accuracy" else (self.quality,):
            logged = "loss" if name == "perplexity" else name
            before, after = (trainer.callback_metrics.get(quality_name(logged, when)) for when in ("before", "after"))
            if before is not None and after is not None:
                if name == "perplexity":
                    before, after = before.exp(), after.exp()
                mode = _AROUND_THE_DROP.get(name, self.quality_mode)
                return {SDR: self._sdr(report, before.item(), after.item(), mode)}
        self._warn_without_quality(trainer)
        return {}

    def _warn_without_quality(self, trainer: Trainer) -> None:
        """Say why there is no SDR, unless somebody has."""
        if self.quality not in _AROUND_THE_DROP:
            if self._dense_quality is None and not self._watcher.warned_of(_QUALITY):
                rank_zero_warn(
                    f"SpeedMonitor(quality={self.quality!r}): no validation came before the drop, so there is no dense "
                    "value and no SDR. Validate sooner (val_check_interval), or drop later."
                )
        # else on_fit_start warned; SublayerDrop itself warns of a quality that it cannot measure
        elif _measures_around_drops(trainer) and not _dropped_by_callback(trainer, self._measured):
            rank_zero_warn(
                f"SpeedMonitor(quality={self.quality!r}): {_names(self._measured)} was not dropped by "
                "SublayerDrop, so nothing measured the quality and there is no SDR. Drop with SublayerDrop."
            )

    def _save(self, trainer: Trainer) -> None:
        folder = run_directory(trainer)
        if self.report is not None and trainer.is_global_zero:
            write_text(folder / SPEED_FILE, json.dumps(self.report.to_dict(), indent=2) + "\n")


def _measures_around_drops(trainer: Trainer) -> bool:
    """Whether a SublayerDrop measures quality."""
    return trainer.enable_validation and any(
        isinstance(other, Drops) and other.quality_batches > 0 for other in callbacks_of(trainer)
    )


def _dropped_by_callback(trainer: Trainer, dropped: Collection[Sublayer]) -> bool:
    """Whether a SublayerDrop has dropped all of these."""
    plans = (getattr(other, "plan", None) or () for other in callbacks_of(trainer) if isinstance(other, Drops))
    return any(set(dropped) <= set(plan) for plan in plans)


def _names(sublayers: Iterable[Sublayer]) -> str:
    return ", ".join(sublayer.name for sublayer in sublayers)


def _mode_of(quality: str | None, given: Better | None) -> Better | None:
    """Whether a higher or a lower quality is better."""
    known = _AROUND_THE_DROP.get(quality or "")
    if quality is not None and known is None and given not in get_args(Better):
        raise MeasurementError(
            f"SpeedMonitor(quality={quality!r}, quality_mode={given!r}): a metric of the module needs a "
            f"quality_mode. Set it to 'max' or 'min', or use a quality of SublayerDrop: {', '.join(_AROUND_THE_DROP)}."
        )
    if known is not None and given not in (None, known):
        raise MeasurementError(
            f"SpeedMonitor(quality={quality!r}, quality_mode={given!r}): {known!r} is better for this quality. Leave "
            "quality_mode out."
        )
    return known or given
