"""What does scoring cost, against a plain forward pass over the same tokens, and does its memory grow with them?

Time: scoring and the plain forward pass (of the model without its head, which scoring does not run either) alternate
in one process, A B A B; the ratio is the median over the pairs with its 95 % bootstrap interval. Against a forward
pass with the head the ratio is printed too. Memory: the peak resident set of a fresh process that scores that many
tokens, batch by batch.

    LAYERSHED_SMOLLM2=.../SmolLM2-135M-Instruct.Q4_1.gguf python benchmarks/scoring_cost.py

Seen on two cores of a shared Xeon, torch 2.13.0:

    12 rounds of 2 x 4 x 256 tokens, 2 threads
    scoring: 2.69 s
    over a forward pass without head (2.27 s): 1.179 [1.161, 1.209]
    over a forward pass with head (2.71 s): 0.990 [0.972, 1.010]
    peak memory scoring 4,096 tokens: 1,457 MiB
    peak memory scoring 32,768 tokens: 1,457 MiB
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from smollm2 import batches, load

import layershed as ls
from layershed.performance.intervals import bootstrap_interval

PAIRS, BATCH_SIZE, TOKENS = 12, 4, 256


def timed(run: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare_times() -> None:
    """Print the ratio of scoring to a plain forward pass."""
    model, inputs = load(), batches(2, batch_size=BATCH_SIZE, tokens=TOKENS)

    def forward(body: Callable[..., object], given: Sequence[Mapping[str, Any]]) -> None:
        with torch.no_grad():
            for batch in given:
                body(**batch, use_cache=False)

    runs: dict[str, Callable[[], object]] = {
        "scoring": lambda: ls.estimate_importance(model, inputs),
        "without head": lambda: forward(model.base_model, inputs),
        "with head": lambda: forward(model, inputs),
    }
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(PAIRS):
        for name, run in runs.items():
            seconds[name].append(timed(run))
    print(f"{PAIRS} rounds of 2 x {BATCH_SIZE} x {TOKENS} tokens, {torch.get_num_threads()} threads")
    print(f"scoring: {statistics.median(seconds['scoring']):.2f} s")
    for name in ("without head", "with head"):
        ratio = bootstrap_interval([a / b for a, b in zip(seconds["scoring"], seconds[name], strict=True)])
        median = statistics.median(seconds[name])
        print(f"over a forward pass {name} ({median:.2f} s): {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]")


def peak_memory(tokens: int) -> float:
    """Peak resident memory, in MiB, of a process that scores so many tokens."""
    command = [sys.executable, __file__, "--score", str(tokens)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Print both, or score only (in a process of its own)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--score", type=int, help="only score that many tokens and print the peak memory in MiB")
    wanted = parser.parse_args().score
    if wanted:
        # the longer run's text is built in both, so that only scoring differs
        inputs = batches(32768 // (BATCH_SIZE * TOKENS), batch_size=BATCH_SIZE, tokens=TOKENS)
        ls.estimate_importance(load(), inputs, max_batches=wanted // (BATCH_SIZE * TOKENS))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    compare_times()
    for tokens in (4096, 32768):
        print(f"peak memory scoring {tokens:,} tokens: {peak_memory(tokens):,.0f} MiB")


if __name__ == "__main__":
    main()
