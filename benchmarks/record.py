"""What do the checks of the record cost a training step of a dropped model?

A Llama of SmolLM2-135M's shape with random weights, 8 attentions and 7 MLPs bypassed, trains under AdamW in float32.
The checks are hooks in every forward pass (stand_ins/record.py, watching.py). A pair is one training step, and
then the same hooks called a hundred times without a step. The ratio is one round of the hooks over the step, in
processor time: median and 95 % bootstrap interval over the pairs. Steps with and without the hooks differ by less than
this machine scatters, so they are not compared.

    OMP_NUM_THREADS=1 python benchmarks/record.py --pairs 10
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import layershed as ls
from layershed.performance.intervals import bootstrap_interval

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


def main(pairs: int, batch_size: int, tokens: int) -> None:
    """Print seconds of a step, of a round of hooks, and their ratio."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).train()
    found = ls.find_sublayers(model)
    wanted = {(block, "attention") for block in range(14, 22)} | {(block, "mlp") for block in range(22, 29)}
    ls.bypass(model, [sublayer for sublayer in found if (sublayer.block, sublayer.kind) in wanted])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(SHAPE["vocab_size"], (batch_size, tokens))
    hooks = hooks_of(model, torch.zeros(batch_size, tokens, SHAPE["hidden_size"]))
    steps, rounds = [], []
    for pair in range(pairs + 1):
        start = time.process_time()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        middle = time.process_time()
        for _ in range(ROUNDS):
            for hook in hooks:
                hook()
        if pair:  # the first one warms up
            steps.append(middle - start)
            rounds.append((time.process_time() - middle) / ROUNDS)
    share = bootstrap_interval([100 * own / step for own, step in zip(rounds, steps, strict=True)])
    print(f"{len(hooks)} hooks, {batch_size} x {tokens} tokens, {pairs} pairs")
    print(f"step {statistics.median(steps):.2f} s, hooks {1e6 * statistics.median(rounds):.0f} us")
    print(f"{share.median:.4f} % [{share.low:.4f}, {share.high:.4f}] of a step")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    main(arguments.pairs, arguments.batch_size, arguments.tokens)
