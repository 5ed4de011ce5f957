"""Measuring importance: from a model and its batches to a score for every sublayer. Nothing here changes a weight."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layershed.arguments import check_most
from layershed.batches import TokenIdRange, device_of, iterate, model_inputs
from layershed.discovery.find import dissect, find_transformer
from layershed.discovery.model_record import take_model_record
from layershed.discovery.probe import evaluating
from layershed.discovery.uneven import warn_uneven
from layershed.errors import CalibrationError, LayershedError, NotFiniteError
from layershed.importance.damage import leave_one_out
from layershed.importance.masks import UnreadableMasks
from layershed.importance.metrics import DAMAGE_METRICS, check_metric, get_metric
from layershed.importance.padding import Padding
from layershed.importance.running_sums import LeftOut, RunningSums, Skipped
from layershed.importance.taps import Taps, body_of
from layershed.planning.plan import ImportanceScores, Sublayer
from layershed.progress import least, track
from layershed.stand_ins.linear_map import LinearMap
from layershed.surgery import bypassed_sublayers


def estimate_importance(
    model: nn.Module,
    batches: Iterable[Any],
    metric: str = "cosine",
    *,
    maps: Mapping[Sublayer, LinearMap] | None = None,
    max_batches: int | None = None,
    name: str | None = None,
) -> ImportanceScores:
    """Importance of every sublayer and every block that still runs, from one forward pass over the batches.

    - The model runs in eval mode without gradients, and without the language-model head.
    - Running sums are kept, never activations, so that memory does not depend on the number of tokens.
    - A batch with a NaN or infinite importance is left out as a whole, with a warning.
    - A sublayer that runs in no batch has no importance, with a warning.
    - In a distributed run every rank gets the scores over the batches of all ranks.

    Args:
        model: A transformer, or a module that holds one.
        batches: Mappings with ``input_ids`` of shape (batch, tokens); or the token ids alone. Where there is padding,
            also with ``attention_mask`` of shape (batch, tokens) or (batch, 1, queries, keys). For a model that reads
            no text: mappings with its own input (``pixel_values``), or that tensor alone.
        metric: ``"cosine"`` (the paper's), ``"relative_magnitude"``, ``"angular"`` or one of your own in ``METRICS``.
            Of a causal language model also ``"kl"`` and ``"loss"``: see :func:`leave_one_out`, which takes more passes.
        maps: For ``"kl"`` and ``"loss"``: the linear maps that will replace sublayers.
        max_batches: Stop after that many batches; None takes all.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Returns:
        Importance by sublayer, and by block in ``.blocks``; low means redundant.

    Raises:
        UnknownNameError: If there is no such metric.
        CalibrationError: If ``max_batches`` is below 1, there is no batch, a batch has no ``input_ids``, every token is
            padding, the mask does not say what is padding, or no batch is left.
    """
    check_scoring(metric, max_batches, maps)
    if metric in DAMAGE_METRICS:
        return leave_one_out(model, batches, metric, maps=maps, max_batches=max_batches, name=name)
    transformer = find_transformer(model, name=name)
    tracker = ImportanceTracker(transformer, metric)
    body = body_of(transformer)
    ids = TokenIdRange(transformer)
    with tracker, evaluating(transformer), torch.no_grad(), tracker.measuring():
        for batch in track(iterate(batches, max_batches), "Scoring", least(batches, max_batches)):
            body(**model_inputs(batch, transformer, ids))
    ids.read()
    scores = tracker.compute()
    for left_out in (tracker.skipped, tracker.left_out):
        if left_out:
            warnings.warn(f"{left_out}.", stacklevel=2)
    return scores


def check_scoring(metric: str, max_batches: int | None, maps: object = None) -> None:
    """Refuse arguments of :func:`estimate_importance` that fit no model.

    Raises:
        UnknownNameError: If there is no such metric.
        CalibrationError: If ``max_batches`` is below 1, or maps are given for a metric that does not see them.
    """
    check_metric(metric)
    if maps and metric not in DAMAGE_METRICS:
        raise CalibrationError(
            f"metric={metric!r} does not depend on linear maps. Leave maps out, or choose kl or loss."
        )
    check_most(max_batches, "max_batches", CalibrationError)


class ImportanceTracker:
    """Measures importance during the forward passes that happen between :meth:`start` and :meth:`stop`.

    Attach it before ``torch.compile`` sees the model: compiled code silently ignores later hooks. It can be
    started and stopped at any time after that.

    Args:
        model: A transformer, or a module that holds one.
        metric: Name of the importance metric.
        name: Path of the transformer inside ``model``, needed where it holds more than one.
        strict: Whether a forward pass raises if it cannot be measured. A watcher of somebody else's run sets it to
            False: what cannot be measured is left out.

    Attributes:
        skipped: The passes that the last :meth:`compute` left out because an importance was NaN or infinite.
        left_out: What the last :meth:`compute` left out because it did not run or could not be measured.

    Example:
        >>> with tracker, tracker.measuring():  # doctest: +SKIP
        ...     model(**batch)
        >>> scores = tracker.compute()  # doctest: +SKIP
    """

    def __init__(
        self, model: nn.Module, metric: str = "cosine", *, name: str | None = None, strict: bool = True
    ) -> None:
        metric_class = get_metric(metric)
        self.metric = metric
        self._transformer = find_transformer(model, name=name)
        anatomy = dissect(self._transformer)
        self._record = take_model_record(self._transformer, anatomy)
        warn_uneven(self._transformer, anatomy)
        self._sublayers = [branch.sublayer for branch in anatomy.branches]
        self._padding = Padding(self._transformer, anatomy.tokens_first)
        self._strict = strict
        self._taps = Taps(
            self._transformer,
            anatomy,
            begin_pass=self._begin_pass,
            enter=self._padding.enter,
            measure=self._measure,
            fail=self._fail,
        )
        self._sums = RunningSums(metric_class, self._taps.names)
        self._failure: str | None = None
        self.skipped: Skipped | None = None
        self.left_out: LeftOut | None = None

    def __enter__(self) -> ImportanceTracker:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Register the hooks; they measure nothing until :meth:`start`."""
        self._sums.move(device_of(self._transformer))
        self._taps.attach()

    def detach(self) -> None:
        """Remove the hooks; only the sums stay, no activations."""
        self._taps.detach()
        self._padding.forget()

    @property
    def active(self) -> bool:
        """Whether forward passes are measured."""
        return self._taps.on

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Within the context forward passes are measured.

        Raises:
            CalibrationError: As :meth:`start`.
        """
        self.start()
        try:
            yield
        finally:
            self.stop()

    def start(self) -> None:
        """Measure forward passes from now on.

        Raises:
            CalibrationError: If the hooks are not on the model.
        """
        if not self._taps.attached:
            raise CalibrationError(
                "ImportanceTracker: cannot measure: its hooks are not on the model. Call attach() first, or use "
                "`with tracker, tracker.measuring():`."
            )
        self._taps.restart()

    def stop(self) -> None:
        """Measure no further forward pass; the sums stay."""
        self._taps.on = False

    def reset(self) -> None:
        """Forget the sums."""
        self._padding.unreadable = UnreadableMasks()
        self._sums.reset()
        self._failure = self.skipped = self.left_out = None

    def compute(self) -> ImportanceScores:
        """The importances over everything seen since the last reset, over all ranks.

        Raises:
            CalibrationError: If no token was seen.
            NotFiniteError: If an importance was NaN or infinite in every pass.
        """
        error = self._padding.unreadable.read()
        if error is not None:
            self._fail(error)
        bypassed = set(bypassed_sublayers(self._transformer))
        running = [(i, sublayer) for i, sublayer in enumerate(self._sublayers) if sublayer not in bypassed]
        means = self._sums.means()
        self.skipped = means.skipped
        measured = {sublayer: means.values[i] for i, sublayer in running if means.tokens[i]}
        if not measured:
            raise self._nothing_measured(len(running), means.passes)
        # a block in which a sublayer was not measured would be ranked by a part of it
        missing = {sublayer.block for _, sublayer in running if sublayer not in measured}
        alive = {sublayer.block for sublayer in measured} - missing
        of_blocks = enumerate(self._taps.blocks, len(self._sublayers))
        blocks = {block: means.values[i] for i, block in of_blocks if block in alive and means.tokens[i]}
        self.left_out = self._without([sublayer for _, sublayer in running if sublayer not in measured])
        tokens = int(max(means.tokens))
        return ImportanceScores(measured, blocks=blocks, metric=self.metric, tokens=tokens, model=self._record)

    def _without(self, sublayers: Sequence[Sublayer]) -> LeftOut | None:
        names = [sublayer.name for sublayer in sublayers]
        return LeftOut(names, self._failure) if names or self._failure else None

    def _nothing_measured(self, running: int, passes: int) -> CalibrationError:
        if self.skipped:
            return NotFiniteError(self.skipped)
        if not running:
            return CalibrationError("Nothing is left to measure: every sublayer is dropped.")
        if self._failure:
            return CalibrationError(f"Nothing could be measured. {self._failure}.")
        if passes:
            return CalibrationError("No token was seen in the batches: every token in them is padding.")
        return CalibrationError(
            "No token was seen: the batches are empty, or none of the blocks ran. A generator can be read only once."
        )

    def state_dict(self) -> dict[str, list[float]]:
        """The running sums as plain numbers, exact, for a checkpoint."""
        return self._sums.state_dict()

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.reset()
        self._sums.load_state_dict(state)

    def _begin_pass(self) -> None:
        self._sums.end_pass()

    def _measure(self, place: int, x: Tensor, branch: Tensor, path: str) -> None:
        self._sums.add(place, *self._padding.align(x, branch, path))

    def _fail(self, error: Exception) -> None:
        if self._strict:
            raise error
        if self._failure is None:
            name = "" if isinstance(error, LayershedError) else f"{type(error).__name__}: "
            self._failure = f"{name}{error}".rstrip(".")
