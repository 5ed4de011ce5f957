"""What must hold for an architecture; each check compares a dropped model with a reference made without a bypass.

The reference for a branch that contributes zero is a copy of the model whose weights of that branch are zero. Where a
norm stands in the stream after the add (post-LN), a dropped sublayer takes that norm along, and the reference is a
hook that puts X in the place of Y.
"""

from __future__ import annotations

import copy
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

import layershed as ls
from layershed.discovery.anatomy import Anatomy
from layershed.discovery.branches import Branch, Tap
from layershed.discovery.find import dissect
from layershed.spellings import recompute_activations
from tests.support.architectures import EXPECTED, VOCABULARY

TOKENS = 10


class CheckError(Exception):
    """A check failed; the text names the failure in a few words."""


class Case:
    """A tiny dense model with its anatomy and what it is fed.

    Args:
        model: A dense model in eval mode.
        inputs: What it is fed; two sequences of tokens if None.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any] | None = None) -> None:
        self.model: Any = model
        self.anatomy: Anatomy = dissect(model)
        self.inputs = {"input_ids": self.tokens, "use_cache": False} if inputs is None else dict(inputs)

    @property
    def tokens(self) -> Tensor:
        """Two sequences; a model of codebooks takes a row for each of them."""
        tables = self.model.get_input_embeddings()
        rows = 2 * (len(tables) if isinstance(tables, nn.ModuleList) else 1)
        return torch.randint(3, VOCABULARY, (rows, TOKENS), generator=torch.Generator().manual_seed(0))

    def logits(self, model: Any = None) -> Tensor:
        """What the model makes of its inputs: its logits, or its last hidden states."""
        with torch.no_grad():
            return first_output((self.model if model is None else model)(**self.inputs))

    @property
    def several(self) -> list[Branch]:
        """The first attention (block 0's, where it has one), an MLP, and the whole of the last block."""
        branches = self.anatomy.branches
        last = branches[-1].sublayer.block
        first = [b for b in branches if b.sublayer.kind == "attention"][:1]
        mlp = [b for b in branches if b.sublayer.kind == "mlp" and 0 < b.sublayer.block < last][:1]
        chosen = {b.sublayer: b for b in (*first, *mlp, *(b for b in branches if b.sublayer.block == last))}
        return list(chosen.values()) if len(chosen) < len(branches) else list(chosen.values())[:-1]


def first_output(output: Any) -> Tensor:
    """The logits of a model's output, or its first value."""
    found: Tensor = getattr(output, "logits", output if isinstance(output, Tensor) else output[0])
    return found


def reference(case: Case, dropped: Iterable[Branch]) -> Any:
    """A copy of the model in which branches contribute nothing, made without a bypass."""
    model = copy.deepcopy(case.model)
    dropped = list(dropped)
    others = [branch for branch in case.anatomy.branches if branch not in dropped]
    kept = {path for branch in others for path, _ in branch.support}
    for branch in dropped:
        post_norm = branch.scale is None and any(not stand_in.zero for _, stand_in in branch.stand_ins)
        own = [path for path, _ in branch.stand_ins] + [path for path, _ in branch.support if path not in kept]
        if post_norm or _norm_in_stream(branch):
            _replace_y_by_x(model, branch)
            continue
        for path in own:
            for parameter in model.get_submodule(path).parameters():
                parameter.data.zero_()
    return model


def _norm_in_stream(branch: Branch) -> bool:
    """Whether a norm of its own wrote Y."""
    return (
        branch.exit.key is None and any(path == branch.exit.path for path, _ in branch.support) and branch.scale is None
    )


def _replace_y_by_x(model: nn.Module, branch: Branch) -> None:
    seen: dict[str, Tensor] = {}
    key = branch.entry.key
    assert key is not None
    assert branch.exit.key is None

    def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
        seen["x"] = args[key] if isinstance(key, int) else kwargs[key]

    def put(_module: nn.Module, _args: Any, output: Any) -> Any:
        return (seen["x"], *output[1:]) if isinstance(output, tuple) else seen["x"]

    model.get_submodule(branch.entry.path).register_forward_pre_hook(note, with_kwargs=True)
    model.get_submodule(branch.exit.path).register_forward_hook(put)


def _close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    if found.shape != expected.shape or not torch.isfinite(found).all():
        return False
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1))


def found(case: Case) -> None:
    """As many sublayers of each kind as the config says, and attention where the modules are named so."""
    counts = dict(Counter(branch.sublayer.kind for branch in case.anatomy.branches))
    blocks = len(case.anatomy.blocks)
    expected = EXPECTED.get(case.model.config.model_type, {"attention": blocks, "mlp": blocks})
    if counts != expected:
        raise CheckError(f"found {counts}, expected {expected}")
    for branch in case.anatomy.branches:
        path = branch.sublayer.path
        name = f"{path.split('.')[-2:]} {type(case.model.get_submodule(path)).__name__}".lower()
        if ("attn" in name or "attention" in name) != (branch.sublayer.kind == "attention"):
            raise CheckError(f"{path} is taken for {branch.sublayer.kind}")


def identity(case: Case) -> None:
    """Y = X + f(norm(X)), in numbers: a block adds the sum of its branches to its stream."""
    anatomy = case.anatomy
    taps: dict[Any, Tap] = {}
    for branch in anatomy.branches:
        taps[branch.sublayer, "x"], taps[branch.sublayer, "out"] = branch.entry, branch.exit
    for index, block in enumerate(anatomy.blocks):
        if block is not None:
            taps[index, "x"], taps[index, "y"] = block, Tap(block.path)
    seen = _read(case, taps)
    for index in anatomy.plain:
        x, y = seen[index, "x"], seen[index, "y"]
        own = [branch for branch in anatomy.branches if branch.sublayer.block == index]
        total = sum((_added(branch, seen, x) for branch in own), torch.zeros_like(y))
        if not _close(y, x + total):
            raise CheckError(f"block {index}: Y differs from X + f(norm(X))")
    # where a norm or a scale stands in the stream, Y is read: it is the X of the next sublayer
    for branch, later in pairwise(anatomy.branches):
        y, x = seen[branch.sublayer, "out"], seen[later.sublayer, "x"]
        following = later.sublayer.block == branch.sublayer.block and later.topology == "sequential"
        if branch.scale is None and following and not _close(y.view_as(x), x):
            raise CheckError(f"the Y of {branch.sublayer.name} is not the X of {later.sublayer.name}")


def _added(branch: Branch, seen: dict[Any, Tensor], like: Tensor) -> Tensor:
    """What a branch adds to the stream."""
    out = seen[branch.sublayer, "out"].view_as(like)
    return out - seen[branch.sublayer, "x"].view_as(like) if branch.scale is None else branch.scale * out


def _read(case: Case, taps: dict[Any, Tap]) -> dict[Any, Tensor]:
    """The tensors at some places of the model, during one forward pass."""
    seen: dict[Any, Tensor] = {}

    def argument(name: Any, key: Any, _module: nn.Module, args: Any, kwargs: Any) -> None:
        seen[name] = (args[key] if isinstance(key, int) else kwargs[key]).clone()

    def output(name: Any, _module: nn.Module, _args: Any, result: Any) -> None:
        seen[name] = (result[0] if isinstance(result, tuple | list) else result).clone()

    handles = []
    for name, tap in taps.items():
        module = case.model.get_submodule(tap.path)
        if tap.key is None:
            handles.append(module.register_forward_hook(partial(output, name)))
        else:
            handles.append(module.register_forward_pre_hook(partial(argument, name, tap.key), with_kwargs=True))
    case.logits()
    for handle in handles:
        handle.remove()
    return seen


def single(case: Case) -> None:
    """Each sublayer bypassed equals the reference."""
    dense = case.logits()
    for branch in case.anatomy.branches:
        expected = case.logits(reference(case, [branch]))
        ls.bypass(case.model, [branch.sublayer])
        found = case.logits()
        ls.restore(case.model)
        if not _close(found, expected):
            raise CheckError(f"{branch.sublayer.name} bypassed differs from a zero branch")
        if torch.equal(found, dense):
            raise CheckError(f"{branch.sublayer.name} bypassed changes nothing")


def restored(case: Case) -> None:
    """After bypass and restore of all sublayers at once, the model is bit for bit the same."""
    before, state = case.logits(), {name: t.clone() for name, t in case.model.state_dict().items()}
    with _bypassed(case):
        case.logits()
    if not torch.equal(case.logits(), before):
        raise CheckError("restored logits differ")
    after = case.model.state_dict()
    if after.keys() != state.keys() or not all(torch.equal(after[name], t) for name, t in state.items()):
        raise CheckError("restored weights differ")


def together(case: Case) -> None:
    """Several dropped at once equal the reference."""
    expected = case.logits(reference(case, case.several))
    with _bypassed(case):
        found = case.logits()
    if not _close(found, expected):
        raise CheckError("several bypassed differ from zero branches")


def generation(case: Case) -> str | None:
    """Greedy generate() with the cache gives, step by step, the logits without it, with left padding.

    And those of the reference with the cache: that alone is asked where the reference itself fails the first.
    """
    copied = reference(case, case.several)
    try:
        expected = _generated(copied, case)
        sound = _same_steps(expected, _generated(copied, case, use_cache=False))
    except Exception as error:
        raise CheckError(f"transformers' dense model does not generate ({type(error).__name__})") from None
    with _bypassed(case):
        with_cache, without = _generated(case.model, case), _generated(case.model, case, use_cache=False)
    if not _same_steps(with_cache, expected):
        raise CheckError("cached logits differ from those of zero branches")
    if not sound:
        return "as the zero-weight copy, whose cached logits differ from its uncached ones"
    if not _same_steps(with_cache, without):
        raise CheckError("cached logits differ from uncached ones")
    return None


def static_cache(case: Case) -> str | None:
    """The same with a cache allocated in advance, where the reference can do with one."""
    copied = reference(case, case.several)
    try:
        expected = _generated(copied, case, cache_implementation="static")
        sound = _same_steps(expected, _generated(copied, case, use_cache=False))
    except Exception:
        sound = False
    if not sound:
        return "no static cache"
    with _bypassed(case):
        static = _generated(case.model, case, cache_implementation="static")
        if not _same_steps(static, _generated(case.model, case, use_cache=False)):
            raise CheckError("logits from a static cache differ from uncached ones")
    return None


def _same_steps(found: Tensor, expected: Tensor) -> bool:
    """Whether the logits of two decodings agree, shape (steps, batch, vocabulary), as long as their tokens do.

    Where two tokens tie, rounding decides between them, and what follows is another text.
    """
    same = torch.ones(found.shape[1], dtype=torch.bool)
    for here, there in zip(found, expected, strict=True):
        if not _close(here[same], there[same], 1e-4):
            return False
        same &= here.argmax(-1) == there.argmax(-1)
    return True


def _generated(model: Any, case: Case, **options: Any) -> Tensor:
    """The logits of five steps of greedy decoding, one sequence padded on its left."""
    mask = torch.ones_like(case.tokens)
    mask[0, :3] = 0
    with torch.no_grad():
        output = model.generate(
            input_ids=case.tokens.masked_fill(mask == 0, 0),
            attention_mask=mask,
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
    return torch.stack(output.logits)


@contextmanager
def _bypassed(case: Case) -> Iterator[None]:
    """Several sublayers bypassed within the context."""
    ls.bypass(case.model, [branch.sublayer for branch in case.several])
    try:
        yield
    finally:
        ls.restore(case.model)


def training(case: Case) -> None:
    """Gradient checkpointing does not change the gradients of kept weights; dropped weights get none."""
    model, several = case.model, case.several
    with _bypassed(case):
        try:
            model.train()
            plain = _gradients(case)
            if model.supports_gradient_checkpointing:
                recompute_activations(model)
                checkpointed = _gradients(case)
                same = plain.keys() == checkpointed.keys()
                if not same or not all(_close(checkpointed[name], plain[name], 1e-4) for name in plain):
                    raise CheckError("gradients under checkpointing differ")
        finally:
            model.zero_grad()
            model.activation_checkpointing_disable()
            model.eval()
    for branch in case.anatomy.branches:
        own = tuple(f"{path}." for path, _ in branch.stand_ins)
        reached = any(name.startswith(own) and gradient.abs().sum() > 0 for name, gradient in plain.items())
        if reached == (branch in several):
            raise CheckError(f"{branch.sublayer.name} gets {'a' if reached else 'no'} gradient")


def _gradients(case: Case) -> dict[str, Tensor]:
    case.model.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # dropout
        loss: Any = first_output(case.model(**case.inputs)).float().square().mean()
        loss.backward()
    return {name: p.grad.clone() for name, p in case.model.named_parameters() if p.grad is not None}


def saving(case: Case) -> None:
    """Saved and loaded: the same logits, and no weight of a dropped sublayer in the file."""
    gone = tuple(f"{path}." for branch in case.several for path, _ in branch.stand_ins)
    with _bypassed(case), tempfile.TemporaryDirectory() as temporary:
        folder = ls.save_pretrained(case.model, Path(temporary) / "saved")
        names: set[str] = set()
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as content:
                names.update(content.keys())
        if left := [name for name in names if any(own in f"{name}." for own in gone)]:
            raise CheckError(f"the file holds {left[0]}")
        # a copy stands in memory as the model does: files are mapped at any address, by which some CPUs' kernels round
        loaded = copy.deepcopy(ls.load_pretrained(folder))
        if not torch.equal(case.logits(loaded), case.logits()):
            raise CheckError("logits after loading differ")
        if ls.dropped_sublayers(loaded) != ls.dropped_sublayers(case.model):
            raise CheckError("what is dropped after loading differs")


def importance(case: Case) -> None:
    """The importance of whole blocks is 1 - cos of their input and output."""
    taps = {}
    for index, block in enumerate(case.anatomy.blocks):
        if block is not None:
            taps[index, "x"], taps[index, "y"] = block, Tap(block.path)
    seen = _read(case, taps)
    scores = ls.estimate_importance(case.model, [case.inputs])
    if set(scores) != {branch.sublayer for branch in case.anatomy.branches}:
        raise CheckError("not every sublayer is scored")
    if not all(0 <= value <= 2 for value in scores.values()):
        raise CheckError("an importance is not within [0, 2]")
    for index, value in scores.blocks.items():
        x, y = seen[index, "x"].double(), seen[index, "y"].double()
        plain = 1 - torch.nn.functional.cosine_similarity(x, y, dim=-1).mean().item()
        if abs(plain - value) > 1e-5:
            raise CheckError(f"importance of block {index} is {value:.6f}, by the formula {plain:.6f}")


def compiled(case: Case) -> None:
    """torch.compile (aot_eager) of the dropped model gives the same logits."""
    torch.compiler.reset()
    with _bypassed(case):
        if not _close(case.logits(torch.compile(case.model, backend="aot_eager")), case.logits(), 1e-4):
            raise CheckError("compiled logits differ")
    torch.compiler.reset()


# Each raises CheckError, or returns a note, or nothing.
CHECKS: dict[str, Callable[[Case], str | None]] = {
    "found": found,
    "identity": identity,
    "single": single,
    "restore": restored,
    "several": together,
    "generate": generation,
    "static cache": static_cache,
    "training": training,
    "reload": saving,
    "importance": importance,
}
