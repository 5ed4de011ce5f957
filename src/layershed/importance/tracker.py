"""Measuring importance: from a model and its batches to a score for every sublayer. Nothing here changes a weight."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layershed.batches import iterate, model_inputs
from layershed.discovery.find import dissect, find_transformer
from layershed.discovery.probe import evaluating
from layershed.discovery.uneven import warn_uneven
from layershed.errors import CalibrationError, NotFiniteError
from layershed.importance.metrics import get_metric
from layershed.importance.padding import Padding
from layershed.importance.running_sums import RunningSums, Skipped
from layershed.importance.taps import Taps, body_of
from layershed.planning.plan import ImportanceScores
from layershed.surgery import bypassed_sublayers


def estimate_importance(
    model: nn.Module,
    batches: Iterable[Any],
    metric: str = "cosine",
    *,
    max_batches: int | None = None,
    name: str | None = None,
) -> ImportanceScores:
    """Importance of every sublayer and every block that still runs, from one forward pass over the batches.

    - The model runs in eval mode without gradients, and without the language-model head.
    - Running sums are kept, never activations, so that memory does not depend on the number of tokens.
    - A batch with a NaN or infinite importance is left out as a whole, with a warning.
    - In a distributed run every rank gets the scores over the batches of all ranks.

    Args:
        model: A transformer, or a module that holds one.
        batches: Mappings with ``input_ids`` of shape (batch, tokens), and ``attention_mask`` where there is padding; or
            the token ids alone. For a model that reads no text: mappings with its own input (``pixel_values``), or that
            tensor alone.
        metric: ``"cosine"`` (the paper's), ``"relative_magnitude"``, ``"angular"`` or one of your own in ``METRICS``.
        max_batches: Stop after that many batches; None takes all.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Returns:
        Importance by sublayer, and by block in ``.blocks``; low means redundant.

    Raises:
        UnknownNameError: If there is no such metric.
        CalibrationError: If ``max_batches`` is below 1, there is no batch, a batch has no ``input_ids``, every token is
            padding, or no batch is left.
    """
    check_scoring(metric, max_batches)
    transformer = find_transformer(model, name=name)
    tracker = ImportanceTracker(transformer, metric)
    body = body_of(transformer)
    with tracker, evaluating(transformer), torch.no_grad(), tracker.measuring():
        for batch in iterate(batches, max_batches):
            body(**model_inputs(batch, transformer))
    scores = tracker.compute()
    if tracker.skipped:
        warnings.warn(f"{tracker.skipped}.", stacklevel=2)
    return scores


def check_scoring(metric: str, max_batches: int | None) -> None:
    """Refuse arguments of :func:`estimate_importance` that fit no model.

    Raises:
        UnknownNameError: If there is no such metric.
        CalibrationError: If ``max_batches`` is below 1.
    """
    get_metric(metric)
    if max_batches is not None and not (isinstance(max_batches, int) and max_batches >= 1):
        raise CalibrationError(f"max_batches={max_batches!r}: it must be at least 1, or None for all batches.")


class ImportanceTracker:
    """Measures importance during the forward passes that happen between :meth:`start` and :meth:`stop`.

    Attach it before ``torch.compile`` sees the model: compiled code silently ignores later hooks. It can be
    started and stopped at any time after that.

    Args:
        model: A transformer, or a module that holds one.
        metric: Name of the importance metric.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Attributes:
        skipped: The passes that the last :meth:`compute` left out because an importance was NaN or infinite.

    Example:
        >>> with tracker, tracker.measuring():  # doctest: +SKIP
        ...     model(**batch)
        >>> scores = tracker.compute()  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, metric: str = "cosine", *, name: str | None = None) -> None:
        metric_class = get_metric(metric)
        self.metric = metric
        self._transformer = find_transformer(model, name=name)
        anatomy = dissect(self._transformer)
        warn_uneven(self._transformer, anatomy)
        self._sublayers = [branch.sublayer for branch in anatomy.branches]
        self._padding = Padding(self._transformer, anatomy.tokens_first)
        self._taps = Taps(self._transformer, anatomy, self._begin_pass, self._measure)
        self._sums = RunningSums(metric_class, self._taps.names)
        self.skipped: Skipped | None = None

    def __enter__(self) -> ImportanceTracker:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Register the hooks; they measure nothing until :meth:`start`."""
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
        self._taps.on = True

    def stop(self) -> None:
        """Measure no further forward pass; the sums stay."""
        self._taps.on = False

    def reset(self) -> None:
        """Forget the sums."""
        self._sums.reset()
        self.skipped = None

    def compute(self) -> ImportanceScores:
        """The importances over everything seen since the last reset, over all ranks.

        Raises:
            CalibrationError: If no token was seen.
            NotFiniteError: If an importance was NaN or infinite in every pass.
        """
        bypassed = set(bypassed_sublayers(self._transformer))
        running = [(i, sublayer) for i, sublayer in enumerate(self._sublayers) if sublayer not in bypassed]
        means = self._sums.means()
        self.skipped = means.skipped
        if not running or min(means.tokens[i] for i, _ in running) == 0:
            if self.skipped:
                raise NotFiniteError(self.skipped)
            raise CalibrationError(
                "No token was seen: the batches are empty, or every token in them is padding. A generator can be read "
                "only once."
            )
        alive = {sublayer.block for _, sublayer in running}
        of_blocks = enumerate(self._taps.blocks, len(self._sublayers))
        return ImportanceScores(
            {sublayer: means.values[i] for i, sublayer in running},
            blocks={block: means.values[i] for i, block in of_blocks if block in alive},
            metric=self.metric,
            tokens=int(max(means.tokens)),
        )

    def state_dict(self) -> dict[str, list[float]]:
        """The running sums as plain numbers, exact, for a checkpoint."""
        return self._sums.state_dict()

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.reset()
        self._sums.load_state_dict(state)

    def _begin_pass(self, body: nn.Module, args: Any, kwargs: Any) -> None:
        self._sums.end_pass()
        self._padding.begin_pass(body, args, kwargs)

    def _measure(self, place: int, x: Tensor, branch: Tensor, path: str) -> None:
        self._sums.add(place, *self._padding.align(x, branch, path))
