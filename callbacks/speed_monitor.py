"""Measures the speedup of the dropped model beside its training metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, get_args

from layershed.discovery.find import find_transformer
from layershed.errors import UnknownNameError
from layershed.files.atomic import write_text
from layershed.integration.measurements import logged_quality
from layershed.integration.metric_names import SDR, SDR_END
from layershed.integration.module_hooks import leave_structure, watch_for_bypass, watch_for_changes
from layershed.integration.namespaces import Callback, LightningModule, Trainer, rank_zero_warn
from layershed.integration.run import SPEED_FILE, current_drop, publish, run_directory, show
from layershed.integration.speed_measuring import SpeedTrial, figures, speed_trial
from layershed.integration.speed_quality import check_quality, mode_of, names_of, warn_without_quality
from layershed.integration.strategies import refuse_sharded_speed
from layershed.integration.watching import Watcher
from layershed.performance.degradation import AROUND_THE_DROP, Better, Degradation, degradation
from layershed.performance.forward import measure_forward
from layershed.performance.speed import measure_speed
from layershed.performance.speed_report import MeasuredSpeed, report_from
from layershed.performance.stopwatch import Phase
from layershed.planning.plan import Sublayer
from layershed.surgery import removed_sublayers

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
    - ``speed/batch_size`` and what a run took: ``speed/prompt_tokens``, ``speed/new_tokens``, or such as
      ``speed/forward_images``;
    - ``speed/sdr``, points of quality lost per percent of speed gained, by the last round of drops; ``speed/sdr_end``,
      from before the first round to the end of training.

    The dense speed is a median over runs. The dropped speed, and the milliseconds, are the dense ones times or over the
    speedup.

    Writes: ``speed.json`` in the run directory, the last measurement. A measurement that fails during training is left
    out with a warning.
    Checkpoint: the last measurement and the dense quality. A resumed run does not repeat them.

    Args:
        prompt_tokens: Tokens per prompt, or per sequence of a forward pass. None for 128, or what fits into the model.
            A forward pass of images or sound, or of a hand-written model, takes inputs of its own: a length that has no
            effect gives one warning.
        new_tokens: Tokens decoded one at a time. None for 32, or what fits into the model.
        batch_size: Sequences or images at once.
        runs: Number of pairs of a dense and a dropped run.
        transformer: Path of the transformer in the LightningModule; needed only if it holds several.
        quality: The quality in SDR; None for no SDR. SublayerDrop measures ``accuracy``, ``loss`` and ``perplexity``
            around every round, and SDR is logged with each measurement. If it measures no accuracy, as of a model that
            is no causal language model, its loss takes the place of accuracy. Any other word is a metric that
            SublayerDrop measures (its ``quality``), or else that the module logs in validation: then the last
            validation before the drop gives its dense value, and each validation after a measurement logs SDR. A point
            is 0.01: a percentage point of a share, 0.01 of a loss.
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
        self.quality, self.quality_mode = quality, mode_of(quality, quality_mode)
        self.report: MeasuredSpeed | None = None
        self._trial: SpeedTrial | None = None
        self._watcher = Watcher("SpeedMonitor")
        self._measured: tuple[Sublayer, ...] = ()
        self._latest: dict[str, float] = {}
        self._dense_quality: float | None = None
        self._before: dict[str, float] = {}  # the qualities before the first round
        self.degradations: dict[str, Degradation] = {}

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
            self._before, self.degradations = {}, {}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the hooks of a module that is in its original state."""
        leave_structure(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse settings that cannot be measured."""
        watch_for_changes(pl_module, self.transformer)
        refuse_sharded_speed(trainer, "SpeedMonitor")
        transformer = find_transformer(pl_module, name=self.transformer)
        self._trial = speed_trial(transformer, self.prompt_tokens, self.new_tokens, self.batch_size, self.runs)
        if self._trial.notes:
            rank_zero_warn(f"SpeedMonitor: {' '.join(self._trial.notes)}")
        if gone := removed_sublayers(pl_module):
            rank_zero_warn(
                f"SpeedMonitor measures nothing: the model was saved without {names_of(gone)}, "
                "so there is no dense model to compare with."
            )
        else:
            check_quality(trainer, self.quality)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the last measurement in a resumed run."""
        self.degradations.pop("end", None)
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
        if self.quality is None or self.quality in AROUND_THE_DROP:
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
        elif quality in self._before:
            return  # SublayerDrop measures it
        elif self.report is not None and self._dense_quality is not None and dropped == self._measured:
            before, after = {quality: self._dense_quality}, {quality: value.item()}
            self._publish_sdr(trainer, SDR, "validation", self._degradation(before, after, self.report))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure a drop at the very end, and log the SDR at the end."""
        self._measure_if_changed(trainer, pl_module)
        self._note_end(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the SDR at the end, if SublayerDrop is listed after this callback."""
        self._note_end(trainer)

    def _note_end(self, trainer: Trainer) -> None:
        end = logged_quality(trainer, "end")
        if self.report is not None and end is not None and "end" not in self.degradations:
            self._publish_sdr(trainer, SDR_END, "end", self._degradation(self._before, end.values, self.report))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the hooks of a module that is in its original state, after an error too."""
        leave_structure(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The last measurement, as primitives."""
        measured = [[s.block, s.kind, s.path] for s in self._measured]
        report = None if self.report is None else self.report.to_dict()
        latest, dense = dict(self._latest), self._dense_quality
        degradations = {moment: asdict(sdr) for moment, sdr in self.degradations.items()}
        return {
            "report": report,
            "measured": measured,
            "latest": latest,
            "dense_quality": dense,
            "before": dict(self._before),
            "degradations": degradations,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.report = None if state_dict["report"] is None else report_from(state_dict["report"])
        self._measured = tuple(Sublayer(*fields) for fields in state_dict["measured"])
        self._latest = state_dict["latest"]
        self._dense_quality = state_dict["dense_quality"]
        self._before = state_dict.get("before", {})  # checkpoints of earlier versions have neither
        kept = state_dict.get("degradations", {})
        self.degradations = {moment: Degradation(**fields) for moment, fields in kept.items()}

    def _measure_if_changed(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if removed_sublayers(pl_module):
            return
        dropped = current_drop(pl_module)
        if dropped == self._measured:
            return
        first, self._measured = not self._measured, dropped
        if not dropped:
            self.report, self._latest, self._before, self.degradations = None, {}, {}, {}
            return
        before, self.report = self.report, None
        with self._watcher.leaving_out("a measurement"):
            self._measure(trainer, pl_module, first, before)
        if self.report is None:  # no speed of an earlier drop may stand for this one's
            self._latest = {}
            if before is not None and trainer.is_global_zero:
                (run_directory(trainer) / SPEED_FILE).unlink(missing_ok=True)

    def _measure(
        self, trainer: Trainer, pl_module: LightningModule, first: bool, earlier: MeasuredSpeed | None
    ) -> None:
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
        metrics = figures(self.report)
        self._latest = {**self._latest, **metrics}
        publish(trainer, metrics)
        self._note_drop(trainer, self.report, first, earlier)

    def _note_drop(self, trainer: Trainer, report: MeasuredSpeed, first: bool, earlier: MeasuredSpeed | None) -> None:
        """Log the SDR of a drop from the quality that SublayerDrop measured around it."""
        if self.quality is None:
            return
        before, after = (logged_quality(trainer, when) for when in ("before", "after"))
        if before is not None and (first or not self._before):
            self._before = dict(before.values)
        if before is None or after is None:
            self._warn(trainer)
            return
        if earlier is None and not first:
            return  # the speed before this round is unknown
        sdr = self._degradation(before.values, after.values, report, earlier)
        if sdr is None:
            self._warn(trainer)
        self._publish_sdr(trainer, SDR, str(trainer.global_step), sdr)

    def _warn(self, trainer: Trainer) -> None:
        if self._dense_quality is None and not self._watcher.warned_of(_QUALITY):
            warn_without_quality(trainer, self.quality, self._measured)

    def _degradation(
        self,
        before: Mapping[str, float],
        after: Mapping[str, float],
        report: MeasuredSpeed,
        earlier: MeasuredSpeed | None = None,
    ) -> Degradation | None:
        quality = self.quality or ""
        how: dict[str, Any] = {"better": self.quality_mode, "phase": self.phase, "earlier": earlier}
        return degradation(before, after, report, quality=quality, **how)

    def _publish_sdr(self, trainer: Trainer, name: str, moment: str, sdr: Degradation | None) -> None:
        if sdr is not None:
            self.degradations[moment] = sdr
            self._latest[name] = sdr.ratio
            publish(trainer, {name: sdr.ratio})

    def _save(self, trainer: Trainer) -> None:
        folder = run_directory(trainer)
        if self.report is not None and trainer.is_global_zero:
            write_text(folder / SPEED_FILE, json.dumps(self.report.to_dict(), indent=2) + "\n")
