"""Measuring importance: hooks that feed a metric during forward passes. Nothing here changes a weight."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from layershed.batches import model_inputs
from layershed.discovery.branches import Branch, Tap
from layershed.discovery.find import dissect, find_transformer
from layershed.discovery.probe import evaluating, probing
from layershed.discovery.recording import Key
from layershed.errors import CalibrationError, NotFiniteError
from layershed.importance.metrics import PassSums, Skipped, get_metric
from layershed.planning.plan import ImportanceScores
from layershed.surgery import bypassed_sublayers

_STATES = ("total", "tokens", "passes")


def estimate_importance(
    model: nn.Module,
    batches: Iterable[Any],
    metric: str = "cosine",
    *,
    max_batches: int | None = None,
    name: str | None = None,
) -> ImportanceScores:
    """Importance of every sublayer and every block that still runs, from one forward pass over the batches.

    Runs in eval mode without gradients, and without the language-model head. Keeps running sums, never activations,
    so that memory does not depend on the number of tokens. In a distributed run every rank gets the scores over the
    batches of all ranks.

    Args:
        model: A transformer, or a module that holds one.
        batches: Mappings with ``input_ids`` of shape (batch, tokens), and ``attention_mask`` where there is padding; or
            the token ids alone. Of a model that reads no text, mappings with what it reads (``pixel_values``), or that.
        metric: ``"cosine"`` (the paper's), ``"relative_magnitude"``, ``"angular"`` or one of your own in ``METRICS``.
        max_batches: Stop after that many batches; None takes all.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    A batch with a NaN or infinite importance is left out as a whole, with a warning.

    Returns:
        Importance by sublayer, and by block in ``.blocks``; low means redundant.

    Raises:
        UnknownNameError: If there is no such metric.
        CalibrationError: If there is no batch, a batch has no ``input_ids``, every token is padding, or no batch is
            left.
    """
    transformer = find_transformer(model, name=name)
    tracker = ImportanceTracker(transformer, metric)
    body = _body(transformer)
    with tracker, evaluating(transformer), torch.no_grad():
        tracker.active = True
        for batch in islice(batches, max_batches):
            body(**model_inputs(batch, transformer))
    scores = tracker.compute()
    if tracker.skipped:
        warnings.warn(f"{tracker.skipped}.", stacklevel=2)
    return scores


class ImportanceTracker:
    """Hooks on a model that measure importance during whatever forward passes happen while it is active.

    Register them before ``torch.compile`` sees the model: later hooks are ignored there without a word.

    Args:
        model: A transformer, or a module that holds one.
        metric: Name of the importance metric.
        name: Path of the transformer inside ``model``, needed where it holds more than one.

    Attributes:
        active: Whether forward passes are measured.
        skipped: The passes that the last :meth:`compute` left out, as an importance in them was NaN or infinite.
    """

    def __init__(self, model: nn.Module, metric: str = "cosine", *, name: str | None = None) -> None:
        self.metric = metric
        metric_class = get_metric(metric)
        self._transformer = find_transformer(model, name=name)
        self._anatomy = dissect(self._transformer)
        self._branches = self._anatomy.branches
        self._last_of_block = {branch.sublayer.block: index for index, branch in enumerate(self._branches)}
        self._blocks = [block for block in self._last_of_block if self._anatomy.blocks[block] is not None]
        places = len(self._branches) + len(self._blocks)
        self._pass, self._sums = metric_class(places), PassSums(places)
        self._pending = False
        self.skipped: Skipped | None = None
        self._decoder = _decoder_paths(self._transformer)
        self._handles: list[RemovableHandle] = []
        self._x: dict[int, Tensor] = {}
        self._block_sum: tuple[Tensor, Tensor] | None = None
        self._seen: set[int] = set()
        self._masks: dict[str, Tensor] = {}
        self._past = False
        self._overwrites = any(branch.overwritten for branch in self._branches)
        self.active = False

    def __enter__(self) -> ImportanceTracker:
        self.attach()
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def attach(self) -> None:
        """Register the hooks; they do nothing until ``active`` is set."""
        body = _body(self._transformer)
        self._handles = [body.register_forward_pre_hook(self._while_active(self._start_pass), with_kwargs=True)]
        for index, branch in enumerate(self._branches):
            self._tap(branch.entry, partial(self._note_x, index))
            self._tap(branch.exit, partial(self._leave_branch, index, branch))
        for place, block in enumerate(self._blocks, len(self._branches)):
            tap = self._anatomy.blocks[block]
            assert tap is not None
            if block not in self._anatomy.plain:
                self._tap(tap, partial(self._note_x, place))
                self._tap(Tap(tap.path), partial(self._leave_block, place))

    def _tap(self, tap: Tap, take: Callable[[Tensor], None]) -> None:
        """Hand a tensor on whenever the model comes by it."""
        module = self._transformer.get_submodule(tap.path)
        if tap.key is None:
            self._handles.append(module.register_forward_hook(self._while_active(partial(_take_output, take))))
        else:
            hook = self._while_active(partial(_take_argument, take, tap.key))
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _while_active(self, hook: Callable[..., None]) -> Callable[..., None]:
        # under torch.compile it is left to Python: it would be compiled anew for every place
        return partial(_if_active, self, torch.compiler.disable(hook))

    def detach(self) -> None:
        """Remove the hooks; what was measured stays, and no activation does."""
        self.active = False
        self._forget_pass()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def reset(self) -> None:
        """Forget what was measured."""
        self._pass.reset()
        self._sums.reset()
        self._pending, self.skipped = False, None

    def compute(self) -> ImportanceScores:
        """The importances over everything seen since the last reset, over all ranks.

        Raises:
            CalibrationError: If no token was seen.
            NotFiniteError: If none is left, as an importance was NaN or infinite in every pass.
        """
        bypassed = set(bypassed_sublayers(self._transformer))
        running = [(i, b.sublayer) for i, b in enumerate(self._branches) if b.sublayer not in bypassed]
        values, tokens, passes = self._synced()
        self.skipped = self._skipped(passes)
        if not running or min(tokens[i] for i, _ in running) == 0:
            if self.skipped:
                raise NotFiniteError(self.skipped)
            raise CalibrationError("No token was seen: the batches are empty, or every token in them is padding.")
        alive = {sublayer.block for _, sublayer in running}
        offset = len(self._branches)
        return ImportanceScores(
            {sublayer: values[i] for i, sublayer in running},
            blocks={block: values[offset + k] for k, block in enumerate(self._blocks) if block in alive},
            metric=self.metric,
            tokens=int(max(tokens)),
        )

    def state_dict(self) -> dict[str, list[float]]:
        """The running sums as plain numbers, exact, for a checkpoint."""
        self._end_pass()
        return {name: getattr(self._sums, name).tolist() for name in _STATES}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.reset()
        for name in _STATES:
            own = getattr(self._sums, name)
            setattr(self._sums, name, torch.tensor(state[name], dtype=own.dtype, device=own.device))
        self._sums._update_count = 1  # as torchmetrics does on loading: an update has happened

    def _synced(self) -> tuple[list[float], list[float], list[float]]:
        self._end_pass()
        sums = self._sums
        with sums.sync_context():
            return (sums.total / sums.tokens).tolist(), sums.tokens.tolist(), sums.passes.tolist()

    def _skipped(self, passes: list[float]) -> Skipped | None:
        """In words, how many passes were left out; given those by the place that was the first not to be finite."""
        first = next(place for place, count in enumerate(passes) if count or place == len(passes) - 1)
        if first == len(passes) - 1:
            return None
        blocks = [f"block.{block}" for block in self._blocks]
        names = [*(branch.sublayer.name for branch in self._branches), *blocks]
        return Skipped(int(sum(passes[:-1])), int(sum(passes)), names[first])

    def _end_pass(self) -> None:
        """Take up what the last forward pass measured."""
        if not self._pending:
            return
        self._pending = False
        if self._sums.device != self._pass.device:
            self._sums.to(self._pass.device)
        with torch.no_grad():
            self._sums.update(self._pass)
        self._pass.total.zero_()  # in place: under inference mode new tensors would never be written to again
        self._pass.tokens.zero_()

    def _forget_pass(self) -> None:
        """Let go of every tensor of the last forward pass, which an error may have cut short."""
        self._seen.clear()
        self._x.clear()
        self._block_sum = None
        self._masks = {}

    def _start_pass(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A new forward pass of the model: take its padding mask, and let every branch count once again."""
        self._forget_pass()
        if not self.active or probing():
            return
        self._end_pass()
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        given = {**bound, **bound.get("kwargs", {})}
        self._past = given.get("past_key_values") is not None
        masks = {name: given.get(name) for name in ("attention_mask", "decoder_attention_mask")}
        if "src_key_padding_mask" in given:  # torch's own encoder: true where there is padding
            masks["attention_mask"] = ~given["src_key_padding_mask"].bool()
        self._masks = {name: m.bool() for name, m in masks.items() if isinstance(m, Tensor) and m.ndim == 2}

    def _counts(self, place: int) -> bool:
        """Whether what comes by now is to be measured; gradient checkpointing runs every block twice."""
        return self.active and place not in self._seen and not probing()

    def _note_x(self, place: int, x: Tensor) -> None:
        if self._counts(place):
            # a block that adds in place would write over it
            self._x[place] = x.detach().clone() if self._overwrites else x.detach()

    def _leave_branch(self, index: int, branch: Branch, output: Tensor) -> None:
        if not self._counts(index):
            return
        x = self._x.pop(index)
        b = output.detach()
        b = b.view_as(x)  # experts may give their tokens flattened
        b = b.float() - x.float() if branch.scale is None else b if branch.scale == 1 else branch.scale * b
        self._measure(index, x, b, branch.sublayer.path)
        if branch.sublayer.block in self._anatomy.plain:
            self._add_to_block(index, branch, x, b)

    def _leave_block(self, place: int, y: Tensor) -> None:
        if self._counts(place):
            x = self._x.pop(place)
            tap = self._anatomy.blocks[self._blocks[place - len(self._branches)]]
            assert tap is not None
            self._measure(place, x, y.detach().float() - x.float(), tap.path)

    def _add_to_block(self, index: int, branch: Branch, x: Tensor, b: Tensor) -> None:
        """A block's branch is the sum of its sublayers': Y - X of the block, without the rounding of Y."""
        block = branch.sublayer.block
        if self._block_sum is None:
            # a block that adds in place would write over it
            start, total = x, b.clone() if branch.stand_ins[0][1].materialize else b
        else:
            start, total = self._block_sum[0], self._block_sum[1] + b.view_as(self._block_sum[1])
        done = index == self._last_of_block[block]
        self._block_sum = None if done else (start, total)
        if done:
            self._measure(len(self._branches) + self._blocks.index(block), start, total, branch.sublayer.path)

    def _measure(self, place: int, x: Tensor, b: Tensor, path: str) -> None:
        self._seen.add(place)
        if self._anatomy.tokens_first:
            x, b = x.transpose(0, 1), b.transpose(0, 1)
        mask = self._masks.get("decoder_attention_mask" if path.startswith(self._decoder) else "attention_mask")
        if mask is not None:
            if x.ndim == 2:
                x, b = x.view(*mask.shape, -1), b.view(*mask.shape, -1)  # OPT flattens its tokens
            mask = self._fitted(mask, x, path)
        if x.ndim == 4:  # several streams side by side, as with hyper-connections
            mask = None if mask is None else mask.repeat_interleave(x.shape[2], 1)
            x, b = x.flatten(1, 2), b.flatten(1, 2)
        # Apple's GPUs know no float64: their sums stay on the CPU
        home = torch.device("cpu") if x.device.type == "mps" else x.device
        if self._pass.device != home:
            self._pass.to(home)
        self._pending = True
        with torch.no_grad():
            self._pass.update(x, b, mask, place)

    def _fitted(self, mask: Tensor, x: Tensor, path: str) -> Tensor:
        """The padding mask of the tokens of x, both of shape (batch, tokens, ...)."""
        places, tokens = mask.shape[1], x.shape[1]
        if self._past and places > tokens:
            return mask[:, -tokens:]  # decoding from a cache: the mask covers the past, too
        if mask.shape[0] != x.shape[0] or places % tokens:
            raise CalibrationError(
                f"The padding mask has the shape {tuple(mask.shape)} and {path} sees {tuple(x.shape[:2])} tokens, so "
                "that padding cannot be told apart; leave the mask out, or score batches without padding."
            )
        return mask[:, :: places // tokens]  # a speech model takes several frames for a token


def _if_active(tracker: ImportanceTracker, hook: Callable[..., None], *args: Any) -> None:
    if tracker.active:
        hook(*args)


def _take_output(take: Callable[[Tensor], None], _module: nn.Module, _args: Any, output: Any) -> None:
    take(output[0] if isinstance(output, tuple | list) else output)


def _take_argument(take: Callable[[Tensor], None], key: Key, _module: nn.Module, args: Any, kwargs: Any) -> None:
    take(args[key] if isinstance(key, int) else kwargs[key])


def _decoder_paths(transformer: nn.Module) -> tuple[str, ...]:
    """What the paths of a decoder's modules begin with, in a model that has an encoder, too."""
    if not isinstance(transformer, PreTrainedModel) or not transformer.config.is_encoder_decoder:
        return ()
    decoder = transformer.get_decoder()
    return tuple(f"{path}." for path, module in transformer.named_modules() if module is decoder)


def _body(transformer: nn.Module) -> nn.Module:
    """The transformer without its head, where that takes the same inputs."""
    body = getattr(transformer, "base_model", transformer)
    parameters = inspect.signature(body.forward).parameters.values()
    main = getattr(transformer, "main_input_name", "")
    takes_any = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    return body if takes_any or any(parameter.name == main for parameter in parameters) else transformer
