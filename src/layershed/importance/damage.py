"""What taking sublayers out costs a causal language model, measured on its predictions.

A sublayer is taken out as it will be dropped: deleted, or replaced by its linear map. Only the blocks from it on run
again; what the blocks before it return is taken from one pass of each batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from layershed.arguments import check_most
from layershed.batches import TokenIdRange, iterate, refuse_skeleton
from layershed.discovery.find import dissect, find_transformer
from layershed.discovery.model_record import take_model_record
from layershed.discovery.probe import evaluating
from layershed.errors import CalibrationError, UnknownNameError
from layershed.importance.block_runs import BlockRuns, Outputs
from layershed.importance.divergence import Reference, divergence, loss_of
from layershed.importance.metrics import DAMAGE_METRICS, DamageMetric
from layershed.importance.taps import body_of
from layershed.map_checks import checked_maps
from layershed.planning.plan import ImportanceScores, Sublayer
from layershed.progress import track
from layershed.quality import check_head, predictions_of, read_batch
from layershed.stand_ins.contexts import lifted, standing_in
from layershed.stand_ins.linear_map import LinearMap
from layershed.surgery import bypassed_sublayers, stopped_by


def leave_one_out(
    model: nn.Module,
    batches: Iterable[Any],
    metric: DamageMetric = "kl",
    *,
    maps: Mapping[Sublayer, LinearMap] | None = None,
    max_batches: int | None = None,
    name: str | None = None,
) -> ImportanceScores:
    """The damage of every sublayer, and of every block, that still runs: that of taking it out alone.

    - ``kl``: mean KL divergence per token of the model without it from the dense one, in nats.
    - ``loss``: rise of the mean next-token loss, in nats; below 0 if the model predicts better without it.

    One pass over the batches, and for each sublayer and block one of the blocks from it on: about half as many passes
    as there are sublayers and blocks.

    Args:
        model: A causal language model, or a module that holds one.
        batches: As of :func:`evaluate_quality`. In a distributed run every rank gets the damage over all ranks.
        metric: ``"kl"`` or ``"loss"``.
        maps: Linear maps by sublayer, of :func:`fit_linear_maps`: the action to score. Sublayers without one are
            deleted.
        max_batches: Stop after that many batches; None takes all.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Raises:
        UnknownNameError: If there is no such metric.
        MeasurementError: If the model does not predict the next token.
        CalibrationError: If there is no batch, or no token to predict.
    """
    meter = DamageMeter(model, batches, metric, maps=maps, max_batches=max_batches, name=name)
    single = [frozenset([sublayer]) for sublayer in meter.running]
    members: dict[int, set[Sublayer]] = {}
    for sublayer in meter.running:
        members.setdefault(sublayer.block, set()).add(sublayer)
    found = meter.of([*single, *(frozenset(group) for group in members.values())])
    scores = dict(zip(meter.running, found, strict=False))
    blocks = dict(zip(members, found[len(single) :], strict=True))
    return ImportanceScores(scores, blocks=blocks, metric=metric, tokens=meter.tokens, model=meter.record)


class DamageMeter:
    """Measures the damage of sets of sublayers on the same batches, again and again.

    Args:
        model: A causal language model, or a module that holds one.
        batches: As of :func:`leave_one_out`; they are kept, and so are the dense model's most likely tokens.
        metric: ``"kl"`` or ``"loss"``.
        maps: As of :func:`leave_one_out`.
        max_batches: Stop after that many batches.
        name: Path of the transformer inside ``model``.

    Attributes:
        running: The sublayers that still run, in forward order.
        record: The record of the model.
        tokens: Number of predicted tokens of all ranks.
        passes: Cost so far, in forward passes over all batches; a part of a pass counts by its blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        metric: DamageMetric = "kl",
        *,
        maps: Mapping[Sublayer, LinearMap] | None = None,
        max_batches: int | None = None,
        name: str | None = None,
    ) -> None:
        if metric not in DAMAGE_METRICS:
            raise UnknownNameError("damage metric", metric, DAMAGE_METRICS)
        check_most(max_batches, "max_batches", CalibrationError)
        self.transformer = find_transformer(model, name=name)
        check_head(self.transformer)
        refuse_skeleton(self.transformer)
        anatomy = dissect(self.transformer)
        self.record = take_model_record(self.transformer, anatomy)
        self.branches, self.metric, self.passes = anatomy.branches, metric, 0.0
        gone = set(bypassed_sublayers(self.transformer))
        self.running = tuple(b.sublayer for b in self.branches if b.sublayer not in gone)
        self.maps = checked_maps(maps or {}, self.running, self.branches, self.transformer)
        self._runs = BlockRuns(self.transformer, anatomy.paths)
        self._reuses: bool | None = None
        self._body = body_of(self.transformer)
        self._read(iterate(batches, max_batches))

    def of(self, groups: Sequence[Collection[Sublayer]], gone: Collection[Sublayer] = ()) -> list[float]:
        """The damage of each group, taken out together.

        Args:
            groups: Sets of sublayers that run.
            gone: Sublayers that are taken out with every group.
        """
        sums = torch.zeros(len(groups), dtype=torch.float64)
        with evaluating(self.transformer), torch.no_grad(), self._without(set(gone), set()):
            # from the last block on, so that a pass knows the outputs that all others need
            firsts = [min(self._runs.place_of(sublayer.path) for sublayer in group) for group in groups]
            work = [(batch, place) for batch in range(len(self._inputs)) for place in range(len(groups))]
            outputs: Outputs = {}
            for batch, place in track(work, "Measuring damage", len(work)):
                if place == 0:
                    outputs = self._outputs(batch, firsts)
                with self._without(set(groups[place]) | set(gone), set(gone)):
                    logits = self._logits(batch, firsts[place], outputs)
                sums[place] += self._damage(batch, logits)
        return [float(value) / self.tokens for value in _over_ranks(sums)]

    def _read(self, batches: Iterable[Any]) -> None:
        """Keep the batches, and what the dense model predicts on them."""
        ids = TokenIdRange(self.transformer)
        self._inputs: list[dict[str, Any]] = []
        self._references: list[Reference] = []
        self._base: list[Tensor] = []
        with evaluating(self.transformer), torch.no_grad(), lifted(self.transformer):
            for batch in batches:
                inputs, labels = read_batch(self.transformer, batch, ids)
                logits, targets, counted = predictions_of(self.transformer, inputs, labels)
                reference = Reference.of(logits, targets, counted)
                self._inputs.append(inputs)
                self._references.append(reference)
                self._base.append(loss_of(reference, logits) if self.metric == "loss" else torch.zeros(()))
        ids.read()
        tokens = torch.tensor(float(sum(len(reference.targets) for reference in self._references)), dtype=torch.float64)
        self.tokens = int(_over_ranks(tokens))
        self.passes += 1
        if not self.tokens:
            raise CalibrationError(
                "There is no token to predict: the batches are empty (a generator can be read only once), or every "
                "label is ignored. Check the data."
            )

    def _without(self, out: set[Sublayer], already: set[Sublayer]) -> ExitStack:
        """Within the context some sublayers are out, besides those that are out already."""
        stack = ExitStack()
        before = dict(stopped_by(self.branches, already, self.maps))
        stand_ins = {
            path: stand_in for path, stand_in in stopped_by(self.branches, out, self.maps) if path not in before
        }
        stack.enter_context(standing_in(self.transformer, stand_ins))
        return stack

    def _outputs(self, batch: int, firsts: Sequence[int]) -> Outputs:
        """What the blocks before each of some places return."""
        keep = sorted({place for first in firsts for place in self._runs.needed_before(first)})
        if not keep or self._reuses is False:
            return {}
        with self._runs.running({}, 0, keep[-1], keep) as kept:
            self._body(**{**self._inputs[batch], "use_cache": False})
        self._count(0, keep[-1] + 1)
        return kept

    def _logits(self, batch: int, first: int, outputs: Outputs) -> Tensor:
        inputs = self._inputs[batch]
        if first and self._reuses is None:
            self._reuses = self._reuse_is_exact(inputs, first, outputs)
        start = first if self._reuses else 0
        with self._runs.running(outputs, start):
            logits, _, _ = predictions_of(self.transformer, inputs, {})
        self._count(start, len(self._runs.paths))
        return logits

    def _reuse_is_exact(self, inputs: dict[str, Any], first: int, outputs: Outputs) -> bool:
        """Whether a pass that takes earlier blocks' outputs gives the logits of a whole pass."""
        with self._runs.running(outputs, first):
            short, _, _ = predictions_of(self.transformer, inputs, {})
        whole, _, _ = predictions_of(self.transformer, inputs, {})
        return torch.allclose(short, whole, rtol=1e-3, atol=1e-3)

    def _damage(self, batch: int, logits: Tensor) -> Tensor:
        reference = self._references[batch]
        if self.metric == "kl":
            return divergence(reference, logits).cpu()
        return (loss_of(reference, logits) - self._base[batch]).cpu()

    def _count(self, first: int, stop: int) -> None:
        self.passes += (stop - first) / len(self._runs.paths) / len(self._inputs)


def _over_ranks(sums: Tensor) -> Tensor:
    """The sums over the ranks of a distributed run."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return sums
    on_device = sums.to(device_of_ranks())
    torch.distributed.all_reduce(on_device)
    return on_device.cpu()


def device_of_ranks() -> torch.device:
    """The device on which the ranks talk to each other."""
    backend = torch.distributed.get_backend()
    return torch.device("cuda") if backend == "nccl" else torch.device("cpu")
