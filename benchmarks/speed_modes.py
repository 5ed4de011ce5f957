"""Measured against predicted speedup of SmolLM2-135M, eager, under bfloat16 autocast, in bfloat16, and compiled.

The attentions that the importance of a few batches ranks lowest are dropped. Each line is one ``measure_speed``: dense
and dropped interleaved, medians over the pairs with their 95 % bootstrap interval, and beside it what the roofline
model predicts from this machine's own ceilings.

    LAYERSHED_SMOLLM2=.../SmolLM2-135M-Instruct.Q4_1.gguf python benchmarks/speed_modes.py
"""

import argparse
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from smollm2 import batches, load
from transformers import PreTrainedModel

import layershed as ls

MODES = ("eager", "autocast", "bfloat16", "compiled")


def row(phase: ls.PhaseSpeed, milliseconds: tuple[float, float]) -> list[str]:
    """Cells of one phase: milliseconds, speedup, prediction and their ratio."""
    speedup, ratio = phase.speedup, phase.measured_over_predicted
    measured = f"{speedup.median:.3f} [{speedup.low:.3f}, {speedup.high:.3f}]"
    return [
        f"{milliseconds[0]:,.1f} -> {milliseconds[1]:,.1f}",
        measured if phase.measurable else f"no measurable speedup, {measured}",
        "-" if phase.predicted is None else f"{phase.predicted:.3f}",
        "-" if ratio is None else f"{ratio:.2f}",
    ]


def prepare(mode: str, model: PreTrainedModel) -> AbstractContextManager[Any]:
    """Put the model into a mode; returns a context for the measurement."""
    if mode == "bfloat16":
        model.to(torch.bfloat16)
    if mode == "compiled":
        model.compile()
    return torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else nullcontext()


def main() -> None:
    """Measure in every mode and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=8, help="attentions dropped (default 8 of 30)")
    parser.add_argument("--runs", type=int, default=9, help="pairs (default 9)")
    parser.add_argument("--prompt_tokens", type=int, default=512, help="tokens per prompt (default 512)")
    parser.add_argument("--new_tokens", type=int, default=32, help="decoded tokens (default 32)")
    parser.add_argument("--batch_size", type=int, default=1, help="sequences at once (default 1)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="which (default all)")
    given = vars(parser.parse_args())
    count, modes = given.pop("count"), given.pop("modes")
    scores = ls.estimate_importance(load(), batches(2, batch_size=4, tokens=256))
    plan = ls.select_sublayers(scores, "attention", count=count)
    print(f"{count} of 30 attentions dropped: blocks {sorted(drop.sublayer.block for drop in plan.drops)}")
    table = Table()
    for name in ("mode", "phase", "ms dense -> dropped", "speedup", "predicted", "measured / predicted"):
        table.add_column(name)
    for mode in modes:
        model = load()
        ls.bypass(model, plan)
        with prepare(mode, model):
            report = ls.measure_speed(model, warmup=2, **given)
        table.add_row(mode, "prefill", *row(report.prefill, report.prefill_ms))
        table.add_row(mode, "decode", *row(report.decode, report.decode_ms))
    Console(width=120).print(table)
    print(f"{given}, {torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
