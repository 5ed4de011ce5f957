"""The forward pass that discovery looks at: who reads whose output, and whether the residual identity holds."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from transformers import PreTrainedModel

from layershed.errors import UnprovenStructureError
from layershed.overrides import first_tensor, lifted
from layershed.plan import Kind

_TOKENS = 4
_PROBING: ContextVar[bool] = ContextVar("layershed_probing", default=False)


@dataclass
class BranchTrace:
    """What the probe saw of one residual branch.

    Args:
        path: Path of the branch's own module.
        block: Path of its block.
        read: What its module read, shape (1, tokens, hidden).
        x: What the branch starts from, before its norm.
        b: What the branch ends in, after its tail.
        norm: Path of the norm whose output it read, or None.
        tail: Paths of the modules that its output passed.
        outputs: Length of the tuple that its module returned, or 0 for a tensor.
        tokenwise: Whether its module treats every token by itself; asked of MLPs alone.
    """

    path: str
    block: str
    read: Tensor
    x: Tensor
    b: Tensor
    norm: str | None = None
    tail: tuple[str, ...] = ()
    outputs: int = 0
    tokenwise: bool = False


@dataclass
class Probe:
    """Everything that one probing forward pass saw.

    Args:
        branches: The branches in the order in which they ran.
        inputs: Input of each block.
        outputs: Output of each block.
        symbolic: Whether the pass ran on fake tensors, which have shapes and identities and no numbers.
    """

    symbolic: bool
    branches: list[BranchTrace] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)

    def topology_of(self, block: str) -> Literal["sequential", "parallel"] | None:
        """Which residual identity a block satisfies to rounding, or None if neither.

        On fake tensors nothing can be computed: branches that start from one and the same tensor are parallel, others
        sequential, and whoever built the skeleton proves it again once it holds weights.
        """
        branches = [trace for trace in self.branches if trace.block == block]
        starts = [trace.x for trace in branches]
        if self.symbolic:
            return "parallel" if len(starts) > 1 and all(x is starts[0] for x in starts) else "sequential"
        x, y = self.inputs[block], self.outputs[block]
        following = [*starts[1:], y]
        if _equal(starts[0], x) and all(
            _equal(after, trace.x + trace.b) for trace, after in zip(branches, following, strict=True)
        ):
            return "sequential"
        if all(_equal(start, x) for start in starts) and _equal(y, x + sum(trace.b for trace in branches)):
            return "parallel"
        return None


def run_probe(transformer: PreTrainedModel, cores: Mapping[str, Mapping[str, Kind]]) -> Probe:
    """One forward pass over four tokens, in eval mode, without gradients and without moving the random state.

    Args:
        transformer: The model; on the meta device the pass runs on fake tensors.
        cores: For each block's path, the paths of the modules of its branches with their kinds.

    Raises:
        UnprovenStructureError: If the forward pass fails.
    """
    symbolic = any(parameter.is_meta for parameter in transformer.parameters())
    probe = Probe(symbolic)
    with _marked(), torch.no_grad(), lifted(transformer), evaluating(transformer):
        with ExitStack() as hooks:
            for block, paths in cores.items():
                for handle in _watch_block(probe, transformer, block, paths):
                    hooks.callback(handle.remove)
            try:
                _forward(transformer, symbolic)
            except UnprovenStructureError:
                raise
            except Exception as error:
                raise UnprovenStructureError(
                    f"{type(transformer).__name__}: a forward pass over {_TOKENS} tokens failed "
                    f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})."
                ) from error
        for trace in probe.branches:
            if cores[trace.block][trace.path] == "mlp":
                trace.tokenwise = symbolic or _is_tokenwise(transformer.get_submodule(trace.path), trace.read)
    return probe


def probing() -> bool:
    """Whether the running forward pass is a probe: its branches are random values that nobody should measure."""
    return _PROBING.get()


@contextmanager
def _marked() -> Iterator[None]:
    token = _PROBING.set(True)
    try:
        yield
    finally:
        _PROBING.reset(token)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode within the context; afterwards every module is back in the mode that it had itself."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _forward(transformer: PreTrainedModel, symbolic: bool) -> None:
    vocabulary = transformer.config.get_text_config().vocab_size
    tokens = torch.arange(1, _TOKENS + 1).remainder(vocabulary)[None]
    if not symbolic:
        transformer(input_ids=tokens.to(transformer.device), use_cache=False)
        return
    # bfloat16, which grouped matrix products of expert layers insist on without real data
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = {
            name: torch.empty(tensor.shape, dtype=torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in (*transformer.named_parameters(), *transformer.named_buffers())
        }
        ids = torch.arange(_TOKENS)[None]
        functional_call(transformer, state, kwargs={"input_ids": ids, "use_cache": False})


def _watch_block(probe: Probe, transformer: nn.Module, block: str, cores: Container[str]) -> Iterator[Any]:
    """Hooks on a block and its children that fill the probe."""
    written_by: dict[int, tuple[str, Tensor, Tensor]] = {}  # id of an output: writer, its input, the output itself
    module = transformer.get_submodule(block)
    yield module.register_forward_pre_hook(partial(_note_input, probe.inputs, block), with_kwargs=True)
    yield module.register_forward_hook(partial(_note_output, probe.outputs, block))
    for name, child in module.named_children():
        path = f"{block}.{name}"
        seen = _core_seen if path in cores else _other_seen
        yield child.register_forward_hook(partial(seen, probe, written_by, block, path), with_kwargs=True)


def _note_input(into: dict[str, Tensor], block: str, _module: nn.Module, args: Any, kwargs: Any) -> None:
    into[block] = first_tensor(args, kwargs)


def _note_output(into: dict[str, Tensor], block: str, _module: nn.Module, _args: Any, output: Any) -> None:
    into[block] = output[0] if isinstance(output, tuple) else output


def _core_seen(
    probe: Probe,
    written_by: dict[int, tuple[str, Tensor, Tensor]],
    block: str,
    path: str,
    _module: nn.Module,
    args: Any,
    kwargs: Any,
    output: Any,
) -> Any:
    """Note what a branch read, and replace what it wrote by random values of the same size as X."""
    read = first_tensor(args, kwargs)
    norm, x, _ = written_by.get(id(read), (None, read, read))
    wrote = output[0] if isinstance(output, tuple) else output
    if wrote.shape != x.shape:
        raise UnprovenStructureError(f"{path} turns shape {tuple(x.shape)} into {tuple(wrote.shape)}.")
    b = wrote.clone() if probe.symbolic else _random_like(wrote, x)
    outputs = len(output) if isinstance(output, tuple) else 0
    probe.branches.append(BranchTrace(path, block, read, x, b, norm=norm, outputs=outputs))
    return (b, *output[1:]) if outputs else b


def _other_seen(
    probe: Probe,
    written_by: dict[int, tuple[str, Tensor, Tensor]],
    block: str,
    path: str,
    _module: nn.Module,
    args: Any,
    kwargs: Any,
    output: Any,
) -> None:
    """Note a norm before a branch, or a post-norm or dropout behind one."""
    if not isinstance(output, Tensor):
        return
    read = first_tensor(args, kwargs)
    for trace in probe.branches:
        if trace.block == block and trace.b is read:
            trace.b, trace.tail = output, (*trace.tail, path)
            return
    written_by[id(output)] = (path, read, output)


def _random_like(wrote: Tensor, x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(wrote.shape, generator=generator).to(wrote)
    size = x.float().square().mean().sqrt().nan_to_num()
    return noise * torch.where(size > 0, size, 1.0).to(wrote)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of a few additions."""
    tolerance = 8 * torch.finfo(a.dtype).eps * max(a.abs().max().item(), b.abs().max().item())
    return a.shape == b.shape and (a - b).abs().max().item() <= tolerance


def _is_tokenwise(module: Callable[[Tensor], Any], read: Tensor) -> bool:
    """Whether the last token alone gives what it gave among the others; attention fails that, an MLP passes."""
    try:
        whole, alone = (_tensor(module(part)) for part in (read, read[:, -1:]))
    except Exception:  # whatever it raises: it needs more than hidden states, as a state-space mixer does
        return False
    # a matrix product rounds differently for one row than for four, more so the longer its sums
    tolerance = max(8 * torch.finfo(whole.dtype).eps, 1e-4) * whole.abs().max().item()
    return (whole[:, -1:] - alone).abs().max().item() <= tolerance


def _tensor(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
