"""Folds what dropped sublayers gave into the weights of those that are left. It changes weights.

Two streams run through the model, block by block: the dense one and the dropped one. Behind a drop they differ. The
last matrix V of every sublayer that is left (an attention's o_proj, an MLP's down_proj) gets the ridge regression of
that difference on its own input a:

    V <- V + D,   D = argmin sum w |D a - (Y_dense - Y_dropped) / scale|^2 + lambda |D|^2

with tokens weighted by 1/|Y|^2. No parameter is added and nothing costs more, so that every engine runs the result.
Relatives: ReplaceMe (arXiv 2505.02819), which folds one map into one matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from layershed.arguments import check_most
from layershed.batches import TokenIdRange, iterate, model_inputs
from layershed.compensation.normal_equations import NormalEquations
from layershed.compensation.readings import Readings
from layershed.compensation.streams import Stream
from layershed.discovery.branches import Branch
from layershed.discovery.find import dissect, find_transformer
from layershed.discovery.probe import evaluating
from layershed.errors import CompensationError
from layershed.importance.block_runs import BlockRuns
from layershed.importance.taps import body_of
from layershed.planning.plan import Sublayer
from layershed.progress import track
from layershed.stand_ins.contexts import lifted
from layershed.stand_ins.stand_in import first_tensor
from layershed.surgery import bypassed_sublayers

_STRENGTHS = (0.1, 1.0, 10.0)  # shares of the mean variance of a
_HELD_OUT = 4  # every fourth batch chooses the strength, and says whether a fold helps
_LEAST = 0.99  # a fold that leaves more of the held-out difference than this is left out


@dataclass(frozen=True)
class Fold:
    """What was folded into one sublayer.

    Args:
        sublayer: The sublayer whose last matrix was changed.
        strength: The ridge, as a share of the mean variance of a.
        left: Share of the difference of the streams that is left behind it, on batches that it was not fitted to.
    """

    sublayer: Sublayer
    strength: float
    left: float


def compensate(
    model: nn.Module, batches: Iterable[Any], *, max_batches: int | None = None, name: str | None = None
) -> tuple[Fold, ...]:
    """Change the weights behind bypassed sublayers so that the stream follows that of the dense model.

    The weights of what is left change for good; ``restore`` brings the dropped sublayers back, not the old weights.
    Call it once, right after the drop and before adapters are injected. It takes three passes over the batches.

    Args:
        model: A transformer with bypassed sublayers, or a module that holds one.
        batches: As of :func:`estimate_importance`: mixed text, some 20 tokens for each channel or more; at least four.
        max_batches: Stop after that many batches; None takes all.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Returns:
        The folds that helped, in forward order. Others were left out. Sublayers without a last matrix of their own
        (experts) or with a quantized, adapted or shared one stay as they are.

    Raises:
        CompensationError: If nothing is bypassed, or there are fewer than four batches.
    """
    check_most(max_batches, "max_batches", CompensationError)
    transformer = find_transformer(model, name=name)
    gone = set(bypassed_sublayers(transformer))
    if not gone:
        raise CompensationError("compensate: nothing is bypassed, so there is nothing to make up for. Bypass first.")
    anatomy = dissect(transformer)
    ids = TokenIdRange(transformer)
    inputs = [model_inputs(batch, transformer, ids) for batch in iterate(batches, max_batches)]
    if len(inputs) < _HELD_OUT:
        raise CompensationError(
            f"compensate: {len(inputs)} batches are too few, as every fourth one checks the folds. Give at least "
            f"{_HELD_OUT}, such as the same text in smaller batches."
        )
    with evaluating(transformer), torch.no_grad():
        return _Folding(transformer, anatomy, inputs, gone).run()


class _Folding:
    def __init__(
        self, transformer: nn.Module, anatomy: Any, inputs: Sequence[dict[str, Any]], gone: set[Sublayer]
    ) -> None:
        self.transformer, self.anatomy, self.gone = transformer, anatomy, gone
        self.runs, self.readings = BlockRuns(transformer, anatomy.paths), Readings(transformer, anatomy)
        body = body_of(transformer)
        self.dense, self.dropped = (Stream(self.runs, body, inputs) for _ in range(2))
        self.batches = range(len(inputs))
        self._originals: dict[nn.Module, tuple[int, Tensor]] = {}  # place of the block, and the weight before its fold

    def run(self) -> tuple[Fold, ...]:
        first = min(self.gone)
        later = [b for b in self.anatomy.branches if b.sublayer > first and b.sublayer not in self.gone]
        foldable = [branch for branch in later if branch.linear is not None and branch.linear.writes is not None]
        found: list[Fold] = []
        checked = False
        for branch in track(foldable, "Folding", len(foldable)):
            place = self.runs.place_of(branch.sublayer.path)
            with lifted(self.transformer), self._unfolded():
                self.dense.advance(place)
                if not checked:
                    checked = True
                    self.dense.reuses = self.dropped.reuses = self.dense.check(place)
                targets = self._ends(self.dense, place, branch)
            # dense passes begin at this block from now on
            self._originals = {m: own for m, own in self._originals.items() if own[0] >= place or not self.dense.reuses}
            self.dropped.advance(place)
            fold = self._fold(branch, place, targets)
            if fold is not None:
                found.append(fold)
        return tuple(found)

    @contextmanager
    def _unfolded(self) -> Iterator[None]:
        """Within the context the blocks that a dense pass runs have the weights that they had."""
        folded = {module: module.weight for module in self._originals}
        for module, (_, weight) in self._originals.items():
            module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        try:
            yield
        finally:
            for module, parameter in folded.items():
                module._parameters["weight"] = parameter  # type: ignore[assignment]

    def _ends(self, stream: Stream, place: int, branch: Branch) -> list[Tensor]:
        """X + scale * b of a sublayer, by batch."""
        found = []
        with self.readings.of([branch]) as readings:
            for batch in self.batches:
                stream.run(batch, place)
                own = readings[branch.sublayer]
                assert own.x is not None
                assert own.b is not None
                assert branch.linear is not None
                found.append(own.x.double() + branch.linear.scale * own.b.double())
        return found

    def _fold(self, branch: Branch, place: int, targets: list[Tensor]) -> Fold | None:
        """Fit the difference, and change the weight if that helps."""
        assert branch.linear is not None
        sums: dict[bool, NormalEquations] = {}
        writer: nn.Module | None = None
        with self.readings.of([branch]) as readings, _watching(self.transformer, branch) as seen:
            for batch in self.batches:
                self.dropped.run(batch, place)
                own = readings[branch.sublayer]
                writer = seen.writer()
                if writer is None or own.x is None or own.b is None:
                    return None
                inputs = seen.inputs[writer].reshape(len(own.b), -1)
                end = own.x.double() + branch.linear.scale * own.b.double()
                difference = (targets[batch] - end) / branch.linear.scale
                energy = targets[batch].square().sum(-1)
                weights = torch.where(own.counts & (energy > 0), 1 / energy, 0)
                held_out = batch % _HELD_OUT == _HELD_OUT - 1
                if held_out not in sums:
                    sums[held_out] = NormalEquations(inputs.shape[1], difference.shape[1], inputs.device)
                sums[held_out].add(inputs, difference, weights)
        assert writer is not None
        for each in sums.values():
            each.reduce()
        return self._apply(branch.sublayer, place, writer, sums)

    def _apply(
        self, sublayer: Sublayer, place: int, writer: nn.Module, sums: dict[bool, NormalEquations]
    ) -> Fold | None:
        """Choose the strength, and change the weight if that leaves less of the difference."""
        fitted, judge = sums[False], sums[True]
        nothing = judge.missed(torch.zeros_like(fitted.ht.mT))
        if not nothing > 0:
            return None
        tried = {strength: fitted.change(strength) for strength in _STRENGTHS}
        left = {strength: judge.missed(change) / nothing for strength, change in tried.items()}
        best = min(left, key=lambda strength: (math.isnan(left[strength]), left[strength]))
        if not left[best] <= _LEAST:  # NaN, too, where a stream overflows
            return None
        weight: Any = writer.weight
        self._originals[writer] = place, weight.detach().clone()
        change = tried[best].to(weight)
        weight += change.mT if isinstance(writer, Conv1D) else change
        return Fold(sublayer, best, left[best])


class _Seen:
    """The linear modules of a sublayer that ran: their inputs and outputs, and what the sublayer gave."""

    def __init__(self) -> None:
        self.inputs: dict[nn.Module, Tensor] = {}
        self._outputs: dict[nn.Module, Tensor] = {}
        self.result: Tensor | None = None

    def note(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.inputs[module], self._outputs[module] = first_tensor(args, kwargs), output

    def end(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self.result = output[0] if isinstance(output, tuple | list) else output

    def writer(self) -> nn.Module | None:
        """The module whose output is what the sublayer gives."""
        for module, output in self._outputs.items():
            if self.result is not None and output.numel() == self.result.numel():
                flat = output.reshape(-1, output.shape[-1])
                if torch.equal(flat, self.result.reshape(-1, output.shape[-1])):
                    return module
        return None


@contextmanager
def _watching(transformer: nn.Module, branch: Branch) -> Iterator[_Seen]:
    """Within the context, note what the linear modules of a sublayer take and give."""
    assert branch.linear is not None
    assert branch.linear.writes is not None
    seen = _Seen()
    holders = [transformer.get_submodule(path) for path, _ in branch.stand_ins]
    held = {id(p): 0 for module in transformer.modules() for p in module._parameters.values() if p is not None}
    for module in transformer.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                held[id(parameter)] += 1
    with ExitStack() as stack:
        for holder in holders:
            for module in holder.modules():
                if type(module) in (nn.Linear, Conv1D) and held[id(module.weight)] == 1:
                    stack.callback(module.register_forward_hook(seen.note, with_kwargs=True).remove)
        end = transformer.get_submodule(branch.linear.writes.path)
        stack.callback(end.register_forward_hook(seen.end).remove)
        yield seen
