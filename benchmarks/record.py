"""What do the checks of the record cost a training step of a dropped model?

A Llama of SmolLM2-135M's shape with random weights, 8 attentions and 7 MLPs bypassed, trains under AdamW in float32.
The checks are hooks in every forward pass (stand_ins/record.py, watching.py), and what follows every micro-batch under
DistributedDataParallel what trains (recovery/frozen.py, integration/trained_parameters.py). A pair is one training step
and the same checks called a hundred times without one. The ratio is one round of the checks over the step, in
processor time: median and 95 % bootstrap interval over the pairs. Steps with and without the hooks differ by less than
this machine scatters, so they are not compared.

    OMP_NUM_THREADS=1 python benchmarks/record.py --pairs 10
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import layershed as ls
from layershed.integration.trained_parameters import TrainsWatch
from layershed.performance.intervals import bootstrap_interval
from layershed.recovery.frozen import StaysFrozen
from layershed.stand_ins.carried import dropped_parameters

SHAPE: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
ROUNDS = 100


def hooks_of(model: nn.Module, x: Tensor) -> list[Callable[[], object]]:
    """Every hook of layershed, with the arguments of a call in a forward pass."""
    found: list[Callable[[], object]] = []
    for module in model.modules():
        before, after = module._forward_pre_hooks, module._forward_hooks
        found += [partial(hook, module, (x,)) for hook in before.values() if _is_ours(hook)]
        for number, hook in after.items():
            with_kwargs = number in module._forward_hooks_with_kwargs
            if _is_ours(hook):
                found.append(partial(hook, module, (x,), *([{}] if with_kwargs else []), x))
    return found


def _is_ours(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("layershed.")


def main(pairs: int, batch_size: int, tokens: int, blocks: int) -> None:
    """Print seconds of a step, of a round of each kind of checks, and their ratio."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": blocks})).train()
    found = ls.find_sublayers(model)
    first, second = 14 * blocks // 30, 22 * blocks // 30
    wanted = {(block, "attention") for block in range(first, max(second, first + 1))}
    wanted |= {(block, "mlp") for block in range(second, max(29 * blocks // 30, second + 1))}
    ls.bypass(model, [sublayer for sublayer in found if (sublayer.block, sublayer.kind) in wanted])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(SHAPE["vocab_size"], (batch_size, tokens))
    hooks = hooks_of(model, torch.zeros(batch_size, tokens, SHAPE["hidden_size"]))
    checks = {"hooks": hooks, "what trains": what_trains(model, optimizer)}
    steps: list[float] = []
    rounds: dict[str, list[float]] = {name: [] for name in checks}
    for pair in range(pairs + 1):
        start = time.process_time()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        middle = time.process_time()
        if pair:  # the first one warms up
            steps.append(middle - start)
        for name, each in checks.items():
            seconds = _round(each)
            if pair:
                rounds[name].append(seconds)
    print(f"{len(hooks)} hooks, {blocks} blocks, {batch_size} x {tokens} tokens, {pairs} pairs")
    print(f"step {statistics.median(steps):.2f} s")
    for name, own in rounds.items():
        share = bootstrap_interval([100 * seconds / step for seconds, step in zip(own, steps, strict=True)])
        print(
            f"{name}: {1e6 * statistics.median(own):.0f} us, {share.median:.4f} % [{share.low:.4f}, {share.high:.4f}] "
            "of a step"
        )


def what_trains(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Callable[[], object]]:
    """The checks of TrainedParameters.step, if nothing has changed."""
    trainer: Any = SimpleNamespace(optimizers=[optimizer], strategy=SimpleNamespace(model=model))
    frozen, watch = StaysFrozen(), TrainsWatch()
    frozen.hold(model, dropped_parameters)
    watch.note(trainer, model)
    return [partial(frozen.enforce, [optimizer]), partial(watch.unchanged, trainer)]


def _round(checks: list[Callable[[], object]]) -> float:
    """Seconds of calling each once."""
    start = time.process_time()
    for _ in range(ROUNDS):
        for check in checks:
            check()
    return (time.process_time() - start) / ROUNDS


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=SHAPE["num_hidden_layers"])
    arguments = parser.parse_args()
    main(arguments.pairs, arguments.batch_size, arguments.tokens, arguments.blocks)
