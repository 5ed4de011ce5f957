"""Runs the conformance checks on tiny models of transformers' causal architectures.

    python benchmarks/conformance.py                          # all; writes docs/architectures.md
    python benchmarks/conformance.py --only '[llama, bert]'   # some; writes nothing

The checks are in tests/support/conformance.py. The last line counts the architectures that pass every check.
"""

import logging
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checks stand beside the tests, which try some of them

from tests.support.architectures import BuildError, causal_architectures
from tests.support.conformance import CHECKS
from tests.support.conformance_trial import Row, try_architecture

TABLE = Path(__file__).parents[1] / "docs" / "architectures.md"
INTRODUCTION = """\
# Architectures

Every causal architecture of transformers {version} (`MODEL_FOR_CAUSAL_LM_MAPPING`), as a tiny random model of its real
code. Made by `python benchmarks/conformance.py`; do not edit.

| check | what holds |
|---|---|
| found | as many attention and MLP sublayers as the config says; parts left alone are listed below |
| identity | in numbers: each block adds the sum of its branches to its stream |
| single | each sublayer bypassed gives the logits of a copy whose branch has zero weights |
| restore | after bypass and restore, logits and weights are bit for bit the same |
| several | several at once, block 0's attention among them, as single |
| generate | greedy, left-padded: cached logits equal uncached ones step by step, and those of the zero-weight copy |
| static cache | the same with a cache allocated in advance, if the zero-weight copy supports one |
| training | gradients with gradient checkpointing equal those without; dropped weights have none, all others have one |
| reload | saved and loaded: the same logits, no dropped weight in the file |
| importance | of whole blocks: equals 1 - cos of input and output |

A cell is "pass" or the reason why not. For some models the zero-weight copy, which does not use layershed, gives other
logits with its cache than without. There "generate" compares the dropped model with that copy alone, both with cache.
"""


def as_markdown(rows: Sequence[Row], unbuilt: dict[str, str], last_line: str) -> str:
    """The page: a table, the notes, and the refused architectures."""
    lines = [INTRODUCTION.format(version=transformers.__version__), f"**{last_line}.**", ""]
    lines += [f"| architecture | sublayers | {' | '.join(CHECKS)} |", "|---" * (len(CHECKS) + 2) + "|"]
    for row in rows:
        if row.refusal:
            lines.append(f"| {row.model_type} | none: see below |{' |' * len(CHECKS)}")
            continue
        cells = [", ".join(f"{number} {kind}" for kind, number in sorted(row.found.items()))]
        for name in CHECKS:
            note = row.notes.get(name, "")
            passed = note if note == "no static cache" else f"pass, *{note}*" if note else "pass"
            cells.append(row.results[name] or passed)
        lines.append(f"| {row.model_type} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Left alone",
        "",
        "The parts of blocks that are not sublayers. Each reason is listed once, with the first such part.",
        "",
    ]
    for row in rows:
        reasons = {entry.reason: entry.path for entry in reversed(row.left_alone)}
        lines += [f"- {row.model_type}: `{path}`: {reason}" for reason, path in reasons.items()]
    lines += ["", "## Refused", ""]
    lines += [f"- {row.model_type}: {row.refusal}" for row in rows if row.refusal]
    lines += ["", "## Not built tiny", "", *(f"- {reason}" for reason in unbuilt.values()), ""]
    return "\n".join(lines)


def main(only: Sequence[str] = ()) -> None:
    """Try the architectures.

    Args:
        only: Model types to try; all if empty.
    """
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    console = Console(highlight=False)
    started = time.monotonic()
    rows: list[Row] = []
    unbuilt: dict[str, str] = {}
    for model_type in track(only or list(causal_architectures()), console=console, description="Architectures"):
        try:
            rows.append(try_architecture(model_type))
        except BuildError as error:
            unbuilt[model_type] = str(error)
            continue
        row = rows[-1]
        problems = [f"{name}: {reason}" for name, reason in row.results.items() if reason]
        verdict = "pass" if row.passes else "FAIL"
        console.print(f"{verdict}  {model_type}  {row.refusal or '; '.join(problems)}", markup=False)
    passing = [row for row in rows if row.passes]
    noted = [row for row in passing if "generate" in row.notes]
    minutes = (time.monotonic() - started) / 60
    last_line = f"{len(passing)} of {len(rows)} architectures pass every check"
    if not only:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(as_markdown(rows, unbuilt, last_line), encoding="utf-8")
        console.print(f"Table: {TABLE}", markup=False)
    console.print(
        f"{minutes:.1f} minutes; {len(unbuilt)} could not be built; for {len(noted)} of those that pass transformers "
        "itself gives other logits with its cache than without"
    )
    print(last_line)


if __name__ == "__main__":
    auto_cli(main)
